"""Counting parameters."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from lorank.method import SHARED
from lorank.sites import blocks


class Parameters(NamedTuple):
    """How many numbers a model holds; shared parameters count once."""

    total: int
    trainable: int
    blocks: int
    """Inside the repeated blocks, or shared by them. The rest is embeddings, head and final norm."""


def count_parameters(model: nn.Module) -> Parameters:
    """Counts over distinct parameters; works on the meta device."""

    def total(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    inside = {parameter for _, _, block in blocks(model) for parameter in block.parameters()}
    inside |= {p for _, module in shared_modules(model) for p in module.parameters()}
    return Parameters(total(model.parameters()), total(p for p in model.parameters() if p.requires_grad), total(inside))


def shared_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of everything that the blocks of a converted model share."""
    return [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2].startswith(SHARED)]
