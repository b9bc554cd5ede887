"""What the cache holds, as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from lorank.report.markup import duration
from lorank.report.work import amount

if TYPE_CHECKING:
    from lorank.train.data.cache import Entry


def cache_table(entries: Sequence["Entry"]) -> Table:
    """Kinds of entries with their number, size and ages."""
    table = Table("kind")
    for name in ("number", "size", "in use", "last used", "least recently"):
        table.add_column(name, justify="right")
    for kind in dict.fromkeys(entry.kind for entry in entries):
        some = [entry for entry in entries if entry.kind == kind]
        ages = [duration(age(entry.age for entry in some)) + " ago" for age in (min, max)]
        used = sum(entry.in_use for entry in some)
        table.add_row(kind, f"{len(some):,}", amount(sum(entry.bytes for entry in some), "B"), str(used or "-"), *ages)
    return table


def total(entries: Sequence["Entry"]) -> str:
    """Number and size in words."""
    return f"{len(entries):,} entr{'y' if len(entries) == 1 else 'ies'}, {amount(sum(e.bytes for e in entries), 'B')}"
