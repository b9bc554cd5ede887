"""A published table as data: each figure as it is printed, our count, and whether the one follows from the other."""

import dataclasses
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import cached_property
from typing import Literal, NamedTuple

Mark = Literal["follows", "other rounding", "met", "does not follow", "unchecked"]


class Cell(NamedTuple):
    """One published figure."""

    row: str
    column: str
    printed: str
    ours: float | None
    """None: the formula needs something that the paper does not give, or the figure was measured."""
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
    """(row, column) -> why this cell does not follow, or cannot be checked; the column "*" stands for the whole row."""
    within: float | None = None
    """For measured figures: how far our count may be from them, as a fraction of the figure."""

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(
            self._cell(row, column, printed)
            for row, figures in self.rows.items()
            for column, printed in zip(self.columns, figures, strict=True)
            if printed is not None
        )

    def _cell(self, row: str, column: str, printed: str) -> Cell:
        ours = self.ours(row, column)
        reason = self.strays.get((row, column)) or self.strays.get((row, "*"), "")
        return Cell(row, column, printed, ours, self._mark(printed, ours, reason), reason)

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
