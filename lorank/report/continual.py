"""What a stream of tasks left: a row for each method, and the losses behind it."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from lorank.report import markup
from lorank.report.charts import Series, line_chart, whole_number
from lorank.report.figures import HALF, PHONE, figure
from lorank.report.tables import quantity

if TYPE_CHECKING:
    from lorank.train.continual import Stream

NOTE = (
    "Nats per held-out token, mean of the tasks. Learned: right after its turn, each task against the model as it came. Forgotten: "
    "since then. Forward transfer: before its turn."
)
FIGURES = {"loss": "loss", "learned": "learned", "forgotten": "forgotten", "forward transfer": "forward_transfer"}


def continual_tables(streams: Sequence["Stream"], tasks: Sequence[str]) -> RenderableType:
    """For the terminal: means over seeds, with their standard deviations where there are several."""
    by_method: dict[str, list[Stream]] = {}
    for one in streams:
        by_method.setdefault(f"{one.method}, lr {one.lr:g}", []).append(one)
    first = streams[0]
    figures, stages = _table("", "trained", *FIGURES), _table("perplexity", *tasks)
    figures.add_row("as it came", "", f"{mean(first.losses[0]):.3f}", *[""] * (len(FIGURES) - 1))
    stages.add_row("as it came", *(_figure([x], 2) for x in first.perplexities[0]))
    for name, seeds in by_method.items():
        found = [_figure([getattr(one, field) for one in seeds]) for field in FIGURES.values()]
        figures.add_row(escape(name), quantity(seeds[0].trained), *found)
        for label, cells in _stages(name, [one.losses for one in seeds], tasks):
            stages.add_row(escape(label), *cells)
    return Group(figures, "", stages, "", NOTE)


def _stages(name: str, losses: Sequence[Any], tasks: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Rows of a method's perplexity on each task after each, from L of each seed."""
    for i, task in enumerate(tasks, start=1):
        of_seeds = [[math.exp(min(one[i][j], 700.0)) for one in losses] for j in range(len(tasks))]
        yield f"{name}, after {task}", [_figure(values, 2) for values in of_seeds]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if number else "left")
    return table


def continual_json(streams: Sequence["Stream"]) -> str:
    """All losses, and what follows from them."""
    return json.dumps([one.to_dict() for one in streams], indent=1)


def continual_page(results: Mapping[str, Any], made_by: str) -> str:
    """report.html from what is in results.json; it refers to nothing outside itself."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for one in results["streams"]:
        by_method.setdefault(f"{one['method']}, lr {one['lr']:g}", []).append(one)
    style = {name: f"s{i % 8}" for i, name in enumerate(by_method)}
    tasks = [Path(task).stem or task for task in results["tasks"]]
    rows = []
    for name, seeds in by_method.items():
        cells = [markup.cell(_figure([one[field] for one in seeds])) for field in FIGURES.values()]
        rows.append(markup.name_cell(name, style[name]) + markup.cell(quantity(seeds[0]["trained"])) + "".join(cells))
    stages = [
        markup.name_cell(label, style[name]) + "".join(map(markup.cell, cells))
        for name, seeds in by_method.items()
        for label, cells in _stages(name, [one["losses"] for one in seeds], tasks)
    ]
    charts = []
    for j, task in enumerate(tasks):
        lines = []
        for name, seeds in by_method.items():
            after = [(float(i), [one["losses"][i][j] for one in seeds]) for i in range(len(tasks) + 1)]
            band = [(i, min(losses), max(losses)) for i, losses in after] if len(seeds) > 1 else []
            lines.append(Series(name, style[name], [(i, mean(losses)) for i, losses in after], band))
        titles = ("tasks done", f"loss on {task}")
        charts.append(figure(line_chart, lines, (HALF, PHONE), titles, (whole_number, "{:.3f}".format)))
    facts = {
        "model": results["model"],
        "tasks": ", ".join(tasks),
        "steps of each": f"{results['steps']:,}",
        "seeds": ", ".join(map(str, dict.fromkeys(one["seed"] for one in results["streams"]))),
    }
    listed = "".join(f"<span>{name} <b>{markup.escape(value)}</b></span>" for name, value in facts.items())
    sections = [
        f'<h1>One task after another</h1>\n<div class="facts">{listed}</div>',
        markup.section(
            "What was learned and forgotten", NOTE, markup.table(["", "trained", *FIGURES], rows, stacks=True)
        ),
        markup.section(
            "Loss on each task after each stage",
            "At 0 the model as it came. A line that climbs after its task's turn forgets."
            + (
                " Bands reach from the lowest to the highest seed."
                if any(len(s) > 1 for s in by_method.values())
                else ""
            ),
            f'<div class="two">{"".join(charts)}</div>',
        ),
        markup.section(
            "Perplexity on each task after each stage",
            "The same losses, as e to their power.",
            markup.table(["", *tasks], stages, stacks=True),
        ),
    ]
    return markup.page("One task after another", sections, f"Made by {made_by}; the same figures are in results.json.")


def _figure(values: Sequence[float], digits: int = 3) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
