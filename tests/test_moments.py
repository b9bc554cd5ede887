"""What optimizers remember: moments are told from counters and bases, for every optimizer that a hook may meet."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank.layers import exchange
from lorank.moments import moments, prune, prune_, restart
from lorank.optim.apollo import APOLLO
from lorank.optim.dct_adamw import DCTAdamW
from lorank.optim.fira import Fira
from lorank.optim.galore import GaLore
from lorank.optim.plain import Muon
from lorank.optim.trion import Trion

TORCH: dict[str, tuple[dict[str, Any], int]] = {
    "Adadelta": ({}, 2),
    "Adafactor": ({}, 2),
    "Adagrad": ({"initial_accumulator_value": 0.5}, 1),
    "Adam": ({}, 2),
    "AdamW": ({"amsgrad": True}, 3),
    "Adamax": ({}, 2),
    "Muon": ({}, 1),
    "NAdam": ({}, 2),
    "RAdam": ({}, 2),
    "RMSprop": ({"momentum": 0.5, "centered": True}, 3),
    "Rprop": ({}, 2),
    "SGD": ({"momentum": 0.9}, 1),
}
"""Optimizers of torch, with settings and how many moments they keep for a matrix."""
REFUSED = {"ASGD", "LBFGS", "SparseAdam"}
"""The last one moves sparse gradients alone."""
BYTES_OR_NOT: dict[str, tuple[dict[str, Any], int]] = {
    "AdEMAMix": ({}, 2),
    "AdamW": ({}, 2),
    "Adagrad": ({}, 1),
    "LAMB": ({}, 2),
    "LARS": ({"momentum": 0.9}, 1),
    "Lion": ({}, 1),
    "RMSprop": ({}, 1),
}
"""Likewise, of bitsandbytes."""


def torchs(name: str, parameter: Tensor, **settings: Any) -> Any:
    return getattr(torch.optim, name)([parameter], **{"lr": 0.1, **settings})


def projected(method: Any, parameter: Tensor, rank: int = 2) -> Any:
    return method.optimizer([{"params": [parameter], "rank": rank}], lr=0.1)


OPTIMIZERS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    **{name: (partial(torchs, name, **given), count) for name, (given, count) in TORCH.items()},
    "plain sgd": (lambda p: torch.optim.SGD([p]), 0),
    "muon": (lambda p: Muon().optimizer([{"params": [p], "rule": "muon"}], lr=0.1), 1),
    "galore": (partial(projected, GaLore()), 2),
    "galore, square basis": (partial(projected, GaLore(), rank=6), 2),
    "fira": (partial(projected, Fira()), 2),
    "apollo": (partial(projected, APOLLO()), 2),
    "dct-adamw, error": (partial(projected, DCTAdamW(error_feedback="full")), 3),
    "dct-adamw, error in bytes": (partial(projected, DCTAdamW(error_feedback="8bit")), 4),
    "trion": (partial(projected, Trion()), 1),
}
"""How to make each, and how many moments it keeps for a matrix."""


def a_step(parameter: nn.Parameter, optimizer: Any, seed: int = 0) -> None:
    torch.manual_seed(seed)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(6, 8), (6, 6)])
def test_moments_become_zero_and_the_rest_stays(name: str, shape: tuple[int, int]) -> None:
    make, count = OPTIMIZERS[name]
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = make(parameter)
    assert moments(optimizer, parameter) == [] or name == "Adagrad"
    a_step(parameter, optimizer)
    found = moments(optimizer, parameter)
    assert len(found) == count
    assert all(moment.any() for moment in found)
    kept = {n: v.clone() for n, v in optimizer.state[parameter].items() if n in ("left", "right")}
    assert len(kept) == name.startswith(("galore", "fira"))
    for moment in found:
        moment.zero_()
    state = optimizer.state[parameter]
    assert all(torch.equal(state[n], basis) and basis.any() for n, basis in kept.items())
    assert all(int(state[n]) == 1 for n in ("step", "steps") if n in state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_restart_the_next_step_is_a_first_one(name: str) -> None:
    make, _ = OPTIMIZERS[name]
    old, new = (nn.Parameter(torch.ones(6, 8)) for _ in range(2))
    optimizer = make(old)
    for seed in (1, 2, 3):
        a_step(old, optimizer, seed)
    restart(optimizer, old)
    with torch.no_grad():
        old.fill_(1)
    fresh = make(new)
    for _ in range(2):
        a_step(old, optimizer)
        a_step(new, fresh)
        torch.testing.assert_close(old, new)


def test_every_optimizer_of_torch_is_examined_or_refused() -> None:
    assert {name for name in torch.optim.__all__ if name[0].isupper()} - {"Optimizer"} == {*TORCH, *REFUSED}


@pytest.mark.parametrize("name", ["ASGD", "LBFGS"])
def test_a_memory_without_a_known_beginning_is_refused(name: str) -> None:
    parameter = nn.Parameter(torch.ones(6, 8))
    optimizer = getattr(torch.optim, name)([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step(lambda: parameter.sum())
    with pytest.raises(
        ValueError, match=f"{name} must keep .* it keeps 'ax'|remember each parameter by itself.*{name}"
    ):
        moments(optimizer, parameter)


def test_a_first_step_without_dampening_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(6, 8))
    optimizer = torchs("SGD", parameter, momentum=0.9, dampening=0.5)
    a_step(parameter, optimizer)
    with pytest.raises(ValueError, match="^dampening must be 0, .* got 0.5 in SGD$"):
        restart(optimizer, parameter)


@pytest.mark.parametrize("name", BYTES_OR_NOT)
def test_optimizers_of_bitsandbytes_begin_anew(name: str) -> None:
    given, count = BYTES_OR_NOT[name]
    made = getattr(pytest.importorskip("bitsandbytes").optim, name)
    old, new = (nn.Parameter(torch.ones(16, 16)) for _ in range(2))
    optimizer, fresh = (made([p], lr=0.1, **given) for p in (old, new))
    for seed in (1, 2):
        a_step(old, optimizer, seed)
    assert len(moments(optimizer, old)) == count
    restart(optimizer, old)
    with torch.no_grad():
        old.fill_(1)
    for _ in range(2):
        a_step(old, optimizer)
        a_step(new, fresh)
        torch.testing.assert_close(old, new)


@pytest.mark.parametrize("how", ["zero", "random"])
@pytest.mark.parametrize(("name", "entry", "start"), [("Rprop", "step_size", 0.1), ("Adagrad", "sum", 0.5)])
def test_pruned_entries_go_back_to_their_start(name: str, entry: str, start: float, how: Any) -> None:
    parameter = nn.Parameter(torch.ones(6, 8))
    optimizer = torchs(name, parameter, **TORCH[name][0])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)  # the rate is 0 at a restart
    for seed in (1, 2):
        a_step(parameter, optimizer, seed)
    optimizer.param_groups[0]["lr"] = 0.0
    before = optimizer.state[parameter][entry].clone()
    prune(optimizer, parameter, how, 0.5, torch.Generator().manual_seed(0))
    after = optimizer.state[parameter][entry]
    reset = after != before
    assert (after[reset] == start).all() and reset.any() and (how == "random") == bool((~reset).any())


def test_an_optimizer_of_another_kind_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(6, 8))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"step": 3, "bytes": torch.zeros(6, 8, dtype=torch.uint8)}
    with pytest.raises(
        ValueError, match="SGD must keep its moments as floating-point tensors.*got the state bytes, step"
    ):
        moments(optimizer, parameter)


@pytest.mark.parametrize(
    ("how", "ratio", "kept"),
    [("zero", 0.5, 0), ("random", 0.999, 0.001), ("random", 0.8, 0.2), ("magnitude", 0.9, 0.1)],
)
def test_pruning_keeps_the_same_entries_of_all_moments(how: Any, ratio: float, kept: float) -> None:
    pruned = [torch.randn(400, 500, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    before = [moment.clone() for moment in pruned]
    prune_(pruned, how, ratio, torch.Generator().manual_seed(1))
    stays = pruned[0] != 0
    assert torch.equal(pruned[1] != 0, stays)
    assert all(torch.equal(now[stays], then[stays]) for now, then in zip(pruned, before, strict=True))
    if how == "magnitude":
        assert stays.sum() == 20_000
        assert before[0][stays].abs().min() > before[0][~stays].abs().max()
    else:
        assert stays.float().mean().item() == pytest.approx(kept, rel=0.15)


def test_a_second_exchange_restores_the_first() -> None:
    a, b = torch.arange(8.0).view(2, 4), torch.arange(10.0, 16).view(2, 3)
    copies, i, j = (a.clone(), b.clone()), torch.tensor([0, 3]), torch.tensor([2, 1])
    exchange(a, b, i, j)
    assert a[:, 0].tolist() == [12, 15] and b[:, 1].tolist() == [3, 7]
    exchange(a, b, i, j)
    assert torch.equal(a, copies[0]) and torch.equal(b, copies[1])
