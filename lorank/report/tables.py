"""Tables for the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
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
    """One column per run: parameters, FLOPs per token, memory, speed, perplexity. A row that no run has a value for is left out."""
    rows = {
        "parameters": lambda s: f"{s['parameters']:,}",
        "  in the blocks": lambda s: f"{s['block_parameters']:,}",
        "training FLOPs / token": lambda s: "-" if s["flops_per_token"] is None else quantity(s["flops_per_token"]),
        "training FLOPs, optimizer's too": lambda s: quantity(s["training_flops"]) if "training_flops" in s else "-",
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
        cells = [cell(summary) for summary in summaries.values()]
        if any(one != "-" for one in cells):
            table.add_row(label, *cells)
    return table


def evaluation_table(found: "Evaluation") -> Table:
    """The figures of an evaluation, each under its full name."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # a long path is the text's name
    table.add_row("loss", f"{found.loss:.4f} nats per token")
    table.add_row("perplexity (unbiased)", f"{found.perplexity:.3f}")
    table.add_row("bits per byte", f"{found.bits_per_byte:.4f}" if found.bits_per_byte else "unknown")
    if found.is_comparable:
        biased = f"(sum of N batch losses / (N + 1), N = {found.batches}: biased low)"
        table.add_row("published-compatible perplexity", f"{found.published_compatible_perplexity:.3f}   {biased}")
    table.add_row("predicted tokens", f"{found.tokens:,}")
    if found.text is not None:
        table.add_row("text", escape(found.text))
    return table


def tasks_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """What lm-evaluation-harness found: a row for each task and metric, with its standard error where it has one."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for task, metrics in found.items():
        for name, value in metrics.items():
            metric, _, chosen = name.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            spread = f" ± {error:.4f}" if error is not None else ""
            table.add_row(escape(task), escape(metric if chosen == "none" else name), f"{value:.4f}{spread}")
    return table
