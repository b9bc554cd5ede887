"""How weights move: one driver for all methods, rules, bases and groups.

`lorank.METHODS` names the optimizers; `lorank.optimizer` makes them. Here are the pieces for your own loop, and the
optimizers as torch writes them.
"""

import importlib
from typing import TYPE_CHECKING

from lorank import renamed

if TYPE_CHECKING:
    from lorank.optim.adamw import VectorAdamW
    from lorank.optim.groups import low_rank_groups
    from lorank.optim.step import LowRankOptimizer
    from lorank.optim.torch_style import DCTAdamW, FiraAdamW, GaLoreAdamW, MuonAdamW, Trion

_HOME = {
    "LowRankOptimizer": "step",
    "VectorAdamW": "adamw",
    "low_rank_groups": "groups",
    "GaLoreAdamW": "torch_style",
    "FiraAdamW": "torch_style",
    "DCTAdamW": "torch_style",
    "Trion": "torch_style",
    "MuonAdamW": "torch_style",
}
__all__ = [
    "DCTAdamW",
    "FiraAdamW",
    "GaLoreAdamW",
    "LowRankOptimizer",
    "MuonAdamW",
    "Trion",
    "VectorAdamW",
    "low_rank_groups",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        renamed.missing("lorank.optim", name)
    return getattr(importlib.import_module(f"lorank.optim.{_HOME[name]}"), name)
