"""A fixed orthogonal basis that costs nothing to find: the discrete cosine transform, and the choice of r of its vectors.

    Q[i, j] = √(2/n) cos(π i (2 j + 1) / (2 n)),  row 0 times √½        rows are the basis vectors (DCT-II), Q Qᵀ = I
    S = A Qᵀ                                                            each row of A in that basis
    I = indices of the r columns of S with the largest norms,  a = S[:, I],  A ≈ a Q[I]

    A, S [m, n]     Q [n, n]     a [m, r]

Because Q is orthogonal, ‖A‖² = ‖a‖² + ‖A - a Q[I]‖²: the columns of largest 2-norm leave the smallest residual. A short
side on the left is reached by transposing. Q is shared by all matrices of a size.

Source: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models", arXiv
2505.17967; Makhoul, "A fast cosine transform in one and two dimensions", IEEE TASSP 28 (1980).

Departures from the authors' code. Both ways to S use the same basis (theirs: rows of Q by FFT, columns by product). One Q
per size, not one for all.
"""

import functools
import math
from typing import Literal

import torch
from torch import Tensor

Transform = Literal["matmul", "fft"]


@torch.compiler.disable  # which would compute it again at each call
def dct_matrix(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Q [n, n], computed in float64 and cast; kept for the next call."""
    return _dct_matrix(n, device, dtype)


def forget_matrices() -> None:
    """Let go of every Q that is kept; those of tensors without data must not outlive the mode they were made in."""
    _dct_matrix.cache_clear()


@functools.lru_cache(maxsize=16)
def _dct_matrix(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    Q = math.sqrt(2 / n) * torch.cos(math.pi * i * (2 * j + 1) / (2 * n))
    Q[0] *= math.sqrt(0.5)
    return Q.to(device, dtype)


def transform(A: Tensor, how: Transform = "matmul") -> Tensor:
    """S = A Qᵀ of A [..., m, n]: a product in O(m n²), or Makhoul's FFT of n points in O(m n log n)."""
    n = A.shape[-1]
    if how == "matmul":
        return A @ dct_matrix(n, A.device, A.dtype).T
    rows = A.float() if A.dtype in (torch.bfloat16, torch.float16) else A
    F = torch.fft.rfft(
        torch.cat([rows[..., 0::2], rows[..., 1::2].flip(-1)], dim=-1)
    )  # n // 2 + 1 points; the others mirror them
    k = torch.arange(n // 2 + 1, device=A.device, dtype=rows.dtype)
    w = torch.polar(torch.full_like(k, math.sqrt(2 / n)), -math.pi * k / (2 * n))
    w[0] *= math.sqrt(0.5)
    z = torch.view_as_real(F * w)
    return torch.cat([z[..., 0], -z[..., 1 : (n + 1) // 2, 1].flip(-1)], dim=-1).to(A.dtype)


def transform_flops(m: int, n: int, how: Transform = "matmul") -> int:
    """FLOPs of the matrix product of `transform` on A [m, n]; an FFT is none, and its own operations are left out."""
    return 2 * m * n * n if how == "matmul" else 0


def select(S: Tensor, rank: int, ell_norm: float = 1) -> Tensor:
    """I [..., r], ascending: the columns of S [..., m, n] with the largest norms."""
    scores = torch.linalg.vector_norm(S.float(), ord=ell_norm, dim=-2)
    return scores.topk(rank, dim=-1).indices.sort(dim=-1).values


def columns(S: Tensor, chosen: Tensor) -> Tensor:
    """S[..., :, I] for I [..., r]."""
    return S.gather(-1, chosen[..., None, :].expand(*S.shape[:-1], -1))


def vectors(chosen: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Q[I], [..., r, n]."""
    return dct_matrix(n, chosen.device, dtype)[chosen]


def some_columns(A: Tensor, chosen: Tensor, how: Transform = "matmul") -> Tensor:
    """(A Qᵀ)[..., :, I]: by a product with r vectors in O(m n r), or of the FFT, which gives all columns at once."""
    return A @ vectors(chosen, A.shape[-1], A.dtype).mT if how == "matmul" else columns(transform(A, how), chosen)


def back(a: Tensor, chosen: Tensor, n: int) -> Tensor:
    """a Q[I], [..., m, n]."""
    return a @ vectors(chosen, n, a.dtype)


def carry(moment: Tensor, before: Tensor, now: Tensor, n: int) -> Tensor:
    """A moment [..., m, r] moved from the columns `before` to the columns `now` [..., r]; new ones start at 0.

    It is M Q[I'] Q[I]ᵀ, whose r x r matrix has a single 1 for each index that stays: no product is needed.
    """
    place = torch.full((*before.shape[:-1], n), -1, device=before.device)
    place.scatter_(-1, before, torch.arange(before.shape[-1], device=before.device).expand_as(before))
    source = place.gather(-1, now)
    return columns(moment, source.clamp(min=0)).masked_fill((source < 0)[..., None, :], 0)


# ---- a matrix in a byte per number


def quantise(E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes [..., m, n], and lowest value and step of each row [..., m, 1] in fp32: 256 levels."""
    low, high = E.float().aminmax(dim=-1, keepdim=True)
    step = (high - low) / 255
    codes = ((E - low) / step.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(0, 255)
    return codes.to(torch.uint8), low, step


def dequantise(codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
    return low + step * codes
