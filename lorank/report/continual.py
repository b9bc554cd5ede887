"""What a stream of tasks left: a row for each method, and the losses behind it."""

import json
from collections.abc import Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from lorank.report.tables import quantity

if TYPE_CHECKING:
    from lorank.train.continual import Stream

FIGURES = {"loss": "loss", "learned": "learned", "forgotten": "forgotten", "forward transfer": "forward_transfer"}


def continual_tables(streams: Sequence["Stream"], tasks: Sequence[str]) -> RenderableType:
    """For the terminal: means over seeds, with their standard deviations where there are several."""
    by_method: dict[str, list[Stream]] = {}
    for one in streams:
        by_method.setdefault(f"{one.method}, lr {one.lr:g}", []).append(one)
    first = streams[0]
    figures, last = _table("", "trained", *FIGURES), _table("loss after all tasks", *tasks)
    figures.add_row("as it came", "", f"{mean(first.losses[0]):.3f}", *[""] * (len(FIGURES) - 1))
    last.add_row("as it came", *(f"{x:.3f}" for x in first.losses[0]))
    for name, seeds in by_method.items():
        found = [_figure([getattr(one, field) for one in seeds]) for field in FIGURES.values()]
        figures.add_row(escape(name), quantity(seeds[0].trained), *found)
        last.add_row(escape(name), *(_figure([one.losses[-1][j] for one in seeds]) for j in range(len(tasks))))
    note = (
        "Nats per held-out token, mean of the tasks. Learned: right after its turn, each task against the model as it came. Forgotten: "
        "since then. Forward transfer: before its turn."
    )
    return Group(figures, "", last, "", note)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if number else "left")
    return table


def continual_json(streams: Sequence["Stream"]) -> str:
    """All losses, and what follows from them."""
    return json.dumps([one.to_dict() for one in streams], indent=1)


def _figure(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"
