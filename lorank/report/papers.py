"""Published costs next to ours: for the terminal, and as records."""

import json
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorank.papers.table import Cell, Paper, PaperTable
from lorank.report.plans import records_csv

SIGNS = {"follows": "", "other rounding": "≈", "met": "~", "does not follow": "✗", "unchecked": "?"}


def paper_tables(found: Sequence[Paper]) -> RenderableType:
    """For each table the published figures, ours and the difference; then how we count and which cells do not follow."""
    parts: list[RenderableType] = []
    for paper in found:
        parts += [Text(f"{paper.title}, arXiv {paper.arxiv}", "bold"), ""]
        for table in paper.tables:
            parts += [Text(table.title, "underline"), _cells(table), *_notes(table), ""]
        if paper.left_out:
            parts += [f"Not included: {paper.left_out}.", ""]
    cells = [(table.within is not None, cell.mark) for paper in found for table in paper.tables for cell in table.cells]
    counts = {mark: sum(mark == other for _, other in cells) for mark in SIGNS}
    parts.append(
        f"{len(cells)} published cells: {counts['follows']} follow from their formula, {counts['other rounding']} follow except for "
        f"the rounding of the last digit (≈), {counts['met']} are measurements that our count meets (~), "
        f"{counts['does not follow']} do not follow (✗; {cells.count((True, 'does not follow'))} of them are measurements), "
        f"{counts['unchecked']} cannot be checked (?)."
    )
    return Group(*parts)


def _cells(table: PaperTable) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("", overflow="fold")
    for name in ("", "published", "ours", "difference", ""):
        grid.add_column(name, justify="left" if not name else "right", no_wrap=True)
    before = None
    for cell in table.cells:
        color = {"does not follow": "yellow", "unchecked": "dim"}.get(cell.mark, "")
        ours, difference = _figures(cell)
        row = cell.row if cell.row != before else ""
        grid.add_row(row, cell.column, cell.printed, ours, difference, SIGNS[cell.mark], style=color)
        before = cell.row
    return grid


def _figures(cell: Cell) -> tuple[str, str]:
    """Ours with one digit more than the paper prints, and the difference."""
    if cell.ours is None or cell.difference is None:
        return "-", "-"
    digits = len(cell.printed.partition(".")[2]) + 1
    return f"{cell.ours:,.{digits}f}", f"{cell.difference:+z,.{digits}f}"


def _notes(table: PaperTable) -> Iterator[Text]:
    met = f" ~ is within {table.within:.0%}." if table.within is not None else ""
    yield Text(f"Ours: {table.formula}. Published: {table.source}.{met}", "dim")
    reasons: dict[str, list[Cell]] = {}
    for cell in table.cells:
        if cell.reason:
            reasons.setdefault(cell.reason, []).append(cell)
    for reason, cells in reasons.items():
        columns: dict[str, list[str]] = {}
        for cell in cells:
            columns.setdefault(cell.row, []).append(cell.column)
        several = len(table.columns) > 1
        where = "; ".join(row + (f" {', '.join(names)}" if several else "") for row, names in columns.items())
        yield Text(f"{SIGNS[cells[0].mark]} {where}: {reason}.")


# ---- for programs


def papers_json(found: Sequence[Paper]) -> str:
    """One record per cell."""
    return json.dumps({"cells": _records(found)}, indent=2, ensure_ascii=False)


def papers_csv(found: Sequence[Paper]) -> str:
    """One line per cell below a line of names."""
    return records_csv(_records(found))


def _records(found: Sequence[Paper]) -> list[dict]:
    return [
        {
            "paper": paper.name,
            "arxiv": paper.arxiv,
            "table": table.title,
            "row": cell.row,
            "column": cell.column,
            "published": float(cell.printed),
            "ours": cell.ours,
            "difference": cell.difference,
            "mark": cell.mark,
            "reason": cell.reason,
            "formula": table.formula,
            "source": table.source,
        }
        for paper in found
        for table in paper.tables
        for cell in table.cells
    ]
