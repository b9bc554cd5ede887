"""Optimizers that are low rank where the weights are not."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorank.optim.fira import FiraAdamW
    from lorank.optim.galore import GaLoreAdamW
    from lorank.optim.subspace import Subspace

_HOME = {"FiraAdamW": "fira", "GaLoreAdamW": "galore", "Subspace": "subspace"}
__all__ = ["FiraAdamW", "GaLoreAdamW", "Subspace"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lorank.optim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorank.optim.{_HOME[name]}"), name)
