"""The one table of structure methods: a name for the command line and recipes, and the file that holds the mathematics.

Methods of other packages join through the entry-point group ``lorank.methods`` (name -> "package.module:Class").
"""

import difflib
import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorank.parametrization import Parametrization

METHODS = {
    "cola": "lorank.methods.cola:CoLA",
    "cola-m": "lorank.methods.cola:CoLAM",
    "low-rank": "lorank.methods.low_rank:LowRank",
    "sltrain": "lorank.methods.sltrain:SLTrain",
    "crnet": "lorank.methods.crnet:CRNet",
    "relora": "lorank.methods.relora:ReLoRA",
    "switchlora": "lorank.methods.switchlora:SwitchLoRA",
    "sst": "lorank.methods.sst:SST",
    "masa": "lorank.methods.masa:MASA",
}


def method_names() -> list[str]:
    """Names of all methods, ours and those of installed packages."""
    return [*METHODS, *(point.name for point in entry_points(group="lorank.methods") if point.name not in METHODS)]


def find_method(name: str) -> "type[Parametrization]":
    """The class of a method; ValueError that lists the known ones, the nearest first, if there is none of that name."""
    if name in METHODS:
        module, _, attribute = METHODS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    for point in entry_points(group="lorank.methods"):
        if point.name == name:
            return point.load()
    near = difflib.get_close_matches(name, method_names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown method {name!r}; {hint}the methods are: {', '.join(method_names())}")
