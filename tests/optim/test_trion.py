"""Trion: momentum with error feedback, Newton-Schulz in the subspace, and where it is Muon."""

import pytest
import torch
from torch import nn

from lorank import Trion
from lorank.optim.dct import dct_matrix
from tests.optim.conftest import gradients, made, matrices, run


@pytest.mark.parametrize("shape", [(20, 12), (16, 16)])
@pytest.mark.parametrize("momentum", [0.95, 1.0])
def test_the_equations(shape: tuple[int, int], momentum: float) -> None:
    [p] = matrices(shape)
    W, M = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    optimizer = made(Trion, [{"params": [p], "rank": 4}], lr=0.1, momentum=momentum, weight_decay=0.1)
    Q = dct_matrix(shape[1], torch.device("cpu"), torch.float64)
    for step in range(5):
        G = gradients(step, [p])[0]
        p.grad = G
        optimizer.step()
        B = M + G
        chosen = (B @ Q.T).abs().sum(0).argsort(descending=True)[:4].sort().values
        P = Q[chosen].T
        b = B @ P
        M = momentum * B + (1 - momentum) * (B - b @ P.T)
        U, S, Vt = torch.linalg.svd(b / (b.norm() + 1e-7), full_matrices=False)
        for _ in range(5):  # the polynomial on the singular values
            S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
        W = (1 - 0.1 * 0.1) * W - 0.1 * (shape[0] / shape[1]) ** 0.5 * (U * S) @ Vt @ P.T
        torch.testing.assert_close(optimizer.state[p]["momentum"], M, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(p.detach(), W, rtol=1e-8, atol=1e-8)


def test_with_momentum_one_everything_is_accumulated() -> None:
    [p] = matrices((20, 12))
    optimizer = made(Trion, [{"params": [p], "rank": 4}], lr=0.1, momentum=1.0)
    run(optimizer, [p], range(5))
    torch.testing.assert_close(optimizer.state[p]["momentum"], sum(gradients(s, [p])[0] for s in range(5)))


def test_products_in_bfloat16_err_by_its_precision() -> None:
    moved = []
    for precision in (None, "bfloat16"):
        [p] = [q.detach().float().requires_grad_() for q in matrices((20, 12))]
        before = p.detach().clone()
        p.grad = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
        made(Trion, [{"params": [p], "rank": 4}], lr=0.1, orthonormalise_in=precision).step()
        moved.append(p.detach() - before)
    error = (moved[0] - moved[1]).norm() / moved[0].norm()
    assert 1e-5 < error < 5e-2
    assert moved[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("scale", "length"),
    [("dion", (20 / 12) ** 0.5), ("kj", (20 / 12) ** 0.5), ("kimi", 0.2 * 20**0.5), ("none", 1.0)],
)
def test_lengths_of_the_update(scale: str, length: float) -> None:
    moved = []
    for name in (scale, "none"):
        [p] = matrices((20, 12))
        before = p.detach().clone()
        run(made(Trion, [{"params": [p], "rank": 4}], lr=0.1, scale=name), [p], range(1))  # type: ignore[arg-type]
        moved.append(p.detach() - before)
    torch.testing.assert_close(moved[0], length * moved[1])


def test_other_parameters_follow_adamw_at_its_own_rate() -> None:
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    trion = made(Trion, [ours], lr=0.02, adamw_lr=3e-4)
    adamw = torch.optim.AdamW([theirs], lr=3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (trion, adamw)]
    for step in range(4):
        ours.grad = theirs.grad = torch.arange(5.0) - step
        trion.step()
        adamw.step()
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(ours, theirs)


def test_refusals() -> None:
    for momentum in (float("nan"), -5.0, 1.5):
        with pytest.raises(ValueError, match="momentum must be a number from 0 to 1, got"):
            Trion(momentum=momentum)
    with pytest.raises(ValueError, match="momentum must be a number from 0 to 1, got 2"):
        made(Trion, [{"params": matrices((12, 20)), "rank": 2, "momentum": 2}])
    with pytest.raises(ValueError, match="scale must be 'dion', .* or 'none', got 'muon'"):
        Trion(scale="muon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="orthonormalise_in must be 'bfloat16', .* or None, got 'int8'"):
        Trion(orthonormalise_in="int8")  # type: ignore[arg-type]
