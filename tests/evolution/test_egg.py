"""EGG against its specification, written out in Python's own integers one number at a time."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorank.evolution.egg import log_likelihood
from lorank.evolution.egg_model import EggConfig, EggForCausalLM
from lorank.evolution.integers import IntegerEggroll
from lorank.evolution.noise import deal
from lorank.evolution.votes import VoteOptimizer

Vector = list[int]


class Reference:
    """One member with sign s of one pair; noise maps a parameter to the pair's (A, B), or is empty."""

    def __init__(self, model: EggForCausalLM, noise: dict[nn.Parameter, tuple[Vector, Vector]], s: int, sig: int):
        self.model, self.noise, self.s, self.shift = model, noise, s, 4 + sig

    @staticmethod
    def clip(v: Vector) -> Vector:
        return [max(-127, min(127, x)) for x in v]

    def product(self, x: Vector, M: nn.Parameter) -> Vector:
        y = [sum(m * u for m, u in zip(row, x, strict=True)) for row in M.tolist()]
        if M in self.noise:
            A, B = self.noise[M]
            h = sum(u * b for u, b in zip(x, B, strict=True))
            y = [v + ((h * a * self.s) >> self.shift) for v, a in zip(y, A, strict=True)]
        return self.clip([v // (16 * math.isqrt(len(x))) for v in y])

    def vector(self, v: nn.Parameter) -> Vector:
        if v not in self.noise:
            return v.tolist()
        both = zip(v.tolist(), *self.noise[v], strict=True)
        return self.clip([x + ((a * b * self.s) >> self.shift) for x, a, b in both])

    def norm(self, x: Vector, w: nn.Parameter) -> Vector:
        mav = max(sum(map(abs, x)) // len(x), 1)
        return self.clip([u * v // mav for u, v in zip(x, self.vector(w), strict=True)])

    def add(self, *vectors: Vector) -> Vector:
        return self.clip([sum(v) for v in zip(*vectors, strict=True)])

    def logits(self, ids: Vector) -> list[Vector]:
        """They go on from `self.states`, and leave them."""
        model: Any = self.model
        D = model.config.hidden_size
        states = getattr(self, "states", [[0] * D for _ in model.layers])
        found = []
        for t in ids:
            if t == 0:
                states = [[0] * D for _ in model.layers]
            x = model.embedding[t].tolist()
            if model.embedding in self.noise:
                A, B = self.noise[model.embedding]
                x = self.clip([u + ((A[t] * b * self.s) >> self.shift) for u, b in zip(x, B, strict=True)])
            for i, layer in enumerate(model.layers):
                s, u = states[i], self.norm(x, layer.ln1)
                f = self.add(self.product(u, layer.wf), self.product(s, layer.uf), self.vector(layer.bf))
                p = [((a + 127) * b) >> 8 for a, b in zip(f, s, strict=True)]
                h = self.add(self.product(u, layer.wh), self.product(p, layer.uh), self.vector(layer.bh))
                states[i] = [b + (((a + 127) * (c - b)) >> 8) for a, b, c in zip(f, s, h, strict=True)]
                x = self.add(x, states[i])
                u = self.norm(x, layer.ln2)
                x = self.add(x, self.product(self.product(u, layer.m1), layer.m2))
            found.append(self.product(self.norm(x, model.ln), model.head))
        self.states = states
        return found

    def fitness(self, ids: Vector) -> int:
        exp2 = [int(16 * 2 ** (i / 16)) for i in range(256)]
        total = 0
        for logits, t in zip(self.logits(ids[:-1]), ids[1:], strict=True):
            total += logits[t] + 128 - int(16 * math.log2(sum(exp2[x + 128] for x in logits) / 16))
        return total


IDS = [0, 65, 200, 13, 0, 0, 255, 1, 66, 66]


@pytest.mark.parametrize("D", [8, 12, 16])
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_the_forward_pass_is_that_of_pythons_integers(D: int, spread: float, egg: Any) -> None:
    model = egg(D, spread=spread)
    logits = torch.stack(list(model.logits(torch.tensor([IDS]))), dim=2)[0, 0]
    assert logits.tolist() == Reference(model, {}, 0, 0).logits(IDS)
    assert model.fitness(torch.tensor([[IDS]]), {})[0].item() == Reference(model, {}, 0, 0).fitness(IDS)


@pytest.mark.parametrize(("sig", "spread"), [(4, 1.0), (0, 6.0)])
def test_members_and_votes_are_those_of_pythons_integers(sig: int, spread: float, egg: Any) -> None:
    """Fitness of each member one by one, and Z as the sum over pairs, also where values are clipped all over."""
    model = egg(8, spread=spread)
    estimate = IntegerEggroll(model, population=6, sig=sig, group_size=2, carry=False, chunk=4, seed=3)
    drawn = {p: [f.int().tolist() for f in estimate.factors(p, range(3))] for p in model.parameters()}
    rows = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(1))
    found = estimate(rows)
    Z: dict[nn.Parameter, Any] = dict.fromkeys(model.parameters(), 0)
    for k in range(3):
        noise = {p: (A[k], B[k]) for p, (A, B) in drawn.items()}
        f = [Reference(model, noise, s, sig).fitness(rows[k].tolist()) for s in (1, -1)]
        assert [x / 8 for x in f] == pytest.approx(found[2 * k : 2 * k + 2].tolist())
        F = (f[0] > f[1]) - (f[0] < f[1])
        for p, (A, B) in noise.items():
            if p is model.embedding:
                A = [a if byte in rows[k, :-1] else 0 for byte, a in enumerate(A)]
            Z[p] = Z[p] + F * (
                torch.outer(*map(torch.tensor, (A, B))) if p.ndim == 2 else torch.tensor(A) * torch.tensor(B)
            )
    assert found.unique().numel() > 3
    for p, votes in Z.items():
        assert p.grad is not None and p.grad.dtype == torch.int32
        assert torch.equal(p.grad.long(), votes)


@pytest.mark.parametrize("group_size", [2, 0])
def test_states_and_last_bytes_are_carried_from_batch_to_batch(group_size: int, egg: Any) -> None:
    """Each member goes on in its own states, with the noise and the weights of the step: over three batches, of which the second
    begins a document in the middle."""
    model = egg(8)
    estimate = IntegerEggroll(model, population=4, group_size=group_size, chunk=2, seed=3)
    optimizer = VoteOptimizer(model.parameters(), lr=0.5, pairs=2)
    rows = torch.randint(1, 256, (2, 15), generator=torch.Generator().manual_seed(1))
    rows[1, 7] = 0
    seen = [[0], [0], [1], [1]] if group_size else [[0, 1]] * 4  # which rows a member reads
    members = [[Reference(model, {}, 1 - 2 * (i % 2), 4) for _ in seen[i]] for i in range(4)]
    for step in range(3):
        drawn = {p: [f.int().tolist() for f in estimate.factors(p, range(2))] for p in model.parameters()}
        expected = []
        for i, (readers, own) in enumerate(zip(members, seen, strict=True)):
            for reader, row in zip(readers, own, strict=True):
                reader.noise = {p: (A[i // 2], B[i // 2]) for p, (A, B) in drawn.items()}
                before = [0, *rows[row].tolist()]
                expected.append(reader.fitness(before[5 * step : 5 * step + 6]))
        found = estimate(rows[:, 5 * step : 5 * step + 5]) * 5 * len(seen[0])
        assert found.tolist() == pytest.approx(torch.tensor(expected).view(4, -1).sum(1).tolist())
        optimizer.step()
    assert estimate.left["states"].dtype == torch.int8
    states = torch.tensor([[reader.states for reader in readers] for readers in members])  # [member, row, layer, D]
    assert torch.equal(estimate.left["states"].long(), states.view(2, -1, 2, 8).transpose(1, 2))
    with pytest.raises(ValueError, match="a batch of 4 rows cannot continue one of 2; use carry=False"):
        estimate(torch.ones(4, 5, dtype=torch.long))


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile calls a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_is_the_same_to_the_last_bit(egg: Any) -> None:
    rows = torch.randint(0, 256, (2, 4), generator=torch.Generator().manual_seed(1))
    grads = []
    for compile in (False, True):
        model = egg(16, layers=1, spread=3.0)
        estimate = IntegerEggroll(model, population=4, compile=compile)
        for _ in range(2):
            fitness = estimate(rows)
        grads.append([fitness, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]
    assert grads[0][0].unique().numel() > 2


def test_parameters_are_counted_and_int8_at_every_step(egg: Any) -> None:
    big = EggConfig(hidden_size=256, num_hidden_layers=6)
    with torch.device("meta"):
        assert sum(p.numel() for p in EggForCausalLM(big).parameters()) == 4_856_064
    model = egg(8)
    assert sum(p.numel() for p in model.parameters()) == 513 * 8 + 2 * (4 * 8 + 12 * 64)
    with torch.no_grad():
        model.head[:, :4] = 120
    estimate, optimizer = IntegerEggroll(model, population=4), VoteOptimizer(model.parameters(), lr=1.0, pairs=2)
    for _ in range(30):
        before = [p.clone() for p in model.parameters()]
        estimate(torch.randint(0, 256, (2, 4)))
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert p.dtype == torch.int8 and p.int().abs().max() <= 127
            assert (p.int() - old.int()).abs().max() <= 1
    assert any((p.abs() == 127).any() for p in model.parameters()), "some came to the end of the range"


def test_log_likelihood() -> None:
    assert log_likelihood(torch.zeros(256), torch.tensor(7)).item() == -8 * 16
    logits = torch.randint(-127, 128, (50, 256), generator=torch.Generator().manual_seed(0)).float()
    target = torch.arange(50)
    exact = (logits * math.log(2) / 16).log_softmax(-1).gather(1, target[:, None])[:, 0] / math.log(2)
    assert (log_likelihood(logits, target) / 16 - exact).abs().max() < 1 / 16 + 0.02
    assert log_likelihood(torch.full((256,), 127.0), torch.tensor(0)).item() == 255 - int(
        16 * (math.log2(1004_119 * 16))
    )


def test_pairs_and_groups_see_their_rows() -> None:
    batch = torch.arange(6)[:, None].expand(6, 5)
    assert deal(batch, 12, 4)(range(2, 10))[:, :, 0].tolist() == [[0, 1]] * 2 + [[2, 3]] * 4 + [[4, 5]] * 2
    assert deal(batch, 12, 0)(range(4, 6))[:, :, 0].tolist() == [list(range(6))] * 2
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 4 groups of members, got 6"):
        deal(batch, 8, 2)


def test_chunks_change_nothing(egg: Any) -> None:
    rows = torch.randint(0, 256, (4, 6), generator=torch.Generator().manual_seed(1))
    grads = []
    for chunk in (2, 6, 8):
        model = egg()
        estimate = IntegerEggroll(model, population=8, chunk=chunk)
        estimate(rows)
        estimate(rows)
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))  # type: ignore[arg-type]


def test_saving_loading_and_writing(tmp_path: Path, egg: Any) -> None:
    model = egg()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is EggForCausalLM
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert q.dtype == torch.int8 and torch.equal(p, q), name
    start = torch.tensor([[0, 65]])
    out = loaded.generate(start, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = start
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


def test_loading_without_having_named_the_model(tmp_path: Path, fresh_python: Any, egg: Any) -> None:
    egg().save_pretrained(tmp_path)
    program = """
        import sys, lorank
        assert "torch" not in sys.modules
        from transformers import AutoModelForCausalLM
        print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
    """
    assert fresh_python(program, str(tmp_path)).split()[-1] == "EggForCausalLM"


def test_loss_is_that_of_its_logits_and_padding_is_masked(egg: Any) -> None:
    model = egg()
    ids = torch.tensor([IDS, IDS])
    labels = ids.clone()
    labels[1, 5:] = -100
    out = model(ids, labels=labels)
    log_p = out.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    expected = -(log_p[0].sum() + log_p[1, :4].sum()) / 13
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="use padding on the right"):
        model(ids, attention_mask=torch.tensor([[1] * 10, [0] + [1] * 9]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 512}, "hidden_size must be an integer from 1 to 260, got 512"),
        ({"hidden_size": 0}, "hidden_size must be an integer from 1 to 260, got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"vocab_size": 300}, "vocab_size must be 256, because EGG reads bytes, got 300"),
    ],
)
def test_shapes_that_cannot_be_built(changes: dict[str, int], message: str) -> None:
    config: Any = AutoConfig.for_model("lorank_egg")
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        EggForCausalLM(config)


def test_the_auto_classes_build_it() -> None:
    config = AutoConfig.for_model("lorank_egg", hidden_size=8, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    assert type(model) is EggForCausalLM and all(p.dtype == torch.int8 for p in model.parameters())
    with pytest.raises(ValueError, match="hidden_size must be"):
        EggConfig(hidden_size=512)


def test_the_size_of_the_noise_is_a_power_of_two(egg: Any) -> None:
    with pytest.raises(ValueError, match="sig must be an integer from 0 to 27, got -1"):
        IntegerEggroll(egg(), population=4, sig=-1)


def test_narrow_models_are_not_compiled(egg: Any) -> None:
    with pytest.raises(ValueError, match="hidden_size must be at least 16 if compile is true, got 8"):
        IntegerEggroll(egg(8), population=4, compile=True)


def noise_key(estimate: IntegerEggroll, p: nn.Parameter) -> Tensor:
    return torch.cat(estimate.factors(p, range(4)), dim=1)


def test_noise_is_int8_and_depends_on_the_epoch_only(egg: Any) -> None:
    model = egg(16)
    estimate = IntegerEggroll(model, population=8)
    first = noise_key(estimate, model.head)
    assert torch.equal(first, first.to(torch.int8).float())
    assert first.std().item() == pytest.approx(15.5, rel=0.1)
    estimate.epoch = 1
    assert not torch.equal(noise_key(estimate, model.head), first)
    estimate.epoch = 0
    assert torch.equal(noise_key(estimate, model.head), first)
