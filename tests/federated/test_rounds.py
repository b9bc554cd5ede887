"""Rounds of server and clients in one process: what is learnt, sent, saved, and left out."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorank.federated import sparse
from lorank.federated.client import Client, base_of
from lorank.federated.exchange import Memory, Package, tensors_of
from lorank.federated.flower import _client
from lorank.federated.local import Local, clients_of
from lorank.federated.private import epsilon
from lorank.federated.server import FILE, Server
from lorank.federated.settings import Settings, Share, shares_of_text
from lorank.federated.table import RULES
from lorank.train.data.tokenizers import byte_tokenizer
from lorank.train.saved import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads bytes in `base`, another in `other`, and a folder `text` of two kinds."""
    folder, tokenizer = tmp_path_factory.mktemp("federated"), byte_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text").mkdir()
    for name, line in (("a", "abc abc {} abc\n"), ("b", "{} + {} = {}\n")):
        rows = [{"text": "".join(line.format(i, j, i + j) for j in range(9))} for i in range(40)]
        (folder / f"text/{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def settings(base: Path) -> Callable[..., Settings]:
    def make(**changes: Any) -> Settings:
        given = {"model": str(base / "base"), "data": str(base / "text"), "clients": 2, "rounds": 2, "rank": "4"}
        given |= {"steps": 3, "batch_size": 4, "sequence_length": 16, "lr": 2e-2, "eval_tokens": 200}
        return Settings(**{**given, **changes})

    return make


def ran(settings: Settings, out: Path, link: Local | None = None) -> Server:
    server = Server(settings, out)
    server.run(link or Local(clients_of(settings)))
    return server


def first_round(settings: Settings) -> Package:
    """What a server asks a client first."""
    values = {"do": "train", "settings": settings.to_dict(), "round": 0, "rounds": 0, "since": 0, "version": 0}
    return Package({**values, "factors_seed": [0, 0]})


@pytest.mark.parametrize("rule", [*RULES])
def test_every_rule_learns_and_goes_on_exactly(rule: str, settings: Any, tmp_path: Path) -> None:
    """Over the table. A run that was stopped after a round goes on as if it had not been, and the model is that of the last losses."""
    server = ran(settings(method=rule), tmp_path / "whole")
    losses = [row["loss"] for row in server.rounds]
    assert losses[2] < losses[1] < losses[0]
    first = Server(settings(method=rule), tmp_path / "parts")
    first._round(Local(clients_of(first.settings)), train=True)
    went_on = ran(settings(method=rule), tmp_path / "parts")
    for one, other in zip(server.rounds, went_on.rounds, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    assert server.save_model() == tmp_path / "whole/model"
    model, _ = load_model(str(tmp_path / "whole/model"))
    client = clients_of(server.settings)[0]
    merged = base_of(str(tmp_path / "whole/model"), 1, 1.0)
    _, held_out = client._text(server.settings)
    merged.set({n: (torch.zeros(m, 1), torch.zeros(1, k)) for n, (m, k) in merged.shapes.items()}, {})
    found = client._loss(merged, held_out, server.settings)
    assert found == pytest.approx(server.rounds[-1]["losses"]["client 0"], abs=1e-5)
    assert model.num_parameters() == LlamaForCausalLM(model.config).num_parameters()


def test_payloads_are_those_of_the_papers(settings: Any, tmp_path: Path) -> None:
    """Numbers of 4 bytes. Shapes of a block: 4 x (16, 16), 2 x (32, 16), 1 x (16, 32)."""
    m, n, r = 4 * 16 + 2 * 32 + 16, 4 * 16 + 2 * 16 + 32, 4
    wanted = {"average": (r * (m + n), r * (m + n)), "ffa": (r * m, r * m), "fedsvd": (r * (m + n), r * m)}
    for rule, (down, up) in (wanted | {"flora": (2 * r * (m + n), r * (m + n))}).items():
        rows = ran(settings(method=rule, steps=1), tmp_path / rule).rounds
        assert [row["down"] for row in rows] == [0, 0, 2 * 4 * down], "the first factors follow from the seed"
        assert [row["up"] for row in rows] == [0, 2 * 4 * up, 2 * 4 * up]
    rows = ran(settings(down=0.25, up=0.1, steps=1, method="average"), tmp_path / "sparse").rounds
    numbers = r * (m + n)
    assert rows[2]["down"] == 2 * 8 * (numbers // 4) and rows[2]["up"] == 2 * 8 * int(0.1 * numbers + 1e-9)


def test_a_client_weighs_as_much_as_it_has_sequences(settings: Any, tmp_path: Path, monkeypatch: Any) -> None:
    chosen, answers = settings(method="average", steps=1, rounds=1), []
    link = Local(clients_of(chosen))
    ask = link.ask
    monkeypatch.setattr(link, "ask", lambda *asked: answers.append(ask(*asked)) or answers[-1])
    server = ran(chosen, tmp_path, link)
    one, two = answers[1].values()  # after the greeting
    n, k = (len(client._text(chosen)[0]) for client in link.clients)
    assert server.factors is not None and n != k
    for name, tensor in tensors_of(server.factors).items():
        torch.testing.assert_close(tensor, (n * one.tensors[name] + k * two.tensors[name]) / (n + k))


def test_sparse_changes_are_from_what_was_received(settings: Any, tmp_path: Path) -> None:
    server = Server(settings(method="average", clients=1, down=0.25, up=0.1), tmp_path)
    link = Local(clients_of(server.settings))
    server._round(link, train=True)
    assert server.factors is not None
    before = tensors_of(server.factors)
    received = sparse.unpacked(sparse.packed(before, 0.25), before)
    server._round(link, train=True)
    after = tensors_of(server.base.factors())  # of the client, whose model this is
    delta = {name: after[name] - received[name] for name in after}
    largest = sparse.unpacked(sparse.packed(delta, 0.1), delta)
    for name, tensor in tensors_of(server.factors).items():
        torch.testing.assert_close(tensor, before[name] + largest[name])


def test_ranks_may_differ(settings: Any, tmp_path: Path) -> None:
    server = ran(settings(method="flora", rank="2,4"), tmp_path)
    assert all(A.shape[0] == 6 for _, A in server.merged[0].values())
    assert server.rounds[-1]["loss"] < server.rounds[0]["loss"]
    for client, rank in zip(clients_of(server.settings), (2, 4), strict=True):
        sent = client.answer(first_round(server.settings), Memory()).tensors
        for name, layer in base_of(client.model, rank, 16.0).layers.items():
            change = 16 / rank * layer.B.weight @ layer.A.weight
            torch.testing.assert_close(sent[f"{name}.B"] @ sent[f"{name}.A"], change, msg="its scale is in B")
    with pytest.raises(
        ValueError, match="rank must be one number for all clients with ffa, got '2,4'; use flora or best"
    ):
        settings(method="ffa", rank="2,4")


def test_privacy_is_counted_by_each_client(settings: Any, tmp_path: Path) -> None:
    server = ran(settings(method="ffa", epsilon=8.0, clip=0.5), tmp_path / "private")
    last = server.rounds[-1]["epsilon"]
    assert all(7.9 < cost <= 8.0 for cost in last.values()) and len(last) == 2
    assert all(server.rounds[1]["epsilon"][name] < cost for name, cost in last.items())
    clients = clients_of(server.settings)
    lost = Odd(clients[1], raises)
    parts = Server(server.settings, tmp_path / "parts")
    parts._round(Local([clients[0], lost]), train=True)
    went_on = ran(server.settings, tmp_path / "parts")
    assert "client 1" in went_on.rounds[1]["left_out"]
    assert went_on.rounds[2]["epsilon"] == last, "also of an answer that was not used, and of clients that forgot it"
    chosen = settings(method="ffa", noise=1.5)
    train, _ = clients_of(chosen)[0]._text(chosen)
    found = ran(chosen, tmp_path / "noise").rounds[1]["epsilon"]["client 0"]
    assert found == pytest.approx(epsilon(1.5, 4 / len(train), 3, 1e-5))
    with pytest.raises(ValueError, match="epsilon and noise must not both be given"):
        settings(epsilon=1.0, noise=1.0)


def test_a_round_that_no_server_saw_the_end_of_is_paid_for(settings: Any, tmp_path: Path) -> None:
    """If its noise is new when it is repeated, as in a deployment."""
    chosen = settings(method="ffa", noise=1.5, steps=1, rounds=1)
    for repeats, rounds in ((False, 2), (True, 1)):
        out, lost = tmp_path / str(repeats), Local(clients_of(chosen))
        lost.repeats = repeats

        def killed(packages: Any, what: str, link: Any = lost) -> Any:
            if what.startswith("round"):
                raise KeyboardInterrupt
            return Local.ask(link, packages, what)

        lost.ask = killed  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            Server(chosen, out)._round(lost, train=True)
        found = ran(chosen, out).rounds[1]["epsilon"]["client 0"]
        q = 4 / len(lost.clients[0]._text(chosen)[0])
        assert found == pytest.approx(epsilon(1.5, q, rounds, 1e-5))


def test_a_client_counts_for_itself_with_its_own_noise(settings: Any) -> None:
    """Of a deployment; in a simulation the noise can be repeated."""
    chosen = settings(method="ffa", noise=1.5, steps=1)
    simulated = clients_of(chosen)[0]
    alice = Client(simulated.model, simulated.share, "alice", 0)
    asked = first_round(chosen)
    first, second = (alice.answer(asked, memory) for memory in (Memory(rounds=5), Memory()))
    q = 4 / len(alice._text(chosen)[0])
    assert first.values["epsilon"] == pytest.approx(epsilon(1.5, q, 6, 1e-5)), "whatever the server says"
    again = [simulated.answer(asked, Memory()) for _ in range(2)]
    for name, tensor in first.tensors.items():
        assert not torch.equal(tensor, second.tensors[name])
        assert torch.equal(again[0].tensors[name], again[1].tensors[name])


def test_without_noise_and_bound_privacy_changes_nothing(settings: Any, base: Path) -> None:
    """One step of SGD on all samples: the gradient of each sample is the mean's part."""
    client, found = clients_of(settings())[0], []
    whole = len(client._text(settings())[0])
    for noise, clip in ((None, 1e6), (0.0, 1e6), (None, 1e-3)):
        chosen = settings(method="average", optimizer="sgd", batch_size=whole, steps=1, clip=clip, noise=noise)
        found.append(client.answer(first_round(chosen), Memory()).tensors)
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-4, atol=1e-7)
    moved = torch.cat([tensor.flatten() for name, tensor in found[2].items() if name.endswith("B")]).norm()
    assert moved == pytest.approx(16.0 / 4 * 2e-2 * 1e-3, rel=1e-4), (
        "alpha / rank, lr, and the bound; A has no gradient yet"
    )


# ---- clients that cannot be used


class Odd(Client):
    """Answers with what `change` makes of its answer."""

    def __init__(self, one: Client, change: Callable[[Package], Any]):
        super().__init__(one.model, one.share, one.name, one.index, repeatable=True)
        self.change = change

    def answer(self, asked: Package, memory: Memory) -> Package:
        found = super().answer(asked, memory)
        return found if asked.values["do"] == "hello" else self.change(found)


def wrong(package: Package, change: Callable[[torch.Tensor], torch.Tensor]) -> Package:
    name = next(iter(package.tensors), None)
    return (
        package if name is None else Package(package.values, {**package.tensors, name: change(package.tensors[name])})
    )


def raises(package: Package) -> Package:
    raise RuntimeError("out of\nmemory")


ODD: Mapping[str, tuple[Callable[[Package], Any], str]] = {
    "shape": (lambda p: wrong(p, lambda t: t[:-1]), r"must have the shape \[\d+, 4\], got \[\d+, 4\]"),
    "nan": (lambda p: wrong(p, lambda t: t * torch.nan), "must be finite numbers, got others"),
    "large": (lambda p: wrong(p, lambda t: 0 * t + 1e30), "must be finite numbers, got too large ones"),
    "type": (lambda p: wrong(p, lambda t: t.long()), "must be numbers of torch.float32, got torch.int64"),
    "double": (lambda p: wrong(p, lambda t: t.double()), "must be numbers of torch.float32, got torch.float64"),
    "name": (lambda p: Package(p.values, {**p.tensors, "x": torch.ones(1)}), "sent x, which nobody asked for"),
    "nothing": (lambda p: Package(p.values), "it sent no "),
    "loss": (lambda p: Package(p.values | {"loss": "low"}, p.tensors), "its loss must be a finite number, got 'low'"),
    "samples": (lambda p: Package(p.values | {"samples": -3}, p.tensors), "its samples must be a positive integer, got -3"),
    "many": (lambda p: Package(p.values | {"samples": 10**400}, p.tensors), r"a positive integer, got 10+\.\.\.0+$"),
    "version": (lambda p: Package(p.values | {"version": -5}, p.tensors), "its version must be an integer from 0 to 0, got -5"),
    "cost": (lambda p: Package(p.values | {"epsilon": "none"}, p.tensors), "its epsilon must be a number, got 'none'"),
    "base": (lambda p: Package(p.values | {"base": "0"}, p.tensors), "it has another base model"),
    "dropped": (raises, "out of memory"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*ODD])
def test_a_client_that_sends_garbage_is_named_and_left_out(kind: str, settings: Any, tmp_path: Path) -> None:
    change, words = ODD[kind]
    chosen = settings(method="average", steps=1, rounds=1)
    clients = clients_of(chosen)
    said: list[str] = []
    server = Server(chosen, tmp_path, said.append)
    server.run(Local([clients[0], Odd(clients[1], change)]))
    assert re.search(words, server.rounds[1]["left_out"]["client 1"]), server.rounds[1]["left_out"]
    assert any(line.startswith("round 1: client 1 was left out, ") for line in said)
    alone = ran(settings(method="average", steps=1, rounds=1), tmp_path / "alone", Local(clients[:1]))
    for name, pair in alone.factors.items():  # type: ignore[union-attr]
        assert torch.equal(pair[0], server.factors[name][0]), "as if it had not been there"  # type: ignore[index]


def test_another_model_and_a_missed_merge_are_noticed(settings: Any, base: Path, tmp_path: Path) -> None:
    chosen = settings(method="flora", steps=1, rounds=3)
    one, two = clients_of(chosen)
    other = Client(str(base / "other"), Share((str(base / "text/a.jsonl"),)), "stranger", 2)
    silent = Odd(one, lambda p: Package({n: v for n, v in p.values.items() if n != "epsilon"}, p.tensors))
    server, link = Server(chosen, tmp_path), Local([silent, two, other])
    server._round(link, train=True)
    assert re.match("it has another base model, with SHA-256", server.rounds[1]["left_out"]["stranger"])
    link.memories[1] = Memory()  # a machine that was replaced
    server._round(link, train=True)
    assert not server.rounds[2]["left_out"], "it gets all merges, because it said before that it had none"
    link.memories[1] = Memory()
    server.run(link)
    assert server.rounds[3]["left_out"] == {"client 1": "it has missed what earlier rounds merged, and gets it next"}
    assert set(server.rounds[3]["losses"]) == {"client 0", "client 1"}, "it is back for the last evaluation"
    with pytest.raises(ValueError, match=r"no client could be used in round 1 \(stranger: it has another base model"):
        ran(chosen, tmp_path / "none", Local([other]))


def test_a_server_cannot_choose_files_of_another_machine(settings: Any, base: Path) -> None:
    """A node of a deployment reads its own text or none; a simulated one reads its part of the run's."""
    package = Package({"settings": settings().to_dict()})
    with pytest.raises(ValueError, match="its SuperNode must be started with its text: --node-config"):
        _client(package, SimpleNamespace(node_config={"partition-id": 1}), False)
    own = _client(package, SimpleNamespace(node_config={"partition-id": 1, "data": "mine.txt", "name": "alice"}), False)
    assert (own.share, own.name, own.index) == (Share(("mine.txt",)), "alice", 1)
    simulated = _client(package, SimpleNamespace(node_config={"partition-id": 1, "num-partitions": 2}), True)
    assert simulated.share == Share((str(base / "text/b.jsonl"),))


# ---- text, and the command


def test_text_is_dealt(base: Path) -> None:
    a, b = (str(base / f"text/{name}.jsonl") for name in "ab")
    assert shares_of_text(str(base / "text"), 2) == [Share((a,)), Share((b,))]
    assert shares_of_text(f"{a},{b}", 1) == [Share((a, b))]
    assert shares_of_text(a, 3) == [Share((a,), i, 3) for i in range(3)]
    with pytest.raises(ValueError, match="a source for each of 3 clients, got 2; use --clients 2"):
        shares_of_text(str(base / "text"), 3)


def test_the_command(base: Path, tmp_path: Path, in_this_process: Callable[..., Any]) -> None:
    flags: list[Any] = ["--data", base / "text", "--clients", 2, "--rounds", 1, "--steps", 1, "--batch-size", 2]
    flags += ["--sequence-length", 16, "--engine", "local", "--out", tmp_path / "out"]
    code, printed, error = in_this_process("federated", base / "base", "--noise", 2, *flags)
    assert code == 0, error
    assert all(word in printed for word in ("client 1", "down", "ε", "after round 1 of 1", "report.html"))
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<svg") == 2 * 2 and "MB sent" in page and "http" not in page.replace("http://www.w3.org", "")
    assert json.loads((tmp_path / "out" / FILE).read_text())["rounds"][1]["loss"] > 0
    code, printed, _ = in_this_process(
        "federated", "--resume", tmp_path / "out", "--rounds", 2, "--engine", "local", "--json"
    )
    assert code == 0 and len(json.loads(printed)["rounds"]) == 3
    (tmp_path / "out/report.html").unlink()
    (base / "text").rename(base / "away")  # a run that has ended, as one of Flower, asks no clients
    code, printed, error = in_this_process("federated", "--resume", tmp_path / "out")
    (base / "away").rename(base / "text")
    assert code == 0 and (tmp_path / "out/report.html").exists(), error
    for more, words in (
        ([*flags], "has a run; go on with it by --resume"),
        (["--resume", tmp_path / "out", "--lr", 1], "goes on with the settings of .*; leave out lr"),
        ([*flags, "--method", "florra"], "unknown rule 'florra'; did you mean 'flora'"),
        ([*flags, "--down", 2], "down must be a number in"),
        ([*flags, "--up", 1e-9], r"up must be at least 1 / [\d,]+, so that a number is sent, got 1e-09"),
        ([*flags, "--method", ""], "unknown rule ''"),
        ([*flags, "--method", "fedpgp"], "fedpgp trains a prompt, .* use the functions of lorank.federated.fedpgp"),
        ([*flags, "--text-column", "x"], r"in round 1 \(client 0: .* has no column 'x'"),
        ([*flags, "--rank", "x"], "rank must be a positive integer, or several with commas, got 'x'"),
        ([*flags, "--rank", "20"], "rank must be at most 16, the width of "),
        ([*flags, "--clients", "3"], "a source for each of 3 clients, got 2"),
        ([], "a model and text must be given"),
    ):
        flags_now = [
            *more,
            *(["--out", tmp_path / "new"] if more and "has a run" not in words and "--resume" not in more else []),
        ]
        code, _, error = in_this_process(
            "federated", *([base / "base"] if more and "--resume" not in more else []), *flags_now
        )
        assert code == 2 and re.search(words, error), (words, error)


def test_without_flower_one_sentence_says_how_to_get_it(
    base: Path, tmp_path: Path, in_this_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    code, _, error = in_this_process(
        "federated", base / "base", "--data", base / "text", "--clients", 2, "--out", tmp_path / "out"
    )
    assert code == 2 and "pip install 'lorank[federated]', or use --engine local" in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ValueError, match=r"'opacus-prv' needs Opacus: pip install 'lorank\[private\]'"):
        epsilon(1.0, 0.1, 10, 1e-5, accountant="opacus-prv")
