"""Where a recipe says a method's setting: under the method's name, or in `rank` or `options`, whose entries go to the first method that
has the setting."""

from collections.abc import Iterable
from typing import Any

from lorank.fields import field_types
from lorank.table import find, names_joined

KEYS = ("method", "optimizer", "gradient")
"""The keys that name methods."""


def entries(value: Any) -> dict[str, dict[str, Any]]:
    """{name: settings} of a key that names methods."""
    return value if isinstance(value, dict) else {name: {} for name in names_joined(value)}


def without(settings: dict[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """A recipe's settings without what these changes, by their full names, give anew in another place."""
    for change in changes:
        head, dot, entry = change.partition(".")
        exact = bool(dot) and head in KEYS
        if not (exact or change == "rank" or (dot and head == "options")):
            continue
        named, _, own = entry.rpartition(".") if exact else ("", "", entry or head)
        kinds = [find(name) for key in KEYS for name in entries(settings[key])]
        having = (kind for kind in sorted(kinds, key=lambda kind: KEYS.index(kind.key)) if own in field_types(kind))
        if (owner := next(having, None)) is None:
            continue
        if exact and (owner.name == named if named else owner.key == head):
            settings = {**settings, "rank": None} if own == "rank" else settings
            settings = {**settings, "options": {name: v for name, v in settings["options"].items() if name != own}}
        elif not exact:
            for key in KEYS:
                if isinstance(settings[key], dict):  # a default under the key passes its settings on to the method
                    theirs = {m: key == owner.key and own not in field_types(find(m)) for m in settings[key]}
                    left = {
                        m: {name: v for name, v in given.items() if name != own}
                        if m == owner.name or theirs[m]
                        else given
                        for m, given in settings[key].items()
                    }
                    settings = {**settings, key: left}
    return settings
