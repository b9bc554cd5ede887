"""The two factors of a low-rank map in a model: A [r, d_in] and B [d_out, r], of the product B A or of B σ(A x)."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn


class Pair(NamedTuple):
    """Factors of one projection; both are trained."""

    name: str
    """Of the module that holds them: ``model.layers.3.self_attn.q_proj``."""
    module: nn.Module
    A: nn.Parameter
    B: nn.Parameter

    @property
    def d_in(self) -> int:
        return self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def d_out(self) -> int:
        return self.B.shape[0]


def pairs(model: nn.Module) -> Iterator[Pair]:
    """The pairs of a model, in its order: modules with an A and a B as those of `lorank.layers`."""
    for name, module in model.named_modules():
        A, B = (getattr(getattr(module, side, None), "weight", None) for side in ("A", "B"))
        if not (isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter) and A.ndim == B.ndim == 2):
            continue
        if A.shape[0] == B.shape[1] and A.requires_grad and B.requires_grad:
            yield Pair(name, module, A, B)
