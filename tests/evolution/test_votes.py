"""Votes against the authors' rule: which weights move, and how the fraction that noise moves falls."""

from typing import Any

import pytest
import torch
from torch import nn

from lorank.evolution.integers import IntegerEggroll
from lorank.evolution.votes import VoteOptimizer, Votes, falling, threshold


def test_thresholds() -> None:
    expected = {10: (0.8696, 2), 100: (0.4, 13), 999: (0.06256, 29), 0: (1.0, 0)}
    for step, (alpha, q) in expected.items():
        assert falling(step, 4) == pytest.approx(alpha, abs=5e-5)
        assert threshold(falling(step, 4)) == q
    schedule = Votes(fall=0.0).schedule(100, 0, 0.1)
    assert [0.25 * schedule(step) for step in (0, 10_000)] == [0.25, 0.25]


def weights_and_votes(votes: list[int], start: int = 0) -> nn.Parameter:
    p = nn.Parameter(torch.full((len(votes),), start, dtype=torch.int8), requires_grad=False)
    p.grad_dtype = torch.int32
    p.grad = torch.tensor(votes, dtype=torch.int32)
    return p


def test_what_votes_move() -> None:
    p = weights_and_votes([5, -5, 0])
    VoteOptimizer([p], lr=1.0, pairs=50).step()
    assert p.tolist() == [1, -1, -1], "at the first step every entry moves, those without a majority down"
    bound = 13 * 7 * 256 // 16  # q = 13 at alpha 0.4, 7 = ⌊√50⌋
    p = weights_and_votes([bound, bound - 1, -bound, 1 - bound, 0])
    VoteOptimizer([p], lr=0.4, pairs=50).step()
    assert p.tolist() == [1, 0, -1, 0, 0]
    for end in (127, -127):
        p = weights_and_votes([10**6 * end], start=end)
        VoteOptimizer([p], lr=0.4, pairs=50).step()
        assert p.tolist() == [end]


def test_alpha_is_the_fraction_moved_by_noise(egg: Any) -> None:
    model = egg(16)
    estimate = IntegerEggroll(model, population=512, group_size=0)
    votes = torch.randint(0, 2, (256,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    A, B = estimate.factors(model.head, range(256))
    p = weights_and_votes([0])
    p = nn.Parameter(torch.zeros_like(model.head), requires_grad=False)
    p.grad_dtype = torch.int32
    p.grad = ((A * votes[:, None]).T @ B).int()
    VoteOptimizer([p], lr=0.4, pairs=256).step()
    assert p.abs().float().mean().item() == pytest.approx(0.4, abs=0.06)


def test_refusals(egg: Any) -> None:
    model = egg(4, layers=1)
    [group] = Votes().parameter_groups(model, [], None, None)
    with pytest.raises(ValueError, match="votes needs pairs of members that vote"):
        Votes().optimizer([group], lr=0.5, betas=(0.9, 0.999), eps=1e-8)
    with pytest.raises(ValueError, match="lr must be a number from 0 to 1 with votes.*, got 2.0; how fast it falls"):
        Votes().optimizer([{**group, "pairs": 2}], lr=2.0, betas=(0.9, 0.999), eps=1e-8)
    with pytest.raises(ValueError, match="votes moves the integer weights of EGG, not those of Linear"):
        Votes().parameter_groups(nn.Linear(2, 2), [], None, None)
    with pytest.raises(ValueError, match="fall must be a number from 0 to 64, got 1000000000.0"):
        Votes(fall=1e9)
    with pytest.raises(ValueError, match="lr must be a number from 0 to 1, got 2.0"):
        VoteOptimizer([nn.Parameter(torch.zeros(2))], lr=2.0, pairs=2)
    with pytest.raises(ValueError, match="pairs must be a positive integer, got 0"):
        VoteOptimizer([nn.Parameter(torch.zeros(2))], lr=0.5, pairs=0)
    with pytest.raises(ValueError, match=r"step\(\) must have no closure"):
        VoteOptimizer([nn.Parameter(torch.zeros(2))], lr=0.5, pairs=2).step(lambda: 0.0)
