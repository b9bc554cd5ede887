"""Newton-Schulz: a matrix with its singular values brought near 1, by products alone.

    X ← M / ‖M‖,  five times  X ← a X + (b X Xᵀ + c (X Xᵀ)²) X        near U Vᵀ of M = U S Vᵀ

    M, X [m, n], m <= n (else transposed)     ‖M‖ Frobenius norm     a, b, c = 3.4445, -4.775, 2.0315

Singular values that were not below 0.005 of the norm end in 0.68 to 1.16. FLOPs: 5 (4 m² n + 2 m³).

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.

The products are in bfloat16 on accelerators, as in torch's Muon, and in single precision on CPUs, which compute bfloat16
15 to 36 times as slowly if they have no instructions for it.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def newton_schulz(M: Tensor, steps: int = STEPS, eps: float = 1e-7) -> Tensor:
    """M [k, m, n], each matrix with singular values near 1, in M's type; 0 where M is 0. `eps` is the least norm to divide by."""
    a, b, c = COEFFICIENTS
    X = M / M.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    wide = X.shape[-2] <= X.shape[-1]
    X = X if wide else X.mT
    for _ in range(steps):
        S = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(S, S, S, beta=b, alpha=c), X, beta=a)  # a X + (b S + c S S) X
    return X if wide else X.mT


def products_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of Muon's products: bfloat16 on accelerators; on CPUs the matrix's, in single precision at least."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else torch.bfloat16


def newton_schulz_flops(m: int, n: int, steps: int = STEPS) -> int:
    """Of Newton-Schulz on [m, n] with the shorter side s and the longer l: steps (4 s² l + 2 s³).

    >>> newton_schulz_flops(20, 3)
    3870
    """
    short, long = min(m, n), max(m, n)
    return steps * (4 * short * short * long + 2 * short**3)
