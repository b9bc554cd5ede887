"""Pure functions on two factors, W ≈ B A: the best ones of a rank for given inputs.

min |(W − B A) X| over A [r, d_in], B [d_out, r];  R Rᵀ = Xᵀ X / n  and  W R = U Σ Vᵀ  give
B = U_r Σ_r^½,  A = Σ_r^½ V_rᵀ R⁻¹,  with the error √(σ²_{r+1} + …), the least that rank r can have
"""

import torch
from torch import Tensor

RIDGE = 1e-6
"""Added to an autocorrelation's diagonal, in units of its mean, if a direction has less because the data do not reach it."""


def whitening(autocorrelation: Tensor) -> Tensor:
    """Lower triangular R [d, d] with R Rᵀ = XᵀX / n [d, d], plus a ridge (`RIDGE`) if that is singular or almost."""
    ridge = RIDGE * autocorrelation.diagonal().mean()
    R, failed = torch.linalg.cholesky_ex(autocorrelation)
    if failed or R.diagonal().square().min() < ridge:
        R = torch.linalg.cholesky(autocorrelation + (ridge or 1.0) * torch.eye(len(R), dtype=R.dtype, device=R.device))
    return R


def truncate(residual: Tensor, R: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The B [d_out, r], A [r, d_in] that make |(residual - B A) R| least; residual [d_out, d_in], R [d_in, d_in] triangular."""
    U, sigma, V = torch.linalg.svd(residual.to(R.dtype) @ R, full_matrices=False)
    root = sigma[:rank].sqrt()
    return U[:, :rank] * root, torch.linalg.solve_triangular(R, root[:, None] * V[:rank], upper=False, left=False)
