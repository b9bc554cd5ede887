"""Helpers for the tests of MASA."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lorank.dictionary import Dictionary
from lorank.methods.masa import MASALinear

TABLE: dict[str, Any] = {"coefficients": "table"}


def dictionaries(model: Any) -> dict[str, Dictionary]:
    return dict(getattr(model, "base_model", model).lorank_atoms.items())


def layers(model: nn.Module) -> dict[str, MASALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MASALinear)}


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def deep(small: Callable[..., Any], name: str = "llama", **changes: Any) -> Any:
    """Six blocks: a third of them is two atoms."""
    return small(name, num_hidden_layers=6, **changes)


def elements(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)
