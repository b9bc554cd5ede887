"""What optimizers remember: moments are told from counters and bases, for every optimizer that a hook may meet."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank.layers import exchange
from lorank.moments import moments, prune_, restart
from lorank.optim.galore import GaLore
from lorank.optim.plain import Muon

OPTIMIZERS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "adamw": (lambda p: torch.optim.AdamW([p]), 2),
    "amsgrad": (lambda p: torch.optim.AdamW([p], amsgrad=True), 3),
    "muon of torch": (lambda p: torch.optim.Muon([p]), 1),
    "adafactor": (lambda p: torch.optim.Adafactor([p]), 2),
    "sgd": (lambda p: torch.optim.SGD([p], momentum=0.9), 1),
    "plain sgd": (lambda p: torch.optim.SGD([p]), 0),
    "rmsprop": (lambda p: torch.optim.RMSprop([p]), 1),
    "muon": (lambda p: Muon().optimizer([{"params": [p], "rule": "muon"}], lr=0.1), 1),
    "galore": (lambda p: GaLore().optimizer([{"params": [p], "rank": 2}], lr=0.1), 2),
    "galore, square basis": (lambda p: GaLore().optimizer([{"params": [p], "rank": 6}], lr=0.1), 2),
}
"""How to make each, and how many moments it keeps for a matrix."""


def a_step(parameter: nn.Parameter, optimizer: Any) -> None:
    torch.manual_seed(0)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(6, 8), (6, 6)])
def test_moments_become_zero_and_the_rest_stays(name: str, shape: tuple[int, int]) -> None:
    make, count = OPTIMIZERS[name]
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = make(parameter)
    assert moments(optimizer, parameter) == []
    a_step(parameter, optimizer)
    found = moments(optimizer, parameter)
    assert len(found) == count
    assert all(moment.any() for moment in found)
    kept = {n: v.clone() for n, v in optimizer.state[parameter].items() if n in ("left", "right")}
    assert len(kept) == name.startswith("galore")
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
    a_step(old, optimizer)
    restart(optimizer, old)
    with torch.no_grad():
        old.fill_(1)
    a_step(old, optimizer)
    a_step(new, make(new))
    torch.testing.assert_close(old, new)


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
