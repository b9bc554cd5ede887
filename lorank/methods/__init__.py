"""The one table of structure methods: a name for the command line and recipes, and the file that holds the mathematics.

Methods of other packages join through the entry-point group ``lorank.methods`` (name -> "package.module:Class").
"""

from typing import TYPE_CHECKING

from lorank import lookup

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


GROUP = "lorank.methods"


def method_names() -> list[str]:
    """Names of all methods, ours and those of installed packages."""
    return lookup.names(METHODS, GROUP)


def find_method(name: str) -> "type[Parametrization]":
    """The class of a method; ValueError that lists the known ones, the nearest first, if there is none of that name."""
    found = lookup.find(name, METHODS, GROUP)
    if found is None:
        raise lookup.unknown("method", "methods", name, method_names())
    return found
