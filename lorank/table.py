"""The one table of lorank: every name that a recipe or the command line knows, and the file that holds its mathematics.

Installed packages add methods through the entry-point group ``lorank.methods`` (name -> "package.module:Class"), scripts
with `register`. Nothing here imports a method before it is asked for.
"""

import importlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lorank.fields import unknown

if TYPE_CHECKING:
    from lorank.method import Method

    Class = TypeVar("Class", bound=type[Method])

METHODS = {
    # what the weights are
    "dense": "lorank.method:Dense",
    "cola": "lorank.methods.cola:CoLA",
    "cola-m": "lorank.methods.cola:CoLAM",
    "low-rank": "lorank.methods.low_rank:LowRank",
    "self-guided": "lorank.methods.self_guided:SelfGuided",
    "sltrain": "lorank.methods.sltrain:SLTrain",
    "crnet": "lorank.methods.crnet:CRNet",
    "relora": "lorank.methods.relora:ReLoRA",
    "switchlora": "lorank.methods.switchlora:SwitchLoRA",
    "sst": "lorank.methods.sst:SST",
    "masa": "lorank.methods.masa:MASA",
    "codebook": "lorank.methods.codebook:Codebook",
    "sparse-codes": "lorank.methods.sparse_codes:SparseCodes",
    # what is added to trained ones, which stay
    "lora": "lorank.adapters.lora:LoRA",
    "smora": "lorank.adapters.smora:SMoRA",
    "moram": "lorank.adapters.moram:MoRAM",
    "codyra": "lorank.adapters.codyra:CoDyRA",
    "row-adaptive": "lorank.adapters.row_adaptive:RowAdaptive",
    "mtlora": "lorank.adapters.mtlora:MTLoRA",
    "petalface": "lorank.adapters.petalface:PETALface",
    "reclora": "lorank.adapters.reclora:RecLoRA",
    "splitflux": "lorank.adapters.splitflux:SplitFlux",
    "block-lora": "lorank.adapters.block_lora:BlockLoRA",
    "break-for-make": "lorank.adapters.break_for_make:BreakForMake",
    "osft": "lorank.adapters.osft:OSFT",
    "comp-lora": "lorank.adapters.comp_lora:CompLoRA",
    # how they move
    "adamw": "lorank.optim.plain:AdamW",
    "adamw-8bit": "lorank.optim.plain:AdamW8bit",
    "adafactor": "lorank.optim.plain:Adafactor",
    "muon": "lorank.optim.plain:Muon",
    "galore": "lorank.optim.galore:GaLore",
    "fira": "lorank.optim.fira:Fira",
    "dct-adamw": "lorank.optim.dct_adamw:DCTAdamW",
    "trion": "lorank.optim.trion:Trion",
    "apollo": "lorank.optim.apollo:APOLLO",
    "apollo-mini": "lorank.optim.apollo:APOLLOMini",
    "factor-lr": "lorank.optim.factor_lr:FactorLR",
    "spectron": "lorank.optim.spectron:Spectron",
    "loro": "lorank.optim.loro:LORO",
    # where the gradient comes from
    "autograd": "lorank.method:Autograd",
    "eggroll": "lorank.evolution.method:EGGROLL",
    "votes": "lorank.evolution.votes:Votes",  # how integers move by it
}
GROUP = "lorank.methods"
_registered: dict[str, "type[Method]"] = {}


def register(method: "Class") -> "Class":
    """Let a method of yours be found by its `name` in this process; a decorator for its class. `lorank.convert` does this
    too, but a process that only loads a model must call it. Registering a second class of your own under one name
    replaces the first.

    Raises:
        ValueError: it is no class derived from `lorank.Method`, or its name belongs to lorank or an installed package.
    """
    if not isinstance(method, type) or not issubclass(method, _load("lorank.method:Method")) or not _name(method):
        raise ValueError(
            f"a registered method must be a class derived from lorank.Method with a `name`, got {method!r}"
        )
    known = _known(method.name)
    if known not in (None, method):
        raise ValueError(f"the method name {method.name!r} is already in use; give {method.__name__} another name")
    if known is None:
        _registered[method.name] = method
    return method


def method_names(key: str | None = None) -> list[str]:
    """Names of all methods: ours, those of installed packages, and those registered; or only those under one key of a
    recipe ("method", "optimizer", "gradient")."""
    names = dict.fromkeys([*METHODS, *(point.name for point in _entry_points()), *_registered])
    return [name for name in names if key is None or find(name).key == key]


def names_joined(text: str) -> list[str]:
    """The names in "cola+galore"; ValueError for one that is empty or stands there twice, or if commas are between them."""
    names = text.split("+")
    if "," in text:
        listed = [name for part in names for name in part.split(",") if name]
        one = len({find(name).key for name in listed}) == len(listed) > 1
        way = f"use {'+'.join(listed)!r} for one model with all of them" if one else "train a model with each"
        raise ValueError(f"methods must be joined by '+', got {text!r}; {way}")
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"a method must be a name, or different names joined by '+', got {text!r}")
    return names


def find(name: str) -> "type[Method]":
    """The class of a method; ValueError that lists the known names and the nearest one if there is none."""
    found = _registered.get(name) or _known(name)
    if found is None:
        hint = "a method of your own is found after lorank.register"
        raise ValueError(f"{unknown('method', name, method_names())} ({hint})")
    return found


def from_record(recorded: Mapping[str, Any]) -> "Method":
    """The method that a converted model's configuration records, with its settings."""
    made: Method = find(recorded["method"]).from_dict(recorded["arguments"])
    return made


def _name(method: Any) -> str:
    return getattr(method, "name", "")


def _known(name: str) -> Any:
    """Of lorank or an installed package; None if neither has it."""
    if name in METHODS:
        return _load(METHODS[name])
    return next((point.load() for point in _entry_points() if point.name == name), None)


def _load(where: str) -> Any:
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _entry_points() -> Any:
    """importlib.metadata takes longer to import than all else that `import lorank` does."""
    importlib.import_module("importlib.metadata")
    return sys.modules["importlib.metadata"].entry_points(group=GROUP)
