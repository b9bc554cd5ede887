"""Tables for the terminal."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from lorank.plan.run import Counts, Plan
from lorank.train.evaluation import Evaluation


def quantity(value: float) -> str:
    """A number with its metric prefix, three significant digits: 1.23 M, 45.6 G.

    >>> quantity(42_770_944)
    '42.8 M'
    """
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}" if value / size < 1000 else f"{value / size:,.0f} {prefix}"
    return f"{value:.3g}"


def runs_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column per run: parameters, FLOPs per token, memory, speed, perplexity."""
    rows = {
        "parameters": lambda s: f"{s['parameters']:,}",
        "  in the blocks": lambda s: f"{s['block_parameters']:,}",
        "training FLOPs / token": lambda s: quantity(s["flops_per_token"]),
        "peak memory": lambda s: f"{s['peak_memory_gib'] * 1024:,.0f} MiB",
        "tokens / s": lambda s: "-" if s["tokens_per_second"] is None else f"{s['tokens_per_second']:,.0f}",
        "MFU": lambda s: "-" if s["mfu"] is None else f"{s['mfu']:.0%}",
        "tokens seen": lambda s: f"{s['tokens']:,}",
        "validation loss (nats/token)": lambda s: f"{s['validation_loss_nats_per_token']:.4f}",
        "validation perplexity": lambda s: f"{s['validation_perplexity']:.2f}",
        "bits per byte": lambda s: f"{s['validation_bits_per_byte']:.3f}" if s["validation_bits_per_byte"] else "-",
        "learning rate": lambda s: f"{s['lr']:g}" if "lr" in s else "-",
    }
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    table.add_column("")
    for name in summaries:
        table.add_column(name, justify="right")
    for label, cell in rows.items():
        table.add_row(label, *(cell(summary) for summary in summaries.values()))
    return table


def evaluation_table(found: Evaluation) -> Table:
    """The figures of an evaluation, each under its full name."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("loss", f"{found.loss:.4f} nats per token")
    table.add_row("perplexity (unbiased)", f"{found.perplexity:.3f}")
    table.add_row("bits per byte", f"{found.bits_per_byte:.4f}" if found.bits_per_byte else "unknown")
    table.add_row(
        "published-compatible perplexity",
        f"{found.published_compatible_perplexity:.3f}   (sum of N batch losses / (N + 1), N = {found.batches}: biased low)",
    )
    table.add_row("predicted tokens", f"{found.tokens:,}")
    return table


def plan_tables(plan: Plan) -> RenderableType:
    """Which module becomes what, then parameters, FLOPs and memory beside the dense twin's."""
    modules = _treatments(plan) if plan.treatments else _modules(plan)
    totals = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "dense", "this recipe", "ratio") if plan.dense else ("", "this recipe"):
        totals.add_column(title, justify="left" if not title else "right")

    def line(label: str, of: Callable[[Counts], float], show: Callable[[float], str]) -> None:
        ours = of(plan.model)
        if plan.dense is None:
            return totals.add_row(label, show(ours))
        dense = of(plan.dense)
        ratio = f"{ours / dense:.3f}" if dense else ""
        totals.add_row(label, show(dense), show(ours), ratio)

    count = lambda n: f"{n:,.0f}"  # noqa: E731

    def gib(size: float) -> str:
        return f"{size / 2**20:.2f} MiB" if size < 2**23 else f"{size / 2**30:.3f} GiB"

    line("parameters", lambda c: c.parameters.total, count)
    line("  in the blocks", lambda c: c.parameters.blocks, count)
    line("training FLOPs / token", lambda c: c.flops_per_token, quantity)
    named = {"total": "memory", "peak": "memory at the peak of a step"}
    for part in ("weights", "gradients", "optimizer", "activations", "total", "peak"):
        line(named.get(part, f"  {part}"), partial(_bytes_of, part), gib)
    note = "blocks recompute part of their forward pass; its FLOPs are counted" if plan.checkpoint else plan.population
    return Group(modules, "", totals, note)


def _bytes_of(part: str, counts: Counts) -> float:
    return getattr(counts.memory, f"{part}_bytes")


def _modules(plan: Plan) -> Table:
    modules = Table(box=None, pad_edge=False, header_style="bold")
    modules.add_column("projection", overflow="fold")
    modules.add_column("×", justify="right")
    modules.add_column("in → out", no_wrap=True)
    modules.add_column("becomes", overflow="fold")
    modules.add_column("parameters, all depths", justify="right", no_wrap=True)
    for row in plan.rows:
        change = f"{row.parameters_before:,} → {row.parameters_after:,}"
        modules.add_row(row.role.partition(".*.")[2] or row.role, str(row.depths), row.before, row.after, change)
    return modules


def _treatments(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("parameter", "×", "shape", "stepped by"):  # names are there to be copied, so the last one wraps
        whole = title != "stepped by"
        table.add_column(title, overflow="fold", no_wrap=whole, justify="right" if title == "×" else "left")
    for row in plan.treatments:
        table.add_row(row.role, str(row.depths), row.shape, row.treatment)
    return table
