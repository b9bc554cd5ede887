"""Settings of methods and recipes, checked by their annotations: types, choices, bounds and ranks.

    density: Fraction = 0.03                      a number from 0 to 1
    reset: Literal["random", "magnitude"]         one of these names
    cycle: Annotated[int, Bounds(least=2)] | None = None

A value that does not fit is a ValueError of one form: "density must be a number from 0 to 1, got 2".
"""

import dataclasses
import difflib
import functools
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from lorank.patterns import compiled


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Limits of a number: x > above, x >= least, x < below, x <= most."""

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None

    def hold(self, x: float) -> bool:
        return (
            (self.above is None or x > self.above)
            and (self.least is None or x >= self.least)
            and (self.below is None or x < self.below)
            and (self.most is None or x <= self.most)
        )

    def describe(self, kind: str) -> str:
        """In words, for a kind of number ("integer", "number")."""
        if self == Bounds(above=0) or (kind == "integer" and self == Bounds(least=1)):
            return f"a positive {kind}"
        a = f"an {kind}" if kind == "integer" else f"a {kind}"
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is None or high is None:
            limits = {"above": self.above, "of at least": self.least, "below": self.below, "of at most": self.most}
            return next(f"{a} {words} {_plain(x)}" for words, x in limits.items() if x is not None)
        if self.above is None and self.below is None:
            return f"{a} from {_plain(low)} to {_plain(high)}"
        left, right = "[" if self.above is None else "(", "]" if self.below is None else ")"
        return f"{a} in {left}{_plain(low)}, {_plain(high)}{right}"


def _plain(x: float) -> str:
    return str(int(x)) if x == int(x) else str(x)


class IsRank:
    """Marks `Rank` among annotations."""


RANK_TABLES: dict[str, Mapping[str, float]] = {
    "attention-rich": {"attn|attention": 0.375, ".*": 0.16},
    "mlp-rich": {"attn|attention": 0.125, ".*": 0.34},
}
"""Tables with a name. In a Llama, whose MLP is 2.7 times as wide as the model, they cost what a quarter for all does."""
Rank = Annotated[int | float | str | Mapping[str, int | float], IsRank()]
"""A width: an integer; a fraction in (0, 1] of the matrix's narrower side; a table of these, {pattern: either}; or the name of one of
`RANK_TABLES`."""
Positive = Annotated[float, Bounds(above=0)]
NonNegative = Annotated[float, Bounds(least=0)]
Fraction = Annotated[float, Bounds(least=0, most=1)]
Count = Annotated[int, Bounds(least=1)]
Whole = Annotated[int, Bounds(least=0)]
Beta = Annotated[float, Bounds(least=0, below=1)]
Share = Whole | Annotated[float, Bounds(least=0, below=1)]
"""A number of steps: whole, or as a fraction of a run's steps; see `whole_steps`."""


def field_types(kind: Any) -> dict[str, Any]:
    """The annotation of each field of a dataclass, bounds included."""
    return _field_types(kind)


@functools.cache
def _field_types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def whole_steps(share: float, steps: int) -> int:
    """A `Share` in steps, for a run of that many.

    >>> whole_steps(80, 400), whole_steps(0.2, 400), whole_steps(0.99, 10)
    (80, 80, 9)
    """
    return share if isinstance(share, int) else min(round(share * steps), steps - 1)


def check_fields(instance: Any) -> None:
    """Make the values of a dataclass plain; ValueError for the first one that does not fit its annotation."""
    for name, kind in field_types(type(instance)).items():
        value = plain(getattr(instance, name))
        object.__setattr__(instance, name, value)  # it may be frozen
        check_value(name, value, kind)


def plain(value: Any) -> Any:
    """A value as YAML and JSON have it: numbers of numpy and torch become Python's, and paths become strings, at any depth.

    >>> from pathlib import Path
    >>> plain({"data": Path("a") / "b", "betas": (0.9, 0.95)})
    {'data': 'a/b', 'betas': (0.9, 0.95)}
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) is dict:
        return {plain(key): plain(one) for key, one in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError if `value` does not fit the annotation `kind`."""
    if isinstance(value, Mapping) and any(_is_rank(one) for one in alternatives_of(kind)):
        check_rank_table(value, name)
    elif not fits(value, kind):
        raise ValueError(f"{name} must be {describe(kind)}, got {value!r}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value fits an annotation; an integer is a number too, True and False are neither."""
    alternatives = alternatives_of(kind)
    if len(alternatives) > 1:
        return any(fits(value, one) for one in alternatives)
    if _is_rank(kind):
        fraction = isinstance(value, float) and fits(value, Annotated[float, Bounds(above=0, most=1)])
        return fraction or fits(value, Count) or (isinstance(value, str) and value in RANK_TABLES)
    if extras := _extras(kind):
        bounds = [extra for extra in extras if isinstance(extra, Bounds)]
        return fits(value, typing.get_args(kind)[0]) and all(bound.hold(value) for bound in bounds)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (list, Sequence):
        return isinstance(value, origin) and not isinstance(value, str) and all(fits(x, arguments[0]) for x in value)
    if origin is tuple:
        return (
            isinstance(value, tuple | list)
            and len(value) == len(arguments)
            and all(fits(item, one) for item, one in zip(value, arguments, strict=True))
        )
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, origin or kind)


def describe(kind: Any) -> str:
    """An annotation in words.

    >>> describe(Literal["full", "8bit"] | None), describe(Rank)
    ("'full', '8bit' or None", "a positive integer, a fraction of the width in (0, 1], a table {pattern: either}, 'attention-rich' or 'mlp-rich'")
    """
    return joined_by_or([phrase for one in alternatives_of(kind) for phrase in _phrases(one)])


def _phrases(kind: Any) -> list[str]:
    if _is_rank(kind):
        numbers = ["a positive integer", "a fraction of the width in (0, 1]", "a table {pattern: either}"]
        return [*numbers, *map(repr, RANK_TABLES)]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if extras := _extras(kind):
        number = "integer" if arguments[0] is int else "number"
        return [next(extra for extra in extras if isinstance(extra, Bounds)).describe(number)]
    if origin is Literal:
        return [repr(choice) for choice in arguments]
    if origin is tuple:
        return [f"{len(arguments)} values, each {describe(arguments[0])}"]
    if origin in (list, Sequence):
        return [f"a list of which each item is {describe(arguments[0])}"]
    words = {float: "a finite number", int: "an integer", bool: "true or false", str: "a string", dict: "a mapping"}
    if origin is Callable:
        return ["a function"]
    return [words.get(kind) or ("None" if kind is type(None) else f"a {getattr(origin or kind, '__name__', kind)}")]


def joined_by_or(words: list[str]) -> str:
    """
    >>> joined_by_or(["a", "b", "c"])
    'a, b or c'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def alternatives_of(kind: Any) -> tuple[Any, ...]:
    """The members of a union, in either of Python's spellings; of any other type, the type itself."""
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if union else (kind,)


def _extras(kind: Any) -> tuple[Any, ...]:
    return getattr(kind, "__metadata__", ())


def _is_rank(kind: Any) -> bool:
    return any(isinstance(extra, IsRank) for extra in _extras(kind))


def check_rank_table(table: Mapping[Any, Any], option: str = "rank") -> None:
    """Raises ValueError unless it is a non-empty table of ranks by patterns."""
    if not table:
        raise ValueError(f"{option} must have at least one pattern, for example {{'.*': 0.25}}, got an empty table")
    for pattern, value in table.items():
        compile_pattern(pattern, option)
        if isinstance(value, str) or not fits(value, Rank):
            width = "a positive integer or a fraction of the width in (0, 1]"
            raise ValueError(f"{option}[{pattern!r}] must be {width}, got {value!r}")


def compile_pattern(pattern: Any, option: str) -> re.Pattern[str]:
    """A compiled regular expression; ValueError with the option's name if it is not one, or one that could take hours."""
    try:
        return compiled(pattern)
    except (re.error, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{option} must hold regular expressions as strings, got {pattern!r}: {error}") from None


def unknown(kind: str, name: str, known: Sequence[str], *, plural: str | None = None) -> str:
    """The sentence for a name that is not among those known, with the nearest one.

    >>> unknown("size", "60M", ["tiny", "60m"])
    "unknown size '60M'; did you mean '60m'? The sizes are: tiny, 60m"
    """
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {name!r}{hint} The {plural or kind + 's'} are: {', '.join(known)}"
