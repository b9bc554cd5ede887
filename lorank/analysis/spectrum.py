"""Singular values, and how many of them matter."""

import torch
from torch import Tensor


def rank_leaving(sigma: Tensor, energy: float) -> int:
    """The least number of leading singular values such that the others hold at most `energy`, a sum of squares.

    >>> rank_leaving(torch.tensor([3.0, 2.0, 1.0]), 1.5)
    2
    """
    tails = sigma.double().square().flip(0).cumsum(0)
    return int((tails > energy).sum())


def effective_rank(sigma: Tensor, alpha: float = 0.95) -> int:
    """r(α), from singular values in descending order; 0 for a matrix of zeros.

    >>> effective_rank(torch.tensor([3.0, 1.0, 0.1, 0.0])), effective_rank(torch.ones(4))
    (2, 4)
    """
    return rank_leaving(sigma, (1 - alpha) * float(sigma.double().square().sum()))


def gram_spectrum(gram: Tensor) -> Tensor:
    """Singular values of Y, descending, from YᵀY."""
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt().cpu()


def scaled_difference(now: Tensor, before: Tensor, cross: Tensor) -> tuple[float, Tensor]:
    """β and the Gram matrix of Y_l − β Y_{l−1}, from those of Y_l and Y_{l−1} and from Y_lᵀ Y_{l−1}."""
    energy = before.trace()
    beta = cross.trace() / energy if energy > 0 else torch.zeros_like(energy)
    return float(beta), now - beta * (cross + cross.T) + beta.square() * before


def svdvals(matrix: Tensor) -> Tensor:
    """Singular values in descending order; ValueError if the matrix is not finite."""
    if not matrix.isfinite().all():
        raise ValueError("a weight or its gradient is not finite; the model has diverged, use an earlier checkpoint")
    return torch.linalg.svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float32))).double().cpu()


def feature_rank(features: Tensor, alpha: float = 1.0) -> int:
    """How many directions features Z [n, d] vary in: r(α) of Z minus its mean; scale, rotation and order of rows do not matter.

    With α = 1 it is the rank up to round-off. DeiT-LT (arXiv 2404.02900) compares tokens of a transformer by it.

    Raises:
        ValueError: fewer than two rows, or numbers that are not finite.

    >>> feature_rank(torch.tensor([[3.0, 1.0], [1.0, 1.0], [-1.0, 1.0]]))
    1
    """
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features must be a matrix of two rows or more, got shape {list(features.shape)}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be above 0 and at most 1, got {alpha}")
    if not features.isfinite().all():
        raise ValueError("features must be finite; the model has diverged, use an earlier checkpoint")
    Z = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    sigma = torch.linalg.svdvals(Z - Z.mean(0)).double().cpu()
    below = sigma <= sigma[0] * max(Z.shape) * torch.finfo(Z.dtype).eps  # as torch.linalg.matrix_rank
    return effective_rank(sigma.masked_fill(below, 0.0), alpha)
