"""What the papers say their methods cost, cell by cell beside our own count. A paper is one file with one object.

A published figure is kept as it is printed, so that its last digit says how exact it means to be. It follows from the
formula beside it if that rounds to it; if the two are less than one unit of that digit apart it was rounded another way.
A measured figure follows from no formula; it is said to be met if our count is within `PaperTable.within` of it. The cells that
are further off are named, each with the reason as far as we can see it, and the tests hold every cell to its mark.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Literal, NamedTuple

from lorank.sizes import SIZES

PAPERS = ("cola", "crnet", "sltrain", "galore", "fira", "relora", "switchlora", "sst", "masa", "dct", "eggroll")
"""Each is a file of this folder that defines `PAPER`."""
ALSO = {"cola-m": "cola", "cr-net": "crnet", "dct-adamw": "dct", "trion": "dct"}
"""Methods whose paper has another name."""

VOCABULARY = 32_000
"""Rows of the embeddings in all C4 tables of the family."""

Mark = Literal["follows", "other rounding", "met", "does not follow", "unchecked"]


class Shape(NamedTuple):
    """What the closed forms of a Llama ask for."""

    vocab_size: int
    d: int
    d_ff: int
    layers: int

    @property
    def projections(self) -> list[tuple[int, int]]:
        """[d_out, d_in] of the seven in a block."""
        return [(self.d, self.d)] * 4 + [(self.d_ff, self.d)] * 2 + [(self.d, self.d_ff)]

    def over_projections(self, count: Callable[[int, int], int]) -> int:
        """A count per matrix [d_out, d_in], summed over all blocks."""
        return self.layers * sum(count(m, n) for m, n in self.projections)


def shape_of(size: str) -> Shape:
    found = SIZES[size]
    return Shape(VOCABULARY, found.hidden_size, found.intermediate_size, found.layers)


class Cell(NamedTuple):
    """One published figure."""

    row: str
    column: str
    printed: str
    ours: float | None
    """None: the formula needs what the paper does not say, or the figure was measured."""
    mark: Mark
    reason: str
    """Why it does not follow or cannot be checked."""

    @property
    def difference(self) -> float | None:
        return None if self.ours is None else self.ours - float(self.printed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A published table, or the part of it that is about costs."""

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str | None, ...]]
    """Figures as printed, one per column; None where the paper has none."""
    ours: Callable[[str, str], float | None]
    """(row, column) -> our count, in the table's unit."""
    formula: str
    """How we count, in a line."""
    source: str
    """Where the figures come from, and how sure we are of them."""
    strays: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    """(row, column) -> why this cell does not follow, or cannot be checked; the column "*" stands for all of the row."""
    within: float | None = None
    """Of measured figures: how far our count may be from them, as a part of the figure."""

    def cells(self) -> Iterator[Cell]:
        for row, figures in self.rows.items():
            for column, printed in zip(self.columns, figures, strict=True):
                if printed is not None:
                    ours = self.ours(row, column)
                    reason = self.strays.get((row, column)) or self.strays.get((row, "*"), "")
                    yield Cell(row, column, printed, ours, self._mark(printed, ours, reason), reason)

    def _mark(self, printed: str, ours: float | None, reason: str) -> Mark:
        if ours is None:
            return "unchecked"
        if reason:
            return "does not follow"
        if self.within is not None:
            return "met"
        nearest = abs(ours - float(printed)) <= (0.5 + 1e-9) * last_digit(printed)
        return "follows" if nearest else "other rounding"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paper:
    """Costs that one paper publishes."""

    name: str
    title: str
    arxiv: str
    tables: tuple[PaperTable, ...]
    left_out: str = ""
    """Published costs that are not here, and why."""


def last_digit(printed: str) -> float:
    """One unit of a printed figure's last digit.

    >>> last_digit("0.43"), last_digit("609")
    (0.01, 1.0)
    """
    exponent = Decimal(printed).as_tuple().exponent
    assert isinstance(exponent, int)
    return 10.0**exponent


def find_paper(name: str) -> Paper:
    """The costs a paper publishes, by its name or a method's; ValueError that lists the known if there are none of that name."""
    if (file := ALSO.get(name, name)) in PAPERS:
        return importlib.import_module(f"lorank.papers.{file}").PAPER
    known = [*PAPERS, *ALSO]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no published costs are known for {name!r}; {hint}the papers are: {', '.join(known)}, all")
