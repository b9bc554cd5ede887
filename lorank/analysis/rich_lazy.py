"""Does training change what a network computes with, or only how it reads it out? Initial weights of low rank, and four probes.

    start           W₀⁽ʳ⁾ = s U_r Σ_r V_rᵀ of a matrix W₀ = U Σ Vᵀ, with s such that |W₀⁽ʳ⁾| = |W₀|
    change          |W_T − W₀|_F
    representation  tr(K_T K₀) / |K_T| |K₀|,  K = H Hᵀ        H [N, d] hidden states for N inputs
    tangent kernel  the same with K = J Jᵀ                    J [N, P] gradients of N outputs with respect to P weights
    signs           the share of entries of W that have the same sign before and after

Training is lazy if little changes and both alignments stay near one, and rich if not. A start of low rank and equal Frobenius norm has a
larger spectral norm, so rank and spectral radius change together; `matching="spectral"` keeps the other norm.

Source: Liu et al., "How connectivity structure shapes rich and lazy learning in neural circuits", ICLR 2024, arXiv 2310.08513.
"""

from typing import Literal

import torch
from torch import Tensor

from lorank.layers import wide


def low_rank_start(weight: Tensor, rank: int, matching: Literal["frobenius", "spectral"] = "frobenius") -> Tensor:
    """The nearest matrix of that rank [m, n], rescaled to the norm that the weight has.

    Raises:
        ValueError: rank is not from 1 to min(m, n), or there is no such norm.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank must be from 1 to {min(weight.shape)}, got {rank}")
    if matching not in ("frobenius", "spectral"):
        raise ValueError(f"matching must be 'frobenius' or 'spectral', got {matching!r}")
    U, sigma, Vh = torch.linalg.svd(wide(weight), full_matrices=False)
    scale = 1.0 if matching == "spectral" else sigma.norm() / sigma[:rank].norm()
    return (scale * U[:, :rank] * sigma[:rank] @ Vh[:rank]).to(weight.dtype)


def weight_change(before: Tensor, after: Tensor) -> float:
    """|W_T − W₀|_F."""
    return torch.linalg.vector_norm(wide(after) - wide(before)).item()


def alignment(before: Tensor, after: Tensor) -> float:
    """tr(K_T K₀) / |K_T| |K₀| of K = H Hᵀ, for rows H [N, d] of each; from 0 to 1, and 1 if K_T is a multiple of K₀.

    Rows are hidden states of N inputs, or gradients of N outputs (`tangents`). Nothing of [N, N] is formed.
    """
    one, other = before.double(), after.double()
    norms = torch.linalg.matrix_norm(one.T @ one) * torch.linalg.matrix_norm(other.T @ other)
    return (torch.linalg.matrix_norm(one.T @ other).square() / norms).item()


def tangents(outputs: Tensor, weight: Tensor) -> Tensor:
    """Gradients [N, P] of N outputs, in the order of `outputs.flatten()`, with respect to a weight of P entries."""
    rows = [torch.autograd.grad(one, weight, retain_graph=True)[0].flatten() for one in outputs.flatten()]
    return torch.stack(rows)


def sign_agreement(before: Tensor, after: Tensor) -> float:
    """The share of entries with the same sign; zero counts as a third sign."""
    return (before.sign() == after.sign()).double().mean().item()
