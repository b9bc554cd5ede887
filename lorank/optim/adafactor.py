"""Adafactor: Adam without a first moment, whose second moment is kept as a column and a row.

    W ← (1 - lr λ) W - α U / max(1, rms(U) / d)        U = G √(mean(R) / (R C)),  in detail:

    R ← β R + (1 - β) mean of G² over n,   C ← β C + (1 - β) mean of G² over m,   β = 1 - t^-0.8 at step t
    α = max(ε₂, rms(W)) min(lr, 1 / √t)

    W, G, U [m, n]     R [m, 1]     C [1, n]     rms the root mean square     d 1     ε₂ 1e-3     λ weight decay

A vector has its second moment whole.

Saves: optimizer state.

State: m + n numbers per matrix instead of Adam's 2 m n.

Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv 1804.04235. torch's function does the
step.

Departure: inside a subspace, where what moves begins at 0, rms(W) is that of the weights.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim._adafactor import adafactor

from lorank.fields import NonNegative, Positive
from lorank.optim.rule import Group, Rule, State
from lorank.optim.shards import whole


class Adafactor(Rule):
    """torch's Adafactor, which has neither betas nor Adam's ε; its `eps` are two. A step goes by the size of the weights, of
    experts [E, m, n] by that of all."""

    kept = typed = ("row_var", "col_var", "variance")
    defaults: ClassVar[Mapping[str, Any]] = {"eps": (None, 1e-3), "d": 1.0, "beta2_decay": -0.8}
    types: ClassVar[Mapping[str, Any]] = {
        "eps": tuple[NonNegative | None, NonNegative],
        "d": Positive,
        "beta2_decay": float,
    }

    def make(self, like: Tensor) -> State:
        step = torch.zeros((), dtype=torch.float32, device="cpu")
        if like.ndim < 2:
            return {"step": step, "variance": like.new_zeros(like.shape)}
        column, row = (*like.shape[:-1], 1), (*like.shape[:-2], 1, like.shape[-1])
        return {"step": step, "row_var": like.new_zeros(column), "col_var": like.new_zeros(row)}

    def step(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        eps1, eps2 = group["eps"]
        lists = [[state.get(name) for state in states] for name in ("row_var", "col_var", "variance", "step")]
        adafactor(
            weights,
            gradients,
            *lists,  # type: ignore[arg-type]
            d=group["d"],
            lr=group["lr"],
            beta2_decay=group["beta2_decay"],
            weight_decay=group["weight_decay"],
            eps1=eps1,
            eps2=eps2,
            maximize=False,
        )

    def inside(
        self, zeros: list[Tensor], R: list[Tensor], states: list[State], group: Group, weights: Sequence[Tensor]
    ) -> None:
        """Zeros have no size, so they move as weights of the least size do; the change is scaled to that of the weights."""
        self.step(zeros, R, states, group)
        for change, W in zip(zeros, weights, strict=True):
            wide = torch.promote_types(W.dtype, torch.float32)
            size = whole(torch.linalg.vector_norm(W.detach(), dtype=wide)) / W.numel() ** 0.5
            change.mul_((size / group["eps"][1]).clamp(min=1))

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        if len(shape) < 2:
            return itemsize * math.prod(shape)
        return itemsize * (math.prod(shape[:-1]) + math.prod([*shape[:-2], shape[-1]]))

    def flops(self, shape: Sequence[int]) -> int:
        return 2 * math.prod(shape) if len(shape) > 1 else 0  # the second moment, a column times a row
