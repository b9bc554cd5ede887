"""How fast methods train: a table for each kind of work, and records for programs."""

import json
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

from lorank.report.tables import quantity

if TYPE_CHECKING:
    from lorank.plan.bench import Bench

COLUMNS = ("s / step", "speed", "FLOPs promise", "of peak", "kept")


def bench_tables(found: "Bench") -> RenderableType:
    """For the terminal."""
    parts: list[RenderableType] = []
    for work, rows in found.works:
        rounds, first = len(rows[0].seconds), rows[0]
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", title_style="bold")
        table.title = f"{work.title}, {work.tokens:,} tokens, {rounds} rounds"
        table.add_column("")
        for column in COLUMNS:
            table.add_column(column, justify="right")
        for row in rows:
            speed, low, high = row.speed_up(first)
            table.add_row(
                row.name,
                f"{row.median:.3g}",
                f"{speed:.2f}x" + ("" if row is first else f" ({low:.2f} to {high:.2f})"),
                f"{first.flops / row.flops:.2f}x",
                f"{row.flops / row.median / found.ceiling:.0%}",
                f"{row.kept_bytes / 2**20:,.0f} MiB",
            )
        parts += [table, ""]
    parts.append(
        f"Speed: times as fast as {rows[0].name}, forward and backward, the median of rounds and their range. FLOPs promise: how "
        f"many times fewer FLOPs. Of peak: of {quantity(found.ceiling)}FLOP/s, {found.source}. Kept: for the backward pass."
    )
    if found.busy:
        parts.append(
            "Other programs keep this machine busy, so the times are unsteady. Run it again when they are done."
        )
    return Group(*parts)


def bench_json(found: "Bench") -> str:
    """All that was measured: times in seconds, FLOPs of a step, bytes kept for backward."""
    works = [
        {
            "title": work.title,
            "tokens": work.tokens,
            "rows": [{**row._asdict(), "speed": row.speed_up(rows[0])[0]} for row in rows],
        }
        for work, rows in found.works
    ]
    return json.dumps({**found._asdict(), "works": works}, indent=1)
