"""Muon: momentum of matrices with its singular values brought near 1; AdamW for all other parameters.

    W ← (1 - lr λ) W - lr s NS₅(N)        N = G + μ (M - G),  in detail:

    M ← μ M + (1 - μ) G
    X ← N / ‖N‖,  five times  X ← a X + (b X Xᵀ + c (X Xᵀ)²) X        NS₅(N), which is near U Vᵀ of N = U S Vᵀ
    s = 0.2 √max(m, n)        or another of `SCALES`

    W, G, M, N, X [m, n], m <= n (else transposed)     a, b, c = 3.4445, -4.775, 2.0315     μ 0.95     λ weight decay

With this s an update has the root mean square of AdamW's, so that one learning rate and one weight decay serve both.

Saves: optimizer state.

State: m n numbers per matrix instead of Adam's 2 m n. A step costs 5 (4 m² n + 2 m³) FLOPs. torch's function does it, with NS₅ in
bfloat16.

Source: Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982; Jordan et al., "Muon: An optimizer for hidden layers in
neural networks", 2024.

Departure: experts of a mixture, [E, m, n], are E matrices.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, muon

from lorank.fields import Bounds, NonNegative
from lorank.optim.rule import Group, Rule, State

Scale = Literal["dion", "kj", "kimi", "none"]
SCALES: dict[str, Callable[[int, int], float]] = {
    "dion": lambda m, n: (m / n) ** 0.5,
    "kj": lambda m, n: max(1.0, m / n) ** 0.5,
    "kimi": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "none": lambda m, n: 1.0,
}
"""Length of an orthonormal update by m = d_out and n = d_in."""


class Muon(Rule):
    """torch's Muon with Nesterov momentum and five steps of Newton-Schulz in bfloat16."""

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
        weights, gradients, buffers = map(_matrices, (weights, gradients, buffers))
        alike: dict[torch.Size, list[int]] = {}
        for i, W in enumerate(weights):
            alike.setdefault(W.shape if group["scaling"] != "kimi" else torch.Size(), []).append(i)
        for shape, some in alike.items():
            longer = SCALES[group["scaling"]](*shape) / SCALES["kimi"](*shape) if shape else 1.0  # torch's has kimi's
            muon(
                [weights[i] for i in some],
                [gradients[i] for i in some],
                [buffers[i] for i in some],
                lr=group["lr"] * longer,
                weight_decay=group["weight_decay"] / longer,
                momentum=group["momentum"],
                nesterov=True,
                ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
                ns_steps=5,
                eps=group["eps"],
                adjust_lr_fn="match_rms_adamw",
                has_complex=False,
            )

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        return math.prod(shape) * itemsize

    def flops(self, shape: Sequence[int]) -> int:
        *k, m, n = shape
        return math.prod(k) * newton_schulz_flops(m, n)


def _matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix, and the matrices of each stack [k, m, n]."""
    return [matrix for tensor in tensors for matrix in (tensor.unbind() if tensor.ndim == 3 else (tensor,))]


def newton_schulz_flops(m: int, n: int, steps: int = 5) -> int:
    """Of Newton-Schulz on [m, n] with the shorter side s and the longer l: steps (4 s² l + 2 s³).

    >>> newton_schulz_flops(20, 3)
    3870
    """
    short, long = min(m, n), max(m, n)
    return steps * (4 * short * short * long + 2 * short**3)
