"""Muon: momentum of matrices with its singular values brought near 1; AdamW for all other parameters.

    W ← (1 - lr λ) W - lr s NS₅(N)        N = G + μ (M - G),  in detail:

    M ← μ M + (1 - μ) G
    X ← N / ‖N‖,  five times  X ← a X + (b X Xᵀ + c (X Xᵀ)²) X        NS₅(N), which is near U Vᵀ of N = U S Vᵀ
    s = 0.2 √max(m, n)        or another of `SCALES`

    W, G, M, N, X [m, n], m <= n (else transposed)     a, b, c = 3.4445, -4.775, 2.0315     μ 0.95     λ weight decay

With this s an update has the root mean square of AdamW's, so that one learning rate and one weight decay serve both.

Saves: optimizer state.

State: m n numbers per matrix instead of Adam's 2 m n. A step costs 5 (4 m² n + 2 m³) FLOPs, in newton_schulz.py.

Source: Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982; Jordan et al., "Muon: An optimizer for hidden layers in
neural networks", 2024.

Departure: experts of a mixture, [E, m, n], are E matrices.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from lorank.fields import Bounds, NonNegative
from lorank.optim.newton_schulz import newton_schulz, newton_schulz_flops, products_in
from lorank.optim.rule import Group, Rule, State
from lorank.optim.stacks import at_once

Scale = Literal["dion", "kj", "kimi", "none"]
SCALES: dict[str, Callable[[int, int], float]] = {
    "dion": lambda m, n: (m / n) ** 0.5,
    "kj": lambda m, n: max(1.0, m / n) ** 0.5,
    "kimi": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "none": lambda m, n: 1.0,
}
"""Length of an orthonormal update by m = d_out and n = d_in."""


class Muon(Rule):
    """Of each matrix for itself."""

    kept = typed = ("momentum_buffer",)
    defaults: ClassVar[Mapping[str, Any]] = {"momentum": 0.95, "eps": 1e-7, "scaling": "kimi"}
    types: ClassVar[Mapping[str, Any]] = {
        "eps": NonNegative,
        "momentum": Annotated[float, Bounds(least=0, below=1)],
        "scaling": Scale,
    }
    matrices_only = True

    def make(self, like: Tensor) -> State:
        return {"momentum_buffer": like.new_zeros(like.shape)}

    def step(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        buffers = [state["momentum_buffer"] for state in states]
        W, G, M = map(_matrices, (weights, gradients, buffers))
        for some in at_once(range(len(W)), lambda i: [W[i]]):
            N = torch.stack([G[i].lerp(M[i].lerp_(G[i], 1 - group["momentum"]), group["momentum"]) for i in some])
            moves = newton_schulz(N.to(products_in(N.dtype, N.device)), eps=group["eps"]).to(N.dtype)
            for i, move in zip(some, moves, strict=True):
                length = group["lr"] * SCALES[group["scaling"]](*move.shape)
                W[i].mul_(1 - group["lr"] * group["weight_decay"]).sub_(move, alpha=length)

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        return math.prod(shape) * itemsize

    def flops(self, shape: Sequence[int]) -> int:
        *k, m, n = shape
        return math.prod(k) * newton_schulz_flops(m, n)


def _matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix, and the matrices of each stack [k, m, n]."""
    return [matrix for tensor in tensors for matrix in (tensor.unbind() if tensor.ndim == 3 else (tensor,))]
