"""What `lorank compress` found, as tables for the terminal."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from lorank.report.effective_ranks import short_names
from lorank.report.tables import quantity

Results = Mapping[str, Any]


def errors_table(results: Results) -> Table:
    """Rank and errors of each projection, over all blocks."""
    shown = Table(
        title="what the fitted layers lack, in percent of the dense ones: mean over blocks (worst)",
        title_justify="left",
        header_style="bold",
        box=None,
        pad_edge=False,
    )
    for name in ("", "d_in", "d_out", "rank", "weights", "outputs on the text"):
        shown.add_column(name, justify="left" if not name else "right")
    by_role: dict[str, list[Mapping[str, Any]]] = {}
    for one in results["projections"]:
        role = ".".join("*" if part.isdigit() else part for part in one["name"].split("."))
        by_role.setdefault(role, []).append(one)
    for role, name in short_names(by_role).items():
        rows = by_role[role]
        ranks = [row["rank"] for row in rows]
        span = str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"
        sizes = (str(rows[0]["d_in"]), str(rows[0]["d_out"]))
        shown.add_row(
            name, *sizes, span, *(_errors([row[key] for row in rows]) for key in ("weight_error", "output_error"))
        )
    return shown


def _errors(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known) * 100:.3g} ({max(known) * 100:.3g})" if known else "-"


def sizes_table(results: Results) -> Table:
    """The model before and after."""
    shown = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    for name in ("", "dense", results["method"], "ratio"):
        shown.add_column(name, justify="left" if not name else "right")
    rows = {
        "parameters": ("parameters", lambda x: f"{x:,}"),
        "size on disk": ("bytes", lambda x: f"{quantity(x)}B"),
        "perplexity on held-out text": ("perplexity", lambda x: f"{x:.2f}"),
        "decoding, tokens / s": ("decoded_tokens_per_second", lambda x: f"{x:.1f}"),
        "cosine of last hidden states": ("cosine_of_last_states", lambda x: f"{x:.4f}"),
    }
    for label, (key, cell) in rows.items():
        values = [results[when].get(key) for when in ("before", "after")]
        if any(value is not None for value in values):
            ratio = f"{values[1] / values[0]:.2f}" if None not in values and values[0] else ""
            shown.add_row(label, *("" if value is None else cell(value) for value in values), ratio)
    return shown
