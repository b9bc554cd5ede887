"""Muon by its equations, whatever the type of its products, and Newton-Schulz against a decomposition."""

import pytest
import torch
from torch import nn

from lorank import Muon
from lorank.optim.newton_schulz import newton_schulz
from tests.optim.conftest import gradients, made, matrices, run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_the_equations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The polynomial on singular values that a decomposition has found, in float64."""
    [p] = matrices(shape, dtype=dtype)
    optimizer = made(Muon, [{"params": [p], "rule": "muon"}], lr=0.1, weight_decay=0.1)
    W, M = p.detach().clone().double(), torch.zeros(shape, dtype=torch.float64)
    for step in range(5):
        G = gradients(step, [p])[0].double()
        run(optimizer, [p], range(step, step + 1))
        M = 0.95 * M + 0.05 * G
        U, S, Vt = torch.linalg.svd(G + 0.95 * (M - G), full_matrices=False)
        S = S / S.norm()
        for _ in range(5):
            S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
        W = (1 - 0.1 * 0.1) * W - 0.1 * 0.2 * max(shape) ** 0.5 * (U * S) @ Vt
    exact = 1e-9 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(p.detach().double(), W, rtol=exact, atol=exact)


def test_matrices_of_one_shape_move_as_each_alone() -> None:
    """Stacked or one at a time: in one product, in two (what fits into a stack), and with others between them."""
    shapes = [(300, 300), (12, 20), (300, 300), (12, 20), (300, 300), (12, 20)]
    together = matrices(*shapes, dtype=torch.float32)
    run(made(Muon, [{"params": together, "rule": "muon"}], lr=0.1), together, range(2))
    alone = matrices(*shapes, dtype=torch.float32)
    optimizers = [made(Muon, [{"params": [p], "rule": "muon"}], lr=0.1) for p in alone]
    for step in range(2):
        for p, gradient, optimizer in zip(alone, gradients(step, alone), optimizers, strict=True):
            p.grad = gradient
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 20), (20, 5), (16, 16)])
def test_in_bfloat16_it_is_torchs(shape: tuple[int, int], as_torchs_muon: None) -> None:
    ours, theirs = (nn.ParameterList(matrices(shape, shape, dtype=torch.float32)) for _ in range(2))
    run(made(Muon, [{"params": list(ours), "rule": "muon"}], lr=0.1, weight_decay=0.1), list(ours), range(3))
    run(torch.optim.Muon(theirs, lr=0.1, adjust_lr_fn="match_rms_adamw"), list(theirs), range(3))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_zero_gradient_moves_nothing() -> None:
    [p] = matrices((12, 20))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    made(Muon, [{"params": [p], "rule": "muon"}], lr=0.1).step()
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=0)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    S = torch.logspace(-1.9, 0, 12, dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(n, 12, dtype=torch.float64)).Q for n in (40, 12))
    for x in (S, S.flip(0)):
        b = (U * x) @ V.T
        found = torch.linalg.svdvals(newton_schulz(b[None])[0])
        assert (x / b.norm()).min() > 0.005
        assert found.max() < 1.16
        assert found.min() > 0.68
    torch.testing.assert_close(newton_schulz(b.T[None]), newton_schulz(b[None]).mT)
