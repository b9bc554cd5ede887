"""The rules against torch's and bitsandbytes' own optimizers, alone and inside a subspace."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank import Adafactor, AdamW8bit, DCTAdamW, GaLore, Muon
from lorank.optim.rules import RULES
from tests.optim.conftest import gradients, made, matrices, net, run, train


def apart(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim == 1]


def identity(G: Tensor, rank: int) -> Tensor:
    return torch.eye(G.shape[1], dtype=G.dtype).expand(len(G), -1, -1)


class Both:
    """Two optimizers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def test_muon_and_adamw_together_equal_the_two_apart(as_torchs_muon: None) -> None:
    together, separate = net(), net()
    matrix, vector = apart(together)
    one = made(Muon, [{"params": matrix, "rule": "muon"}, {"params": vector}], lr=0.01, weight_decay=0.1)
    matrix, vector = apart(separate)
    muon = torch.optim.Muon(matrix, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    other = Both(muon, torch.optim.AdamW(vector, lr=0.01, weight_decay=0.1))
    train(together, one, range(5))
    train(separate, other, range(5))
    for p, q in zip(together.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", ["kj", "dion", "none"])
def test_muons_scaling_is_the_length_of_an_update(scaling: str, as_torchs_muon: None) -> None:
    """torch has "kj" as "original"; the others differ from it by a factor of each shape, and decay is the same."""
    shapes = [(12, 20), (20, 5), (16, 16), (12, 20)]
    ours, theirs = matrices(*shapes), matrices(*shapes)
    run(made(Muon, [{"params": ours, "rule": "muon"}], lr=0.1, weight_decay=0.5, scaling=scaling), ours, range(1))
    run(torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="original"), theirs, range(1))
    for p, q, start in zip(ours, theirs, matrices(*shapes), strict=True):
        m, n = p.shape
        length = {"kj": 1.0, "dion": min(1.0, m / n) ** 0.5, "none": max(1.0, m / n) ** -0.5}[scaling]
        torch.testing.assert_close(p, 0.95 * start + length * (q - start), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="scaling must be 'dion', 'kj', 'kimi' or 'none', got 'rms'"):
        made(Muon, [{"params": ours, "rule": "muon", "scaling": "rms"}], lr=0.1)


def test_what_adamw_moves_may_have_a_rate_of_its_own() -> None:
    matrix, vector = apart(net())
    groups = [{"params": matrix, "rule": "muon"}, {"params": vector}]
    assert [g["lr"] for g in made(Muon, groups, lr=0.05, adamw_lr=0.003).param_groups] == [0.05, 0.003]
    assert [g["lr"] for g in made(Muon, groups, lr=0.05).param_groups] == [0.05, 0.05]


def test_adafactor_is_torchs() -> None:
    ours, theirs = net(), net()
    train(ours, made(Adafactor, ours.parameters(), lr=0.01, weight_decay=0.1), range(5))
    train(theirs, torch.optim.Adafactor(theirs.parameters(), lr=0.01, weight_decay=0.1), range(5))
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_adamw_without_rank_is_torchs() -> None:
    ours, theirs = net(), net()
    train(ours, made(DCTAdamW, ours.parameters(), lr=0.01, weight_decay=0.1), range(5))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1), range(5))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_8_bit_adamw_is_that_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, theirs = (matrices((70, 80), (20, 12), dtype=torch.float32) for _ in range(2))
    run(made(AdamW8bit, ours, lr=0.01, weight_decay=0.1), ours, range(5))
    run(bitsandbytes.optim.AdamW8bit(theirs, lr=0.01, weight_decay=0.1), theirs, range(5))
    assert all(map(torch.equal, ours, theirs))


def test_small_moments_of_8_bit_adamw_have_32_and_are_adamws() -> None:
    pytest.importorskip("bitsandbytes")
    ours, theirs = (matrices((60, 90), dtype=torch.float32) for _ in range(2))  # R [40, 90]: 3,600 numbers
    run(made(GaLore, [{"params": ours, "rank": 40}], lr=0.01, rule="adamw-8bit"), ours, range(5))
    run(made(GaLore, [{"params": theirs, "rank": 40}], lr=0.01), theirs, range(5))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)


def test_large_moments_have_a_byte_and_stay_near() -> None:
    pytest.importorskip("bitsandbytes")
    ours, theirs = (matrices((128, 160), dtype=torch.float32) for _ in range(2))
    optimizer = made(GaLore, [{"params": ours, "rank": 64}], lr=0.01, rule="adamw-8bit")
    run(optimizer, ours, range(5))
    run(made(GaLore, [{"params": theirs, "rank": 64}], lr=0.01), theirs, range(5))
    state = optimizer.state[ours[0]]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    moved = (theirs[0] - matrices((128, 160), dtype=torch.float32)[0]).norm()
    assert ((ours[0] - theirs[0]).norm() / moved).item() < 0.1


@pytest.mark.parametrize("missing", [AdamW8bit(), GaLore(rule="adamw-8bit")])
def test_without_bitsandbytes_the_way_out_is_named(missing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    p = matrices((12, 20), dtype=torch.float32)
    with pytest.raises(ImportError, match="install it with: pip install bitsandbytes"):
        run(missing.optimizer([{"params": p}], lr=0.01), p, range(1))


def test_adafactor_goes_by_the_size_of_the_weights() -> None:
    moved = []
    for size in (1.0, 100.0):
        [p] = matrices((12, 20))
        p.data *= size
        before = p.detach().clone()
        run(made(GaLore, [{"params": [p], "rank": 3}], lr=0.01, rule="adafactor"), [p], range(1))
        moved.append((p - before).norm())
    torch.testing.assert_close(moved[1], 100 * moved[0])


def test_adafactors_eps_of_each_group_reaches_it() -> None:
    ours, theirs = net(), net()
    group = {"params": apart(ours)[0][:1], "rank": 12, "scale": 1.0, "eps": (None, 10.0)}
    one = made(GaLore, [group], lr=0.01, rule="adafactor", basis=identity)
    other = torch.optim.Adafactor(apart(theirs)[0][:1], lr=0.01, eps=(None, 10.0), weight_decay=0.0)
    for model, optimizer in ((ours, one), (theirs, other)):
        train(model, optimizer, range(3))
    torch.testing.assert_close(ours[0].weight, theirs[0].weight, rtol=1e-9, atol=1e-9)


def test_muon_inside_leaves_vectors_to_torchs_adamw() -> None:
    model, theirs = net(), net()
    matrix, vector = apart(model)
    optimizer = made(GaLore, [{"params": matrix, "rank": 3}, {"params": vector}], lr=0.0, rule="muon", eps=0.1)
    optimizer.param_groups[1]["lr"] = 0.01
    train(model, optimizer, range(3))
    train(theirs, torch.optim.AdamW(apart(theirs)[1], lr=0.01, eps=0.1, weight_decay=0.0), range(3))
    torch.testing.assert_close(model[0].bias, theirs[0].bias, rtol=1e-12, atol=1e-12)
    assert [sorted(optimizer.state[p]) for p in (matrix[0], vector[0])] == [
        ["momentum_buffer", "right", "steps"],
        ["exp_avg", "exp_avg_sq", "step"],
    ]


def test_momentum_is_that_of_the_method_or_the_group() -> None:
    [p], [q] = matrices((4, 4)), matrices((4, 4))
    optimizer = made(
        Muon, [{"params": [p], "rule": "muon"}, {"params": [q], "rule": "muon", "momentum": 0.5}], lr=0.1, momentum=0.8
    )
    assert [group["momentum"] for group in optimizer.param_groups] == [0.8, 0.5]
    run(optimizer, [p], range(1))
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], (1 - 0.8) * gradients(0, [p])[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(12, 20), (70, 80), (20,), (3, 4, 5)])
def test_bytes_and_kept_names(rule: str, shape: tuple[int, ...]) -> None:
    if rule == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    for dtype in (torch.float32, torch.bfloat16):
        state = RULES[rule].make(torch.empty(shape, dtype=dtype))
        kept = {name: value for name, value in state.items() if name != "step"}
        assert RULES[rule].owns(state) and kept.keys() <= set(RULES[rule].kept)
        assert sum(v.numel() * v.element_size() for v in kept.values()) == RULES[rule].bytes(shape, dtype.itemsize)
