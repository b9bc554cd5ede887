"""Weights in bfloat16 that are rounded by chance: small steps add up, for matrices with a rank and for the rest."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lorank import AdamW, DCTAdamW, Fira, GaLore, Muon, Trion
from lorank.optim.stochastic import rounded


def test_the_mean_is_exact_and_neighbours_are_taken() -> None:
    V = torch.randn(50, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([rounded(V, seed) for seed in range(4000)]).float()
    step = V.abs().log2().floor().exp2() * 2**-7
    assert ((drawn - V).abs() < step).all()
    assert ((drawn.mean(dim=0) - V).abs() < 5 * step / 4000**0.5).all()
    exact = V.bfloat16().float()
    assert torch.equal(rounded(exact, 3).float(), exact)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.3895e38, 0.0, 1e-45])
    assert torch.equal(rounded(odd, 0).isfinite(), odd.bfloat16().isfinite())


def decayed(method: Any, steps: int = 60) -> list[float]:
    """What weight decay of 1e-3 a step leaves of 1, for a matrix and a vector, and whether it resumes."""
    make = lambda params: method.optimizer(  # noqa: E731
        [{"params": params[:1], "weight_decay": 1.0, **({"rank": 4} if hasattr(method, "rank") else {"rule": "muon"})},
         {"params": params[1:], "weight_decay": 1.0, "rank": None}], lr=1e-3,
    )  # fmt: skip
    params = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)), nn.Parameter(torch.ones(4096).bfloat16())]
    optimizer = make(params)

    def run(params: list[nn.Parameter], optimizer: Any) -> None:
        for _ in range(steps // 2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()

    run(params, optimizer)
    again = copy.deepcopy(params)
    other = make(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(params, optimizer)
    run(again, other)
    assert all(map(torch.equal, params, again))
    assert all(t.dtype == torch.bfloat16 for t in optimizer.state[params[1]].values() if t.ndim)
    return [p.detach().float().mean().item() for p in params]


@pytest.mark.parametrize("kind", [GaLore, Fira, DCTAdamW, Trion, Muon, AdamW])
def test_small_steps_add_up(kind: Any) -> None:
    assert decayed(kind()) == [1.0, 1.0], "rounded to the nearest they are lost"
    assert decayed(kind(stochastic_rounding=True)) == pytest.approx([0.999**60] * 2, abs=2e-3)


def test_it_changes_nothing_in_single_precision() -> None:
    ends = []
    for option in (False, True):
        p = nn.Parameter(torch.ones(6, 4))
        optimizer = GaLore(stochastic_rounding=option).optimizer([{"params": [p], "rank": 2}], lr=0.1)
        p.grad = torch.arange(24.0).view(6, 4)
        optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)
