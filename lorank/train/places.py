"""Where a recipe says a method's setting: under the method's name, or in `rank` or `options`, whose entries go to the first method that
has the setting. "galore.rank" and "optimizer.rank" among the options go to that method, and to the first that answers that key."""

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


def shared_name(name: str) -> str:
    """A setting by its full name, where it is for whichever of several rows has it: a method's own is then an option.

    >>> shared_name("optimizer.galore.update_gap"), shared_name("optimizer.update_gap"), shared_name("shape.hidden_size")
    ('options.galore.update_gap', 'options.optimizer.update_gap', 'shape.hidden_size')
    """
    head, dot, entry = name.partition(".")
    return f"options.{entry if '.' in entry else name}" if dot and head in KEYS else name


def without(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """A recipe's settings without what these changes, {full name: value}, give anew in another place."""
    options = changes.get("options")
    given = [f"options.{own}" for own in options] if isinstance(options, Mapping) else []
    for change in [*given, *(name for name, value in changes.items() if value is not None)]:
        head, dot, entry = change.partition(".")
        method, _, own = entry.rpartition(".")
        if dot and head in KEYS:
            owner = _receiver(settings, f"{method or head}.{own}")
            settings = settings if owner is None else _without_shorthand(settings, owner, own)
        elif (dot and head == "options") or change == "rank":
            owner = _receiver(settings, entry or head)
            settings = settings if owner is None else _without_exact(settings, owner, own or head)
    return settings


def receiver(kinds: "Iterable[type[Method]]", own: str) -> "type[Method] | None":
    """The method of these to which `rank` or an option of that name goes: the first, in the order of the keys, that has it and is what the
    name says before a dot, if there is one."""
    where, _, own = own.rpartition(".")
    those = (kind for kind in kinds if own in field_types(kind) and where in ("", kind.key, kind.name))
    return min(those, key=lambda kind: KEYS.index(kind.key), default=None)


def _receiver(settings: Settings, own: str) -> "type[Method] | None":
    return receiver((find(name) for key in KEYS for name in entries(settings[key])), own)


def _without_shorthand(settings: Settings, owner: "type[Method]", own: str) -> Settings:
    """Without the options, and the rank, that are this setting of this method."""
    said = {name: f".{name}".endswith(f".{own}") and _receiver(settings, name) is owner for name in settings["options"]}
    options = {name: value for name, value in settings["options"].items() if not said[name]}
    is_rank = own == "rank" and _receiver(settings, own) is owner
    return {**settings, "options": options, **({"rank": None} if is_rank else {})}


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
