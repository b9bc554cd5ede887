"""How weights move: one driver for all methods, rules, bases and groups.

`lorank.METHODS` names the optimizers; `lorank.optimizer` makes them. Here are the pieces for loops of one's own.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorank.optim.adamw import VectorAdamW
    from lorank.optim.driver import LowRankOptimizer
    from lorank.optim.groups import low_rank_groups

_HOME = {"LowRankOptimizer": "driver", "VectorAdamW": "adamw", "low_rank_groups": "groups"}
__all__ = ["LowRankOptimizer", "VectorAdamW", "low_rank_groups"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lorank.optim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorank.optim.{_HOME[name]}"), name)
