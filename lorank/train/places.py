"""Where a recipe says a method's setting: under the method's name, or in `rank` or `options`, whose entries go to the first method that
has the setting."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lorank.fields import field_types
from lorank.table import find, names_joined

if TYPE_CHECKING:
    from lorank.method import Method

KEYS = ("method", "optimizer", "gradient")
"""The keys that name methods."""
Settings = dict[str, Any]


def entries(value: Any) -> dict[str, Settings]:
    """{name: settings} of a key that names methods."""
    return value if isinstance(value, dict) else {name: {} for name in names_joined(value)}


def as_typed(name: str) -> str:
    """A setting's name with "_" where a flag would have "-". Methods between dots keep theirs.

    >>> as_typed("update-gap"), as_typed("method.low-rank.rank")
    ('update_gap', 'method.low-rank.rank')
    """
    *places, own = name.strip().split(".")
    return ".".join([*places, own.replace("-", "_")])


def without(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """A recipe's settings without what these changes, {full name: value}, give anew in another place."""
    options = changes.get("options")
    given = [f"options.{own}" for own in options] if isinstance(options, Mapping) else []
    for change in [*given, *(name for name, value in changes.items() if value is not None)]:
        head, dot, entry = change.partition(".")
        method, _, own = entry.rpartition(".")
        if dot and head in KEYS:
            owner = _receiver(settings, own)
            if owner is not None and (owner.name == method if method else owner.key == head):
                settings = _without_shorthand(settings, own)
        elif (dot and head == "options") or change == "rank":
            owner = _receiver(settings, entry or head)
            settings = settings if owner is None else _without_exact(settings, owner, entry or head)
    return settings


def receiver(kinds: "Iterable[type[Method]]", own: str) -> "type[Method] | None":
    """The method of these to which `rank` or an option of that name goes: the first, in the order of the keys, that has it."""
    return next((k for k in sorted(kinds, key=lambda kind: KEYS.index(kind.key)) if own in field_types(k)), None)


def _receiver(settings: Settings, own: str) -> "type[Method] | None":
    return receiver((find(name) for key in KEYS for name in entries(settings[key])), own)


def _without_shorthand(settings: Settings, own: str) -> Settings:
    options = {name: value for name, value in settings["options"].items() if name != own}
    return {**settings, "options": options, **({"rank": None} if own == "rank" else {})}


def _without_exact(settings: Settings, owner: "type[Method]", own: str) -> Settings:
    """Neither under the method nor under what its key names by default, from where settings are passed on to it."""
    for key in KEYS:
        if isinstance(settings[key], dict):
            left = {}
            for name, given in settings[key].items():
                passed_on = key == owner.key and own not in field_types(find(name))
                own_place = name == owner.name or passed_on
                left[name] = {one: value for one, value in given.items() if not (own_place and one == own)}
            settings = {**settings, key: left}
    return settings
