"""Directions of a weight that training must leave alone, and the projection that keeps them.

    Q [n, k] with orthonormal columns:   X - Q (Qᵀ X) has nothing left in them

A projected gradient is not enough: Adam divides it entry by entry, so that its step leads into the directions again, a little each
time. Hence gradients are projected before a step, so that moments see nothing else, and weights after it.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorank.hooks import StepHook
from lorank.layers import wide


def outside(Q: Tensor, X: Tensor) -> Tensor:
    """X [n, ...] without its part in the columns of Q [n, k], in single precision or better."""
    Q, X = wide(Q), wide(X)
    return X - Q @ (Q.T @ X)


def leading(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, m], S [m] and V [d_in, m] of W = U diag(S) Vᵀ, the largest first, in double precision, so that what is protected
    is known as well as W is; only the first k pairs if k is not 0."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    part = slice(k or None)
    return U[:, part], S[part], Vh[part].T


class Guarded(Protocol):
    """A layer with protected directions."""

    def project_gradients(self) -> None:
        """Take the protected directions out of the gradients that there are, in place."""

    def project_weights(self) -> None:
        """Take out of the weights, in place, what a step has put there."""


class Guard(StepHook):
    """Keeps the protected directions of all `layers`, whatever the optimizer makes of a gradient."""

    def __init__(self, optimizer: Optimizer, layers: Iterable[Guarded]):
        self.layers = list(layers)
        super().__init__(optimizer, self.layers)  # type: ignore[arg-type]  # they are modules

    @torch.no_grad()
    def before_step(self) -> None:
        for layer in self.layers:
            layer.project_gradients()

    @torch.no_grad()
    def after_step(self) -> None:
        for layer in self.layers:
            layer.project_weights()


def project_(tensor: Tensor | None, Q: Tensor, *, rows: bool = False) -> None:
    """`outside`, in place: of columns [n, ...], or with `rows` of rows [..., n]; nothing is done to None."""
    if tensor is not None:
        tensor.copy_(outside(Q, tensor.T).T if rows else outside(Q, tensor))
