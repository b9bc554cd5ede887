"""The weight of a projection, dense or converted."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorank.method import Method


def linear_part(module: nn.Module, method: Method | None) -> tuple[Tensor | None, str]:
    """(W, "weight") of a dense layer; ("merged") what a method merges its layer to; ("product") B·A of its factors; or
    (None, "none")."""
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.T if isinstance(module, Conv1D) else module.weight, "weight"
    try:
        return (None, "none") if method is None else (method.merged(module)[0], "merged")
    except (ValueError, AssertionError, AttributeError, TypeError):  # not linear, or not a projection
        A, B, W = (getattr(module, name, None) for name in "ABW")
        if isinstance(A, nn.Linear) and isinstance(B, nn.Linear):
            return B.weight @ A.weight, "product"
        return (W.weight, "weight") if isinstance(W, nn.Linear) else (None, "none")
