"""How weights move: one driver for all methods, rules, bases and groups.

`lorank.METHODS` names the optimizers; `lorank.optimizer` makes them. Here are the pieces for your own loop, and the
optimizers as torch writes them.
"""

import importlib
from typing import TYPE_CHECKING

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


_RENAMED = {
    "OPTIMIZERS": "lorank.METHODS",
    "ESTIMATORS": "lorank.METHODS",
    "Subspace": "lorank.GaLore(rule=...).optimizer",
    "Eggroll": "lorank.evolution.eggroll.Eggroll",
    "IntegerEggroll": "lorank.evolution.integers.IntegerEggroll",
    "Votes": "lorank.evolution.votes.VoteOptimizer",
}
"""Names of version 0.1 and what took their place."""


def __getattr__(name: str) -> object:
    if name in _RENAMED:
        raise ImportError(f"lorank.optim.{name} is {_RENAMED[name]} since version 0.2")
    if name not in _HOME:
        raise AttributeError(f"module 'lorank.optim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorank.optim.{_HOME[name]}"), name)
