"""lorank: train language models whose structure is low rank, from the first token on.

Importing this package is cheap: it loads neither torch nor transformers. It only promises transformers that models
saved by lorank (``model_type`` "lorank_llama", "lorank_gpt2", ...) can be loaded by the Auto classes; see
`lorank.registry`.
"""

import importlib
from typing import TYPE_CHECKING

from lorank import registry

if TYPE_CHECKING:
    from lorank.checkpointing import (
        checkpoint,
        keep_bottlenecks,
        keep_bottlenecks_and_attention,
        keep_recurrence,
    )
    from lorank.conversion import convert, lr_schedule, merge, step_hook
    from lorank.methods import METHODS, register
    from lorank.methods.cola import CoLA, CoLAM
    from lorank.methods.crnet import CRNet
    from lorank.methods.low_rank import LowRank
    from lorank.methods.masa import MASA, freeze_coefficients
    from lorank.methods.relora import ReLoRA
    from lorank.methods.sltrain import SLTrain
    from lorank.methods.sst import SST
    from lorank.methods.switchlora import SwitchLoRA
    from lorank.parametrization import Parametrization, Site, StepHook
    from lorank.pca import matrix_pca

__version__ = "0.1.0"

_HOME = {
    "convert": "conversion",
    "lr_schedule": "conversion",
    "merge": "conversion",
    "step_hook": "conversion",
    "checkpoint": "checkpointing",
    "keep_bottlenecks": "checkpointing",
    "keep_bottlenecks_and_attention": "checkpointing",
    "keep_recurrence": "checkpointing",
    "METHODS": "methods",
    "register": "methods",
    "CoLA": "methods.cola",
    "CoLAM": "methods.cola",
    "CRNet": "methods.crnet",
    "LowRank": "methods.low_rank",
    "SLTrain": "methods.sltrain",
    "SST": "methods.sst",
    "MASA": "methods.masa",
    "freeze_coefficients": "methods.masa",
    "matrix_pca": "pca",
    "Parametrization": "parametrization",
    "Site": "parametrization",
    "StepHook": "parametrization",
    "ReLoRA": "methods.relora",
    "SwitchLoRA": "methods.switchlora",
}
__all__ = [
    "MASA",
    "METHODS",
    "SST",
    "CRNet",
    "CoLA",
    "CoLAM",
    "LowRank",
    "Parametrization",
    "ReLoRA",
    "SLTrain",
    "Site",
    "StepHook",
    "SwitchLoRA",
    "checkpoint",
    "convert",
    "freeze_coefficients",
    "keep_bottlenecks",
    "keep_bottlenecks_and_attention",
    "keep_recurrence",
    "lr_schedule",
    "matrix_pca",
    "merge",
    "register",
    "step_hook",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lorank' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lorank.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


registry.promise_auto_classes()
