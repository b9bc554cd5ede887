"""The one table of structure methods: a name for the command line and recipes, and the file that holds the mathematics.

Methods of other packages join through the entry-point group ``lorank.methods`` (name -> "package.module:Class"), those of
a script by `register`.
"""

from typing import TYPE_CHECKING, TypeVar

from lorank import lookup

if TYPE_CHECKING:
    from lorank.parametrization import Parametrization

    Class = TypeVar("Class", bound=type[Parametrization])

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


_registered: dict[str, "type[Parametrization]"] = {}


def register(method: "Class") -> "Class":
    """Let a method of yours be found by its `name`, wherever this ran; a decorator for its class. `lorank.convert` does it
    too; a process that only loads a model has to. Of two of your own classes of one name the later is found.

    Raises:
        ValueError: it is the name of another one, of ours or of an installed package.
    """
    from lorank.optim import ESTIMATORS, optimizer_names
    from lorank.parametrization import Parametrization

    if not isinstance(method, type) or not issubclass(method, Parametrization) or not getattr(method, "name", ""):
        raise ValueError(f"{method!r} is no class derived from lorank.Parametrization with a `name`")
    known = lookup.find(method.name, METHODS, GROUP)
    if known not in (None, method) or method.name in (*optimizer_names(), *ESTIMATORS, "dense"):
        raise ValueError(f"there is a method {method.name!r} already; give {method.__name__} another name")
    _registered[method.name] = method
    return method


def method_names() -> list[str]:
    """Names of all methods: ours, those of installed packages, and those registered."""
    known = lookup.names(METHODS, GROUP)
    return [*known, *(name for name in _registered if name not in known)]


def find_method(name: str) -> "type[Parametrization]":
    """The class of a method; ValueError that lists the known ones, the nearest first, if there is none of that name."""
    found = _registered.get(name) or lookup.find(name, METHODS, GROUP)
    if found is None:
        unknown = lookup.unknown("method", "methods", name, method_names())
        raise ValueError(f"{unknown} (a method of your own is found after lorank.register)")
    return found
