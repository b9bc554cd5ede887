"""Helpers for the tests of `convert`."""

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lorank import Method, Site


@dataclass(frozen=True, kw_only=True)
class Verbatim(Method):
    """A method that changes nothing: every projection is replaced by a copy of itself."""

    name: ClassVar[str] = "verbatim"

    def build(self, site: Site) -> nn.Module:
        return copy.deepcopy(site.linear)


class Block(nn.Module):
    """A residual MLP of plain torch."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class Plain(nn.Module):
    """A network that transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 32)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))  # a list of heads is no list of blocks

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.layers:
            x = block(x)
        return self.heads[0](x)
