"""Optimizers that are low rank where the weights are not, and those that methods of `lorank.methods` need, and
estimates of gradients.

`OPTIMIZERS` names those that ``lorank pretrain --method NAME`` takes; other packages add theirs under the entry-point
group ``lorank.optimizers`` (name -> "package.module:Class"). Such a class is called with parameter groups, of which those
with a ``rank`` are low rank, and lr, betas, eps, weight_decay; its other keyword arguments are the options. For
``lorank plan`` it says what it costs, with static methods ``state_bytes`` and ``step_flops`` as GaLore's.
"""

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from lorank import table

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorank.evolution.eggroll import Eggroll
    from lorank.evolution.integers import IntegerEggroll, Votes
    from lorank.optim.adamw import VectorAdamW
    from lorank.optim.groups import low_rank_groups
    from lorank.optim.legacy.dct_adamw import DCTAdamW
    from lorank.optim.legacy.fira import FiraAdamW
    from lorank.optim.legacy.galore import GaLoreAdamW
    from lorank.optim.legacy.muon_adamw import MuonAdamW
    from lorank.optim.legacy.subspace import Subspace
    from lorank.optim.legacy.trion import Trion

_HOME = {
    "DCTAdamW": "legacy.dct_adamw",
    "Eggroll": "eggroll",
    "FiraAdamW": "legacy.fira",
    "IntegerEggroll": "eggroll_int8",
    "Votes": "eggroll_int8",
    "GaLoreAdamW": "legacy.galore",
    "Subspace": "legacy.subspace",
    "Trion": "legacy.trion",
    "VectorAdamW": "adamw",
    "low_rank_groups": "groups",
    "MuonAdamW": "legacy.muon_adamw",
}
OPTIMIZERS = {
    "galore": "lorank.optim.legacy.galore:GaLoreAdamW",
    "fira": "lorank.optim.legacy.fira:FiraAdamW",
    "dct-adamw": "lorank.optim.legacy.dct_adamw:DCTAdamW",
    "trion": "lorank.optim.legacy.trion:Trion",
}
ESTIMATORS = {"eggroll": "lorank.evolution.eggroll:Eggroll"}
"""What ``lorank pretrain --method NAME`` takes in place of backward passes."""
GROUP = "lorank.optimizers"
__all__ = [
    "ESTIMATORS",
    "OPTIMIZERS",
    "DCTAdamW",
    "Eggroll",
    "FiraAdamW",
    "GaLoreAdamW",
    "IntegerEggroll",
    "MuonAdamW",
    "Subspace",
    "Trion",
    "VectorAdamW",
    "Votes",
    "find_optimizer",
    "low_rank_groups",
    "optimizer_names",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lorank.optim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorank.optim.{_HOME[name]}"), name)


def optimizer_names() -> list[str]:
    """Names of all low-rank optimizers, ours and those of installed packages."""
    return list(OPTIMIZERS)


def find_optimizer(name: str) -> "type[Optimizer] | None":
    """The class of a low-rank optimizer, None if there is none of that name."""
    return table._load(OPTIMIZERS[name]) if name in OPTIMIZERS else None


def options_of(optimizer: "type[Optimizer]") -> dict[str, Any]:
    """Keyword arguments of a low-rank optimizer beside those that every one has, with their defaults."""
    found: dict[str, Any] = {}
    for kind in optimizer.__mro__:
        parameters = inspect.signature(kind).parameters.values()
        found |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return {name: default for name, default in found.items() if name not in ("lr", "betas", "eps", "weight_decay")}
