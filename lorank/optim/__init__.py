"""Optimizers that are low rank where the weights are not, those that methods of `lorank.methods` need, and estimates of
gradients."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorank.optim.adamw import VectorAdamW
    from lorank.optim.dct_adamw import DCTAdamW
    from lorank.optim.eggroll import Eggroll
    from lorank.optim.eggroll_int8 import IntegerEggroll, Votes
    from lorank.optim.fira import FiraAdamW
    from lorank.optim.galore import GaLoreAdamW
    from lorank.optim.subspace import Subspace
    from lorank.optim.trion import Trion

_HOME = {
    "DCTAdamW": "dct_adamw",
    "Eggroll": "eggroll",
    "FiraAdamW": "fira",
    "IntegerEggroll": "eggroll_int8",
    "Votes": "eggroll_int8",
    "GaLoreAdamW": "galore",
    "Subspace": "subspace",
    "Trion": "trion",
    "VectorAdamW": "adamw",
}
__all__ = [
    "DCTAdamW",
    "Eggroll",
    "FiraAdamW",
    "GaLoreAdamW",
    "IntegerEggroll",
    "Subspace",
    "Trion",
    "VectorAdamW",
    "Votes",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lorank.optim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorank.optim.{_HOME[name]}"), name)
