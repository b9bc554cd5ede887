"""APOLLO against its equations by hand, the statistics of its sketch, and its limiter; all of it from the paper's text."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank import APOLLO, APOLLOMini
from lorank.method import seeded_generator
from lorank.optim.apollo import limited, scaled, sketch
from tests.optim.conftest import gradients, made, matrices, run

EXACT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9}


def test_the_first_step_scales_columns_by_their_sketch() -> None:
    """Without ε Adam's first step is the sign of R, so each column of R̃ has the length √r."""
    [p] = matrices((3, 4))
    start, [G] = p.detach().clone(), gradients(0, [p])
    optimizer = made(APOLLO, [{"params": [p], "rank": 2}], lr=0.1, eps=0.0)
    run(optimizer, [p], range(1))
    P = sketch(int(optimizer.state[p]["seed"]), 0, 2, 3).double()
    R = P @ G
    expected = torch.stack([2**0.5 / R[:, j].norm() * G[:, j] for j in range(4)], dim=1)
    torch.testing.assert_close((start - p) / 0.1, expected, **EXACT)


def by_hand(W: Tensor, grads: list[Tensor], r: int, T: int, *, seed: int, mini: bool, alpha: float) -> Tensor:
    M, V, last = 0.0, 0.0, math.inf
    for t, G in enumerate(grads):
        R = sketch(seed, t // T, r, G.shape[0]).double() @ G
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R * R
        A = M / (1 - 0.9 ** (t + 1)) / ((V / (1 - 0.999 ** (t + 1))) ** 0.5 + 1e-8)
        D = alpha * G * (A.norm() / R.norm() if mini else A.norm(dim=0) / R.norm(dim=0))
        if D.norm() > 1.01 * last:
            D = D * 1.01 * last / D.norm()
        last = D.norm().item()
        W = W - 0.02 * D - 0.02 * 0.1 * W
    return W


@pytest.mark.parametrize("mini", [False, True])
def test_the_equations_over_refreshes(mini: bool) -> None:
    [p] = matrices((12, 20))
    start = p.detach().clone()
    kind, r, alpha = (APOLLOMini, 1, 128**0.5) if mini else (APOLLO, 4, 1.0)
    group = {"params": [p], "rank": r, "update_gap": 3, "weight_decay": 0.1}
    optimizer = made(kind, [group], lr=0.02)
    run(optimizer, [p], range(8))
    seed = int(optimizer.state[p]["seed"])
    expected = by_hand(start, [gradients(s, [p])[0] for s in range(8)], r, 3, seed=seed, mini=mini, alpha=alpha)
    torch.testing.assert_close(p.detach(), expected, **EXACT)


@pytest.mark.parametrize("part", [1 / 8, 1 / 4, 1 / 2])
def test_a_sketch_of_r_rows_scales_by_the_root_of_r_over_m(part: float) -> None:
    """Moments of twenty independent gradients, in the sketch and in full."""
    m, n = 256, 600
    r = int(part * m)
    generator = torch.Generator().manual_seed(0)
    P = sketch(1, 0, r, m).double()
    M, V = (
        [torch.zeros(m, n).double(), torch.zeros(r, n).double()],
        [torch.zeros(m, n).double(), torch.zeros(r, n).double()],
    )
    for _ in range(20):
        G = torch.randn(m, n, generator=generator, dtype=torch.float64)
        both = (G, P @ G)
        M = [0.9 * old + 0.1 * new for old, new in zip(M, both, strict=True)]
        V = [0.999 * old + 0.001 * new**2 for old, new in zip(V, both, strict=True)]
    full, ours = ((a / b**0.5).norm(dim=0) / X.norm(dim=0) for a, b, X in zip(M, V, both, strict=True))
    assert (ours / full).median().item() == pytest.approx(part**0.5, rel=0.03)


def test_mini_is_apollo_of_one_row_with_a_pooled_norm() -> None:
    ours, theirs = matrices((12, 20)), matrices((12, 20))
    run(made(APOLLOMini, [{"params": ours, "rank": 1}], lr=0.1), ours, range(4))
    same = {"scale": 128**0.5, "scaling": "matrix"}
    run(made(APOLLO, [{"params": theirs, "rank": 1}], lr=0.1, **same), theirs, range(4))
    assert torch.equal(ours[0], theirs[0])
    G, R = torch.randn(1, 3, 4), torch.tensor([[[3.0, 0.0, 4.0, 0.0]]])
    torch.testing.assert_close(scaled(G, R, R.sign(), columns=False), G * 2**0.5 / 5)


@pytest.mark.parametrize(("kind", "r"), [(APOLLO, 4), (APOLLOMini, 1)])
def test_state_is_two_moments_of_the_sketch_and_two_numbers(kind: Any, r: int) -> None:
    parameters = matrices((12, 20), (20, 12), (16, 16))
    optimizer = made(kind, [{"params": parameters, "rank": r}], lr=0.1)
    run(optimizer, parameters, range(2))
    for p, state in optimizer.state.items():
        kept = sum(value.numel() for name, value in state.items() if name not in ("step", "steps"))
        assert kept == 2 * r * max(p.shape) + 2


def test_a_spike_lengthens_a_step_by_a_hundredth() -> None:
    [p] = matrices((12, 20))
    optimizer = made(APOLLO, [{"params": [p], "rank": 4}], lr=1.0)
    moved = []
    for step in range(53):
        before, [G] = p.detach().clone(), gradients(step, [p])
        p.grad = 100 * G if step == 51 else G
        optimizer.step()
        moved.append((p.detach() - before).norm().item())
    assert moved[51] == pytest.approx(1.01 * moved[50], rel=1e-9)
    shrunk = limited(torch.ones(2, 2, 2), torch.tensor([-1.0, 1.0]), 1.01).norm(dim=(-2, -1))
    torch.testing.assert_close(shrunk, torch.tensor([2.0, 1.01]))


def test_the_limiter_may_be_left_out() -> None:
    [p] = matrices((12, 20))
    optimizer = made(APOLLO, [{"params": [p], "rank": 4}], lr=1.0, growth=None)
    run(optimizer, [p], range(1))
    assert "norm" not in optimizer.state[p]
    with pytest.raises(ValueError, match="growth must be a number of at least 1 or None, got 0.5"):
        APOLLO(growth=0.5)


def test_a_gradient_of_zero_does_not_limit_the_next() -> None:
    moved = []
    for growth in (1.01, None):
        [p] = matrices((12, 20))
        optimizer = made(APOLLO, [{"params": [p], "rank": 4}], lr=1.0, growth=growth)
        for size in (0.0, 1.0):
            p.grad = size * gradients(0, [p])[0]
            optimizer.step()
        moved.append(p.detach())
    torch.testing.assert_close(*moved, rtol=0.0, atol=0.0)


def test_a_transposed_problem_takes_the_transposed_step_exactly() -> None:
    [wide] = matrices((12, 20))
    tall = nn.Parameter(wide.detach().T.contiguous())
    one, other = (made(APOLLO, [{"params": [p], "rank": 4, "update_gap": 2}], lr=0.1) for p in (wide, tall))
    for step in range(4):
        wide.grad = gradients(step, [wide])[0]
        tall.grad = wide.grad.T.contiguous()
        one.step()
        other.step()
    assert torch.equal(wide, tall.T)


def test_each_refresh_draws_a_sketch_by_seed_and_place() -> None:
    parameters = matrices((12, 20), (12, 20))
    optimizer = made(APOLLO, [{"params": parameters, "rank": 4}], lr=0.1)
    run(optimizer, parameters, range(1))
    seeds = [int(optimizer.state[p]["seed"]) for p in parameters]
    assert seeds == [seeded_generator(0, place).initial_seed() for place in range(2)]
    drawn = [sketch(seed, refresh, 4, 12) for seed in seeds for refresh in range(2)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(drawn[1], sketch(seeds[0], 1, 4, 12))
    assert sketch(0, 0, 64, 4096).var().item() == pytest.approx(1 / 64, rel=0.02)


@pytest.mark.parametrize("kind", [APOLLO, APOLLOMini])
def test_columns_and_matrices_of_zeros_do_no_harm(kind: Any) -> None:
    for eps in (0.0, 1e-8):
        [p] = matrices((12, 20), dtype=torch.float32)
        optimizer = made(kind, [{"params": [p], "rank": 1}], lr=0.01, eps=eps)
        for size in (0.0, 1.0, 1e-30, 0.0, 1.0):
            p.grad = size * gradients(0, [p])[0]
            p.grad[:, 3] = 0
            before = p.detach().clone()
            optimizer.step()
            assert p.isfinite().all()
            assert torch.equal(p[:, 3], before[:, 3])
            assert size > 0 or torch.equal(p, before)


def test_the_size_of_gradients_does_not_matter() -> None:
    one, other = matrices((12, 20)), matrices((12, 20))
    run(made(APOLLO, [{"params": one, "rank": 4}], lr=0.1, eps=0.0), one, range(4))
    run(made(APOLLO, [{"params": other, "rank": 4}], lr=0.1, eps=0.0), other, range(4), sign=10.0)
    torch.testing.assert_close(one[0], other[0], rtol=1e-10, atol=1e-10)
