"""Things found by name: tables of ours, and what installed packages add under an entry-point group."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any


def entry_points(group: str) -> Any:
    """What installed packages add under a group; the import takes longer than all else that `import lorank` does."""
    from importlib.metadata import entry_points

    return entry_points(group=group)


def names(table: Mapping[str, str], group: str) -> list[str]:
    """All names, ours first."""
    return [*table, *(point.name for point in entry_points(group=group) if point.name not in table)]


def find(name: str, table: Mapping[str, str], group: str) -> Any:
    """What "package.module:attribute" stands for under a name; None if there is none of that name."""
    if name in table:
        module, _, attribute = table[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    return next((point.load() for point in entry_points(group=group) if point.name == name), None)


def unknown(kind: str, plural: str, name: str, known: list[str]) -> ValueError:
    """The error for a name that is not among those known, with the nearest."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}; {hint}the {plural} are: {', '.join(known)}")
