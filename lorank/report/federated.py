"""Rounds of a federated run: a row for each, and the losses of its clients."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table

from lorank.report import markup
from lorank.report.charts import Series, line_chart, whole_number
from lorank.report.figures import HALF, PHONE, figure
from lorank.report.work import amount

NOTE = (
    "Nats per held-out token of each client, after each round and before it trains again; in row 0 the model as it came. Bytes are those "
    "of the tensors of all clients."
)


def federated_table(results: Mapping[str, Any]) -> RenderableType:
    """For the terminal, from what is in federated.json."""
    rows = [_cells(results, row) for row in results["rounds"]]
    parts: list[RenderableType] = [_Columns(_columns(results), rows), ""]
    parts += [escape(f"round {number}: {name} was left out, {why}") for number, name, why in _left_out(results)]
    return Group(*parts, NOTE)


class _Columns:
    """A table; columns that have no room go into another one below it, next to the first column again."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[str]]):
        self.columns, self.rows = columns, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first, *widths = (max(map(cell_len, cells)) for cells in zip(self.columns, *self.rows, strict=True))
        groups: list[list[int]] = [[]]
        left = options.max_width - first
        for number, width in enumerate(widths, 1):
            if groups[-1] and width + 2 > left:
                groups.append([])
                left = options.max_width - first
            groups[-1].append(number)
            left -= width + 2
        for place, group in enumerate(groups):
            table = Table(box=None, pad_edge=False, header_style="bold")
            for number in (0, *group):
                table.add_column(escape(self.columns[number]), justify="right" if number else "left")
            for row in self.rows:
                table.add_row(*(escape(row[number]) for number in (0, *group)))
            yield from ("", table) if place else (table,)


def federated_page(results: Mapping[str, Any], made_by: str) -> str:
    """report.html from what is in federated.json; it refers to nothing outside itself."""
    settings, rounds = results["settings"], results["rounds"]
    private = f"epsilon {settings['epsilon']:g}" if settings["epsilon"] else f"noise {settings['noise'] or 0:g}"
    facts = {
        "model": settings["model"],
        "method": settings["method"],
        "rank": settings["rank"],
        "steps of a round": f"{settings['steps']:,}",
        "sent": amount(sum(row["down"] + row["up"] for row in rounds), "B"),
        "privacy": private if settings["epsilon"] or settings["noise"] is not None else "none",
    }
    listed = "".join(f"<span>{name} <b>{markup.escape(value)}</b></span>" for name, value in facts.items())
    rows = []
    for row in rounds:
        first, *others = _cells(results, row)
        rows.append(f'<th scope="row">{markup.escape(first)}</th>' + "".join(map(markup.cell, others)))
    lines = [
        Series(
            name, f"s{i % 8}", [(float(row["round"]), row["losses"][name]) for row in rounds if name in row["losses"]]
        )
        for i, name in enumerate(_clients(results))
    ]
    measured = [row for row in rounds if row["loss"] is not None]
    sent = [
        (sum(one["down"] + one["up"] for one in rounds[: i + 1]) / 1e6, row["loss"]) for i, row in enumerate(measured)
    ]
    charts = [
        figure(
            line_chart,
            lines,
            (HALF, PHONE),
            ("rounds", "loss of each client"),
            (whole_number, "{:.3f}".format),
            late=0.0,
        ),
        figure(
            line_chart,
            [Series("mean", "s0", sent)],
            (HALF, PHONE),
            ("MB sent", "mean loss"),
            ("{:.3g}".format, "{:.3f}".format),
            late=0.0,
        ),
    ]
    sections = [
        f'<h1>One model, {len(lines)} owners of text</h1>\n<div class="facts">{listed}</div>',
        markup.section("Rounds", NOTE, markup.table(_columns(results), rows, stacks=True)),
        markup.section("Loss", "On text that no client trains on.", f'<div class="two">{"".join(charts)}</div>'),
    ]
    if left := _left_out(results):
        lines_of = "".join(
            f"<li>round {number}: {markup.escape(name)}, {markup.escape(why)}</li>" for number, name, why in left
        )
        sections.append(markup.section("Left out", "What these clients sent was not used.", f"<ul>{lines_of}</ul>"))
    return markup.page("Federated training", sections, f"Made by {made_by}; the same figures are in federated.json.")


def _clients(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in results["rounds"] for name in row["losses"]))


def _columns(results: Mapping[str, Any]) -> list[str]:
    return ["round", "mean", *_clients(results), "down", "up", *(["ε"] if _is_private(results) else [])]


def _cells(results: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    losses = [row["loss"], *(row["losses"].get(name) for name in _clients(results))]
    cells = [str(row["round"]), *("-" if loss is None else f"{loss:.3f}" for loss in losses)]
    cells += [amount(row["down"], "B"), amount(row["up"], "B")] if row["round"] else ["", ""]
    if _is_private(results):
        known = [cost for cost in row["epsilon"].values() if cost is not None]
        cells.append(f"{max(known):.2f}" if known else "")
    return cells


def _is_private(results: Mapping[str, Any]) -> bool:
    return any(
        row["epsilon"] and any(cost is not None for cost in row["epsilon"].values()) for row in results["rounds"]
    )


def _left_out(results: Mapping[str, Any]) -> list[tuple[int, str, str]]:
    return [(row["round"], name, why) for row in results["rounds"] for name, why in row["left_out"].items()]
