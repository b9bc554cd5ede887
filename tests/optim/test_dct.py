"""The cosine basis: its identities, its two ways, its choices, and the byte quantiser."""

import math

import pytest
import torch
from torch import Tensor

from lorank.optim.dct import back, carry, columns, dct_matrix, dequantise, quantise, select, transform

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 63, 64])
def test_the_matrix_is_orthogonal_and_its_first_row_constant(n: int) -> None:
    Q = dct_matrix(n, CPU, torch.float32)
    torch.testing.assert_close(Q @ Q.T, torch.eye(n), atol=2e-6, rtol=0)
    torch.testing.assert_close(Q[0], torch.full((n,), n**-0.5))


def test_each_entry_is_the_formula_s() -> None:
    Q = dct_matrix(5, CPU, torch.float64)
    for i in range(5):
        for j in range(5):
            expected = math.sqrt(2 / 5) * math.cos(math.pi * i * (2 * j + 1) / 10) * (math.sqrt(0.5) if i == 0 else 1)
            assert Q[i, j].item() == pytest.approx(expected)


@pytest.mark.parametrize("n", [8, 9, 31, 32])
@pytest.mark.parametrize("how", ["matmul", "fft"])
def test_both_ways_go_to_the_same_basis(n: int, how: str) -> None:
    A = random(2, 7, n, dtype=torch.float32)
    Q = dct_matrix(n, CPU, torch.float32)
    S = transform(A, how)  # type: ignore[arg-type]
    torch.testing.assert_close(S, A @ Q.T, atol=2e-5, rtol=0)
    assert (S - A @ Q).abs().max() > 0.1


@pytest.mark.parametrize("how", ["matmul", "fft"])
@pytest.mark.parametrize("ell_norm", [1, 2])
def test_energy_is_kept_or_left_out(how: str, ell_norm: float) -> None:
    A = random(3, 20, 12)
    S = transform(A, how)  # type: ignore[arg-type]
    chosen = select(S, 5, ell_norm)
    a = columns(S, chosen)
    left_out = A - back(a, chosen, 12)
    for whole, kept, rest in zip(A, a, left_out, strict=True):
        assert whole.norm() ** 2 == pytest.approx((kept.norm() ** 2 + rest.norm() ** 2).item(), rel=1e-5)


def test_the_largest_2_norms_leave_the_smallest_residual() -> None:
    A = random(20, 12) * torch.linspace(0.2, 2, 12, dtype=torch.float64)

    def residual(chosen: Tensor) -> float:
        S = transform(A)
        return (A - back(columns(S, chosen), chosen, 12)).norm().item()

    by_2, by_1 = (residual(select(transform(A), 4, p)) for p in (2, 1))
    generator = torch.Generator().manual_seed(0)
    others = [residual(torch.randperm(12, generator=generator)[:4]) for _ in range(1000)]
    assert by_2 <= by_1 <= sum(others) / len(others)
    assert by_2 <= min(others) + 1e-12


def test_at_full_rank_nothing_is_left_out() -> None:
    A = random(20, 12)
    chosen = select(transform(A), 12)
    torch.testing.assert_close(back(columns(transform(A), chosen), chosen, 12), A)


def test_carrying_by_gather_is_the_product_with_zeros_and_ones() -> None:
    Q, n, r = dct_matrix(12, CPU, torch.float64), 12, 5
    before, now = (torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(s))[:r] for s in ss])
                   for ss in ((1, 2, 3), (4, 5, 6)))  # fmt: skip
    M = random(3, 20, r)
    carried = carry(M, before, now, n)
    for moment, one, other, result in zip(M, before, now, carried, strict=True):
        R = Q[one] @ Q[other].T
        torch.testing.assert_close(R, R.round(), atol=1e-12, rtol=0)
        assert R.round().sum() == len(set(one.tolist()) & set(other.tolist()))
        torch.testing.assert_close(result, moment @ R, atol=1e-12, rtol=0)
    assert (carry(M.abs(), before, now, n) >= 0).all()


@pytest.mark.parametrize("rows", [random(2, 6, 16), torch.zeros(1, 3, 4), torch.full((1, 2, 5), -3.0)])
def test_a_byte_holds_256_levels_in_their_places(rows: Tensor) -> None:
    codes, low, step = quantise(rows)
    assert codes.dtype == torch.uint8 and codes.shape == rows.shape
    error = (dequantise(codes, low, step) - rows).abs()
    assert (error <= step / 2 * 1.001 + 1e-7).all()
    span = rows.amax(-1, keepdim=True) - rows.amin(-1, keepdim=True)
    torch.testing.assert_close(step.double(), (span / 255).double(), rtol=1e-5, atol=1e-9)
