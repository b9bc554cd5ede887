"""Factors of which A, or both, have no negative entries: semi-NMF and NMF by multiplicative updates.

    W ≈ B A,  A ≥ 0     B by least squares     A ← A ⊙ √( (H⁺ + P⁻ A S⁺ + P⁺ A S⁻) / (H⁻ + P⁺ A S⁺ + P⁻ A S⁻) )
    P = Bᵀ B   S = R Rᵀ   H = Bᵀ W S     X⁺ and X⁻ the positive and negative parts of X

This lowers |(W − B A) R|; with R = I it is the update of Ding et al. for semi-NMF. If W and B have no negative entries and R = I, so have
all, and NMF moves B in the same way.

Source: Cahyawijaya, "Greenformers", arXiv 2108.10808, uses 10 iterations of both; the updates are those of Ding, Li and Jordan, "Convex and
Semi-Nonnegative Matrix Factorizations", IEEE TPAMI 2010. The metric in the update is ours.
"""

import torch
from torch import Tensor

from lorank.factors import Pair, nearest

ITERATIONS = 10


def moved(A: Tensor, H: Tensor, P: Tensor, S: Tensor | None) -> Tensor:
    """A ≥ 0 [r, n] that does not raise tr(P A S Aᵀ) − 2 tr(H Aᵀ); P [r, r] and S [n, n] positive semi-definite, None is I."""
    plus, minus = P.clamp(min=0) @ A, (-P).clamp(min=0) @ A
    if S is not None:
        high, low = S.clamp(min=0), (-S).clamp(min=0)
        plus, minus = plus @ high + minus @ low, minus @ high + plus @ low
    tiny = torch.finfo(A.dtype).tiny
    return A * ((H.clamp(min=0) + minus) / ((-H).clamp(min=0) + plus).clamp(min=tiny)).sqrt()


def semi_nmf(weight: Tensor, rank: int, R: Tensor | None = None, iterations: int = ITERATIONS) -> Pair:
    """B [m, r] of any sign and A [r, n] without negative entries, with |(W − B A) R| small. The start is that of the SVD, |A|."""
    W = weight.to(R.dtype) if R is not None else weight
    S = None if R is None else R @ R.mT
    A = nearest(W, rank, R)[1].abs() + 1e-3
    onto = W if S is None else W @ S

    def solved(A: Tensor) -> Tensor:
        gram = A @ (A if S is None else A @ S).mT
        ridge = 1e-10 * gram.diagonal().mean() * torch.eye(rank, dtype=A.dtype, device=A.device)
        return torch.linalg.solve(gram + ridge, A @ onto.mT).mT

    for _ in range(iterations):
        B = solved(A)
        A = moved(A, B.mT @ onto, B.mT @ B, S)
    return solved(A), A


def nmf(weight: Tensor, rank: int, iterations: int = ITERATIONS) -> Pair:
    """B [m, r] and A [r, n], both without negative entries.

    Raises:
        ValueError: the matrix has a negative entry, as almost all trained ones have.
    """
    if weight.min() < 0:
        raise ValueError(
            f"a matrix must have no negative entries for solver 'nmf', got {weight.min():.3g}; use 'semi-nmf'"
        )
    B, A = (one.abs() + 1e-3 for one in nearest(weight, rank))
    for _ in range(iterations):
        A = moved(A, B.mT @ weight, B.mT @ B, None)
        B = moved(B.mT, A @ weight.mT, A @ A.mT, None).mT
    return B, A
