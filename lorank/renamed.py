"""Public names of version 0.1 and what took their place, so that code written for it fails with a sentence that says where they are."""

import importlib.abc
import sys
from functools import partial
from typing import Any, NoReturn

MODULES = {
    "lorank.egg": "lorank.evolution.egg_model",
    "lorank.lookup": "lorank.table",
    "lorank.parametrization": "lorank.method",
    "lorank.pca": "lorank.fit.pca",
    "lorank.projections": "lorank.architectures",
    "lorank.ranks": "lorank.analysis.ranks",
    "lorank.registry": "lorank.table",
    "lorank.spectrum": "lorank.analysis.spectrum",
    "lorank.optim.eggroll": "lorank.evolution.eggroll",
    "lorank.optim.eggroll_int8": "lorank.evolution.integers",
    "lorank.optim.matrices": "lorank.optim.stacks",
    "lorank.optim.muon_adamw": "lorank.optim.MuonAdamW",
    "lorank.optim.subspace": "lorank.GaLore(rule=...).optimizer",
    "lorank.train.compare": "lorank.comparison",
    "lorank.train.contest": "lorank.comparison",
    "lorank.train.demo": "lorank.comparison.demo",
    "lorank.train.estimators": "lorank.evolution.method",
    "lorank.train.forecast": "lorank.plan.forecast",
    "lorank.train.matching": "lorank.comparison.matching",
    "lorank.train.optimizers": "lorank.train.methods",
    "lorank.train.plan": "lorank.plan.dry_run",
    "lorank.train.process": "lorank.comparison.process",
    "lorank.train.repro": "lorank.comparison.repro",
}
NAMES = {
    "lorank.Parametrization": "lorank.Method",
    "lorank.accounting.block_forward_flops": "lorank.papers.formulas.block_forward_flops",
    "lorank.accounting.block_training_flops": "lorank.papers.formulas.block_training_flops",
    "lorank.accounting.break_even_ratio": "lorank.papers.formulas.break_even_ratio",
    "lorank.accounting.cola_parameters": "lorank.papers.formulas.cola_parameters",
    "lorank.accounting.crnet_parameters": "lorank.papers.formulas.crnet_parameters",
    "lorank.accounting.dense_parameters": "lorank.papers.formulas.dense_parameters",
    "lorank.accounting.recompute_flops": "lorank.papers.formulas.recompute_flops",
    "lorank.accounting.training_state_bytes": "lorank.papers.formulas.training_state_bytes",
    "lorank.conversion.find_sites": "lorank.sites.find_sites",
    "lorank.conversion.linear_layers": "lorank.sites.linear_layers",
    "lorank.conversion.lr_schedule": "lorank.lr_schedule",
    "lorank.conversion.step_hook": "lorank.step_hook",
    "lorank.methods.METHODS": "lorank.METHODS",
    "lorank.methods.register": "lorank.register",
    "lorank.optim.ESTIMATORS": "lorank.METHODS",
    "lorank.optim.Eggroll": "lorank.evolution.eggroll.Eggroll",
    "lorank.optim.IntegerEggroll": "lorank.evolution.integers.IntegerEggroll",
    "lorank.optim.OPTIMIZERS": "lorank.METHODS",
    "lorank.optim.Subspace": "lorank.GaLore(rule=...).optimizer",
    "lorank.optim.Votes": "lorank.evolution.votes.VoteOptimizer",
    "lorank.optim.find_optimizer": "lorank.table.find",
    "lorank.optim.fira.FiraAdamW": "lorank.optim.FiraAdamW",
    "lorank.optim.galore.GaLoreAdamW": "lorank.optim.GaLoreAdamW",
    "lorank.optim.optimizer_names": 'lorank.table.method_names("optimizer")',
}


def sentence(name: str) -> str | None:
    """Where a name of 0.1 is now; None for any other."""
    now = {**MODULES, **NAMES}.get(name)
    return f"{name} is {now} since version 0.2" if now else None


def missing(module: str, name: str) -> NoReturn:
    """Raise ImportError for a name of 0.1, and AttributeError for any other."""
    if said := sentence(f"{module}.{name}"):
        raise ImportError(said)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def hint(module: str) -> None:
    """Let a module say where its names of 0.1 are. Type checkers do not see this, so that they still find names that never were."""
    vars(sys.modules[module])["__getattr__"] = partial(missing, module)


class Finder(importlib.abc.MetaPathFinder):
    """Asked last, for modules that nobody else has found."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name in MODULES:
            raise ModuleNotFoundError(sentence(name), name=name)


def install() -> None:
    """Let Python say where the modules of 0.1 are."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
