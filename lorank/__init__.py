"""lorank: train language models whose structure is low rank.

Importing this package is cheap: it loads neither torch nor transformers. It only lets transformers' Auto classes load
models that lorank saved (``model_type`` "lorank_llama", "lorank_gpt2", ...); see `lorank.auto`.
"""

# ruff: noqa: F401
import importlib
from typing import TYPE_CHECKING, Any

from lorank import auto, renamed
from lorank.table import METHODS, register

if TYPE_CHECKING:  # what type checkers and editors see
    from lorank.adapter_files import export_peft, load_adapter, save_adapter
    from lorank.adapters.block_lora import BlockLoRA
    from lorank.adapters.break_for_make import BreakForMake
    from lorank.adapters.codyra import CoDyRA
    from lorank.adapters.comp_lora import CompLoRA
    from lorank.adapters.cp_conv import adapt_convolutions, merge_convolutions
    from lorank.adapters.lora import LoRA
    from lorank.adapters.moram import MoRAM
    from lorank.adapters.mtlora import MTLoRA
    from lorank.adapters.osft import OSFT
    from lorank.adapters.petalface import PETALface
    from lorank.adapters.reclora import RecLoRA
    from lorank.adapters.row_adaptive import RowAdaptive
    from lorank.adapters.smora import SMoRA
    from lorank.adapters.splitflux import SplitFlux
    from lorank.checkpointing import (
        checkpoint,
        keep_bottlenecks,
        keep_bottlenecks_and_attention,
        keep_recurrence,
    )
    from lorank.conversion import convert, merge
    from lorank.dictionary import matrix_pca
    from lorank.evolution.method import EGGROLL
    from lorank.evolution.votes import Votes
    from lorank.fit.pca import fit_masa
    from lorank.loop import lr_schedule, next_task, optimizer, set_context, step_hook
    from lorank.method import Autograd, Dense, Method, Site, StepHook
    from lorank.methods.codebook import Codebook
    from lorank.methods.cola import CoLA, CoLAM
    from lorank.methods.crnet import CRNet
    from lorank.methods.low_rank import LowRank
    from lorank.methods.masa import MASA, freeze_coefficients
    from lorank.methods.relora import ReLoRA
    from lorank.methods.self_guided import SelfGuided
    from lorank.methods.sltrain import SLTrain
    from lorank.methods.sparse_codes import SparseCodes
    from lorank.methods.sst import SST
    from lorank.methods.switchlora import SwitchLoRA
    from lorank.optim.apollo import APOLLO, APOLLOMini
    from lorank.optim.dct_adamw import DCTAdamW
    from lorank.optim.factor_lr import FactorLR
    from lorank.optim.fira import Fira
    from lorank.optim.galore import GaLore
    from lorank.optim.loro import LORO
    from lorank.optim.plain import Adafactor, AdamW, AdamW8bit, Muon
    from lorank.optim.spectron import Spectron
    from lorank.optim.trion import Trion
    from lorank.speed.bottleneck import fuse_bottlenecks
    from lorank.speed.decoding import fast_decoding
    from lorank.speed.linear_cross_entropy import loss_without_logits
    from lorank.starts import zero_outputs
    from lorank.trainer import TrainerMixin

__version__ = "0.3.0"

_HOME = {
    "convert": "lorank.conversion",
    "adapt_convolutions": "lorank.adapters.cp_conv",
    "merge_convolutions": "lorank.adapters.cp_conv",
    "export_peft": "lorank.adapter_files",
    "load_adapter": "lorank.adapter_files",
    "save_adapter": "lorank.adapter_files",
    "lr_schedule": "lorank.loop",
    "loss_without_logits": "lorank.speed.linear_cross_entropy",
    "fuse_bottlenecks": "lorank.speed.bottleneck",
    "fast_decoding": "lorank.speed.decoding",
    "merge": "lorank.conversion",
    "next_task": "lorank.loop",
    "zero_outputs": "lorank.starts",
    "set_context": "lorank.loop",
    "optimizer": "lorank.loop",
    "step_hook": "lorank.loop",
    "checkpoint": "lorank.checkpointing",
    "keep_bottlenecks": "lorank.checkpointing",
    "keep_bottlenecks_and_attention": "lorank.checkpointing",
    "keep_recurrence": "lorank.checkpointing",
    "freeze_coefficients": "lorank.methods.masa",
    "fit_masa": "lorank.fit.pca",
    "matrix_pca": "lorank.dictionary",
    "TrainerMixin": "lorank.trainer",
    "Method": "lorank.method",
    "Site": "lorank.method",
    "StepHook": "lorank.method",
    **{kind: module for module, _, kind in (where.partition(":") for where in METHODS.values())},
}
__all__ = sorted(["METHODS", "fit", "register", *_HOME])


def __getattr__(name: str) -> Any:
    if name == "fit":  # a package that can be called
        return importlib.import_module("lorank.fit")
    if name not in _HOME:
        renamed.missing("lorank", name)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


auto.promise_auto_classes()
renamed.install()
