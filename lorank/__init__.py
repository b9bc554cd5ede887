"""lorank: train language models whose structure is low rank, from the first token on.

Importing this package is cheap: it loads neither torch nor transformers. It only promises transformers that models
saved by lorank (``model_type`` "lorank_llama", "lorank_gpt2", ...) can be loaded by the Auto classes; see
`lorank.registry`.
"""

import importlib
from typing import TYPE_CHECKING

from lorank import registry

if TYPE_CHECKING:
    from lorank.checkpointing import checkpoint, keep_bottlenecks, keep_bottlenecks_and_attention
    from lorank.conversion import convert, merge, step_hook
    from lorank.methods import METHODS
    from lorank.methods.cola import CoLA, CoLAM
    from lorank.methods.low_rank import LowRank
    from lorank.methods.sltrain import SLTrain
    from lorank.parametrization import Parametrization, Site, StepHook

__version__ = "0.1.0"

_HOME = {
    "convert": "conversion",
    "merge": "conversion",
    "step_hook": "conversion",
    "checkpoint": "checkpointing",
    "keep_bottlenecks": "checkpointing",
    "keep_bottlenecks_and_attention": "checkpointing",
    "METHODS": "methods",
    "CoLA": "methods.cola",
    "CoLAM": "methods.cola",
    "LowRank": "methods.low_rank",
    "SLTrain": "methods.sltrain",
    "Parametrization": "parametrization",
    "Site": "parametrization",
    "StepHook": "parametrization",
}
__all__ = [
    "METHODS",
    "CoLA",
    "CoLAM",
    "LowRank",
    "Parametrization",
    "SLTrain",
    "Site",
    "StepHook",
    "checkpoint",
    "convert",
    "keep_bottlenecks",
    "keep_bottlenecks_and_attention",
    "merge",
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
