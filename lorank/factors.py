"""Pure functions on two factors, W = B A, and the best factors of a matrix.

A pair is (B [m, r], A [r, n]), or many of equal shape in leading dimensions. No function forms the product [m, n], but `merge`,
whose result it is. What the functions decompose is r x r, after a QR of either factor:

    B = Q_B R_B    Aᵀ = Q_A R_A    R_B R_Aᵀ = U₀ Σ V₀ᵀ    so that    B A = (Q_B U₀) Σ (Q_A V₀)ᵀ

The arithmetic is in single precision or better, and results have the pair's dtype. Factors may be DTensors, on which all processes of
their mesh call the function together; torch gathers what it decomposes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from lorank.layers import wide

Pair = tuple[Tensor, Tensor]
"""B [m, r] and A [r, n]."""
RIDGE = 1e-6
"""Added to an autocorrelation's diagonal, in units of its mean, if a direction has less because the data do not reach it."""


# ---- the same product, written differently


def svd(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], Σ [k] descending, Vᵀ [k, n] of B A, k = min(m, r, n), in single precision or better.

    The columns of U and rows of Vᵀ are orthonormal even where Σ is zero.
    """
    B, A = _checked(pair)
    Q_B, R_B = torch.linalg.qr(wide(B))
    Q_A, R_A = torch.linalg.qr(wide(A).mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def orthogonalise(pair: Pair) -> Pair:
    """The same product with A Aᵀ = I and orthogonal columns in B, longest first: (U Σ, Vᵀ). A is orthonormal even if B is zero."""
    U, S, Vh = svd(pair)
    return _as(pair, U * S[..., None, :], Vh)


def balance(pair: Pair) -> Pair:
    """The same product with Bᵀ B = A Aᵀ = Σ: (U Σ^½, Σ^½ Vᵀ). Of all ways to write it, this has the least |A|² + |B|²."""
    U, S, Vh = svd(pair)
    root = S.sqrt()
    return _as(pair, U * root[..., None, :], root[..., None] * Vh)


# ---- fewer and more ranks


def truncate(pair: Pair, rank: int) -> Pair:
    """The balanced pair of that many ranks, or min(m, r, n) if that is less, whose product is nearest to B A in the Frobenius norm.

    Raises:
        ValueError: rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    B, A = balance(pair)
    return B[..., :rank].contiguous(), A[..., :rank, :].contiguous()


def prune(pair: Pair, keep: Tensor) -> Pair:
    """The ranks that `keep` names: indices, or one bool for each."""
    B, A = _checked(pair)
    keep = keep.full_tensor() if isinstance(keep, DTensor) else keep
    if keep.dtype == torch.bool:
        if keep.shape != A.shape[-2:-1]:
            raise ValueError(f"keep must have one bool for each of the {A.shape[-2]} ranks, got {list(keep.shape)}")
        keep = keep.nonzero().flatten()
    return B.index_select(-1, _beside(keep, B)), A.index_select(-2, _beside(keep, A))


def grow(pair: Pair, ranks: int, *, generator: torch.Generator | None = None) -> Pair:
    """So many new ranks after the old ones, with the same product: rows of A Kaiming-uniform as LoRA's, columns of B zero.

    Args:
        generator: of the device on which A is; of a DTensor's processes, the first one's counts.
    """
    B, A = _checked(pair)
    bound = A.shape[-1] ** -0.5
    rows = torch.empty(*A.shape[:-2], ranks, A.shape[-1], dtype=A.dtype, device=A.device)
    rows.uniform_(-bound, bound, generator=generator)
    columns = torch.zeros_like(B[..., :1].expand(*B.shape[:-1], ranks))
    return torch.cat([B, columns], -1), torch.cat([A, _beside(rows, A)], -2)


# ---- several pairs


def stack(pairs: Sequence[Pair], weights: Sequence[float] | None = None) -> Pair:
    """One pair whose product is Σ_i w_i B_i A_i, exactly, of rank Σ_i r_i; the ranks may differ. Default: w_i = 1.

    The weights are on the A_i alone: on both factors they would count twice.
    """
    pairs, weights = _weighted(pairs, [1.0] * len(pairs) if weights is None else weights)
    return (
        torch.cat([B for B, _ in pairs], -1),
        torch.cat([w * A for w, (_, A) in zip(weights, pairs, strict=True)], -2),
    )


def mean(pairs: Sequence[Pair], weights: Sequence[float] | None = None) -> Pair:
    """The mean of the B_i and the mean of the A_i, one by one; ranks must be equal. Weights are divided by their sum p_i = w_i / Σ w.

    Its product is the mean of the products only where all A_i or all B_i are equal. Otherwise it lacks the covariance
    Σ_i p_i (B_i − B̄)(A_i − Ā). `truncate(stack(pairs, p), r)` is the best pair of rank r for the mean of the products.
    """
    pairs, weights = _weighted(pairs, [1.0] * len(pairs) if weights is None else weights)
    total = sum(weights)
    if not total > 0 or min(weights) < 0:
        raise ValueError(f"weights must be at least 0 and have a positive sum, got {list(weights)}")
    if len({A.shape for _, A in pairs}) > 1:
        raise ValueError(
            f"pairs must have equal ranks for a mean of the factors, got {[A.shape[-2] for _, A in pairs]}; use stack"
        )

    def average(tensors: Sequence[Tensor]) -> Tensor:
        found = wide(tensors[0]) * (weights[0] / total)
        for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
            found = found + wide(tensor) * (weight / total)
        return found.to(tensors[0].dtype)

    return average([B for B, _ in pairs]), average([A for _, A in pairs])


def merge(weight: Tensor, pair: Pair, scale: float = 1.0) -> Tensor:
    """W + s B A [m, n], rounded once to the dtype of W."""
    B, A = _checked(pair)
    return (wide(weight) + scale * (wide(B) @ wide(A))).to(weight.dtype)


# ---- from a matrix


def whitening(autocorrelation: Tensor) -> Tensor:
    """Lower triangular R [d, d] with R Rᵀ = XᵀX / n [d, d], plus a ridge (`RIDGE`) if that is singular or almost."""
    ridge = RIDGE * autocorrelation.diagonal().mean()
    R, failed = torch.linalg.cholesky_ex(autocorrelation)
    if failed or R.diagonal().square().min() < ridge:
        R = torch.linalg.cholesky(autocorrelation + (ridge or 1.0) * torch.eye(len(R), dtype=R.dtype, device=R.device))
    return R


def nearest(weight: Tensor, rank: int, R: Tensor | None = None) -> Pair:
    """The B [m, r], A [r, n] that make |(W − B A) R| least; R [n, n] is lower triangular, and None is the identity.

    With R Rᵀ = XᵀX / n this is the error on inputs X:  W R = U Σ Vᵀ,  B = U_r Σ_r^½,  A = Σ_r^½ V_rᵀ R⁻¹,  and the error
    √(σ²_{r+1} + …) is the least that rank r can have. B and A have the dtype of R, or of W in single precision or better.
    """
    target = wide(weight) if R is None else weight.to(R.dtype) @ R
    U, sigma, Vh = torch.linalg.svd(target, full_matrices=False)
    root = sigma[:rank].sqrt()
    B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return B, A if R is None else torch.linalg.solve_triangular(R, A, upper=False, left=False)


# ---- checks


def _checked(pair: Pair) -> Pair:
    B, A = pair
    if B.ndim < 2 or B.ndim != A.ndim or B.shape[-1] != A.shape[-2] or B.shape[:-2] != A.shape[:-2]:
        raise ValueError(f"a pair must be B [m, r] and A [r, n], got {list(B.shape)} and {list(A.shape)}")
    return pair


def _weighted(pairs: Sequence[Pair], weights: Sequence[float]) -> tuple[Sequence[Pair], Sequence[float]]:
    if not pairs or len(weights) != len(pairs):
        raise ValueError(f"there must be one weight for each pair, and a pair, got {len(weights)} and {len(pairs)}")
    shapes = {(B.shape[:-1], A.shape[:-2] + A.shape[-1:]) for B, A in map(_checked, pairs)}
    if len(shapes) > 1:
        raise ValueError(f"pairs must have products of one shape, got {[[B.shape[-2], A.shape[-1]] for B, A in pairs]}")
    return pairs, weights


def _beside(values: Tensor, of: Tensor) -> Tensor:
    """The values, all of them on each process of `of` if that is a DTensor; those of the first process count."""
    if not isinstance(of, DTensor):
        return values
    return distribute_tensor(values, of.device_mesh, [Replicate()] * of.device_mesh.ndim)


def _as(pair: Pair, B: Tensor, A: Tensor) -> Pair:
    return B.to(pair[0].dtype), A.to(pair[1].dtype)
