"""Server and clients in Flower, where it is installed: pip install 'lorank[federated]'."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorank.federated.exchange import Package
from lorank.federated.flower import Grid, apps, flower, package_of, record_of, simulate
from lorank.federated.local import Local, clients_of
from lorank.federated.server import Server
from lorank.federated.settings import Settings
from lorank.train.data.tokenizers import byte_tokenizer

pytest.importorskip("flwr")


def test_packages_pass_through_flowers_records() -> None:
    tensors = {"a.B": torch.randn(3, 2), "places": torch.tensor([1, 5], dtype=torch.int32), "none": torch.zeros(0, 4)}
    package = Package({"do": "train", "losses": [1.5, None]}, tensors)
    found = package_of(record_of(package))
    assert found.values == package.values and found.bytes == package.bytes
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors[name], tensor) and found.tensors[name].dtype == tensor.dtype


def test_a_node_that_is_gone_is_told_from_one_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's server answers in its place, with its own number."""

    class Fake:
        def push_messages(self, messages: Any) -> list[str]:
            return [f"to {one.dst_node_id}" for one in messages if one.dst_node_id != 9]

        def pull_messages(self, waiting: Any) -> list[Any]:
            about = SimpleNamespace(reply_to_message_id="to 7", src_node_id=1)
            gone = SimpleNamespace(reason="Error: Node Unavailable - no heartbeat")
            return [SimpleNamespace(metadata=about, has_error=lambda: True, error=gone)] if "to 7" in waiting else []

    monkeypatch.setattr(flower().app, "Message", SimpleNamespace)  # Flower's own needs a run
    settings = Settings(model="m", data="d", timeout=0.3)
    link = Grid(Fake(), settings)
    found = link.ask({node: Package({"do": "train"}) for node in (7, 8, 9)}, "round 1")
    assert found[7] == "Error: Node Unavailable - no heartbeat" and found[8] == "it did not answer within 0.3 seconds"
    assert found[9] == "Flower could not send it the message"
    link.stopped.set()
    with pytest.raises(KeyboardInterrupt):
        link.ask({8: Package({"do": "train"})}, "round 2")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # files and processes that Ray leaves to Python's end
def test_the_engine_computes_what_one_process_does(tmp_path: Path) -> None:
    """Client 1 fails in the second round, and client 2's process ends in the third."""
    tokenizer = byte_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(2000)))
    given: dict[str, Any] = {"model": str(tmp_path / "base"), "data": str(tmp_path / "text.txt"), "clients": 3}
    settings = Settings(**given, rounds=3, rank="4", steps=2, sequence_length=16, eval_tokens=200, timeout=400.0)
    _, usual = apps(settings, tmp_path / "flower", repeatable=True)
    flwr = flower()
    failing = flwr.clientapp.ClientApp()

    def answer(message: Any, context: Any) -> Any:
        round, index = package_of(message.content).values.get("round"), context.node_config["partition-id"]
        if message.metadata.message_type == "train" and (round, index) == (1, 1):
            raise RuntimeError("no room left")
        if message.metadata.message_type == "train" and (round, index) == (2, 2):
            os._exit(1)
        return usual(message, context)

    failing.train()(answer)
    failing.evaluate()(answer)
    failing.query()(answer)
    found: list[Server] = []

    def run(server: Server, link: Any) -> None:
        server.run(link)
        found.append(server)

    simulate(settings, tmp_path / "flower", run, print, failing)
    rounds = found[0].rounds
    assert rounds[1]["left_out"] == {} and rounds[2]["left_out"] == {"client 1": "no room left"}
    assert "client 2" in rounds[3]["left_out"], "and whoever is sent to the dead process after that"
    assert rounds[-1]["losses"]
    whole = Server(settings, tmp_path / "local")
    whole._round(Local(clients_of(settings)), train=True)
    assert rounds[0]["losses"] == whole.rounds[0]["losses"], "bit for bit"
    for name, pair in whole.merged[0].items():
        assert all(torch.equal(a, b) for a, b in zip(pair, found[0].merged[0][name], strict=True))
