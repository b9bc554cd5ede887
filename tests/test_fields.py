"""Settings are checked by their annotations, with messages of one form: X must be ..., got Y."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from lorank.fields import (
    Bounds,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Rank,
    Whole,
    check_fields,
    check_value,
    compile_pattern,
    describe,
    field_types,
    fits,
)

HALF_OPEN = Annotated[float, Bounds(least=0, below=1)]


@pytest.mark.parametrize(
    ("kind", "good", "bad", "words"),
    [
        (float, [0, 1.5, -3], [math.nan, math.inf, True, "1", None, 10**400], "a finite number"),
        (int, [0, -2], [1.0, True, "1", 10**400], "an integer"),
        (bool, [True, False], [0, 1, "yes"], "true or false"),
        (str, ["x"], [1, None], "a string"),
        (Positive, [1, 0.1], [0, -1, math.nan, math.inf, True], "a positive number"),
        (NonNegative, [0, 2.5], [-0.1], "a number of at least 0"),
        (Fraction, [0, 1, 0.5], [1.1, -0.1], "a number from 0 to 1"),
        (HALF_OPEN, [0, 0.9], [1, -0.1], "a number in [0, 1)"),
        (Annotated[float, Bounds(above=0, below=1)], [0.5], [0, 1], "a number in (0, 1)"),
        (Annotated[float, Bounds(above=2)], [2.5], [2], "a number above 2"),
        (Annotated[float, Bounds(below=0.5)], [0.4], [0.5], "a number below 0.5"),
        (Annotated[int, Bounds(most=3)], [3], [4, 2.5], "an integer of at most 3"),
        (Count, [1, 7], [0, 1.0, True], "a positive integer"),
        (Whole, [0, 7], [-1, 0.0], "an integer of at least 0"),
        (Annotated[int, Bounds(least=2)] | None, [2, None], [1], "an integer of at least 2 or None"),
        (Literal["a", "b"], ["a"], ["c", 1], "'a' or 'b'"),
        (Literal["a", 8, None], ["a", 8, None], ["8", True], "'a', 8 or None"),
        (Rank, [1, 0.5, 1.0, "mlp-rich"], [0, 1.5, True, "1", None, [4]], "a positive integer, a fraction of the width in (0, 1], a table {pattern: either}, 'attention-rich' or 'mlp-rich'"),
        (tuple[float, float], [(1, 2), [0.5, 0.5]], [(1,), (1, "2"), 1], "2 values, each a finite number"),
        (list[str], [[], ["a"]], ["a", [1], ("a",)], "a list of which each item is a string"),
        (Count | Sequence[int], [3, (0, 4), [0]], ["34", (0, 1.5), 0], "a positive integer or a list of which each item is an integer"),
        (Any, [None, object()], [], "a Any"),
        (Literal["svd"] | Callable[..., Any], ["svd", len], ["qr", 3], "'svd' or a function"),
    ],
)  # fmt: skip
def test_what_fits_an_annotation(kind: Any, good: list[Any], bad: list[Any], words: str) -> None:
    assert all(fits(value, kind) for value in good)
    for value in bad:
        with pytest.raises(ValueError) as refusal:
            check_value("x", value, kind)
        assert str(refusal.value) == f"x must be {words}, got {value!r}"
    assert describe(kind) == words


@dataclasses.dataclass
class Settings:
    rank: Rank = 0.25
    scale: Positive = 1.0
    note: "str | None" = None


def test_the_first_field_that_does_not_fit_is_named() -> None:
    check_fields(Settings(rank={"q": 4, ".*": 0.5}, note="as text, annotations count too"))
    with pytest.raises(ValueError, match="scale must be a positive number, got 0"):
        check_fields(Settings(scale=0, note=3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="note must be a string or None, got 3"):
        check_fields(Settings(note=3))  # type: ignore[arg-type]
    assert field_types(Settings)["note"] == str | None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "rank must have at least one pattern"),
        ({"(": 4}, r"rank must hold regular expressions as strings, got '\('"),
        ({3: 4}, "rank must hold regular expressions as strings, got 3"),
        ({".*": 0}, r"rank\['\.\*'\] must be a positive integer or a fraction of the width in \(0, 1\], got 0"),
        ({".*": {".*": 4}}, r"rank\['\.\*'\] must be a positive integer or a fraction .* got \{'\.\*': 4\}"),
    ],
)
def test_tables_of_ranks_that_are_refused(table: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_value("rank", table, Rank | None)


def test_a_pattern_is_compiled_or_refused() -> None:
    assert compile_pattern("q_proj$", "targets").search("layers.0.q_proj")
    with pytest.raises(ValueError, match=r"targets must hold regular expressions as strings, got '\['"):
        compile_pattern("[", "targets")


def test_values_of_numpy_and_paths_become_plain() -> None:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        rate: float
        count: int
        name: str
        rates: Sequence[float]

    found = Settings(np.float32(0.5), np.int64(3), Path("a/b"), [np.float64(1), 2])  # type: ignore[arg-type]
    check_fields(found)
    assert repr(found).endswith("Settings(rate=0.5, count=3, name='a/b', rates=[1.0, 2])")
