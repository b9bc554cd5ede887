"""lorank demo: CoLA with Muon against its dense twin on Python's standard library."""

from pathlib import Path

import click

from lorank.cli.flags import SETTINGS, Folder


@click.command(context_settings=SETTINGS)
@click.option("--out", type=Folder(), default="runs/demo", help="Folder of the three runs and the picture.")
@click.option(
    "--steps",
    type=click.IntRange(min=10),
    default=None,
    help="Optimizer steps of each run.",
    show_default="the recipe's",
)
def demo(out: str, steps: int | None) -> None:
    """Pre-train CoLA with Muon, and its dense twin with AdamW and with Muon, on Python's standard library, and compare them."""
    from lorank.cli.console import results_console
    from lorank.comparison.demo import run_demo
    from lorank.report.curves import curves_svg
    from lorank.report.markup import visible
    from lorank.report.progress import ComparisonProgress
    from lorank.report.tables import runs_table
    from lorank.train.folder import write_whole

    console = results_console()
    found = run_demo(Path(out), steps, ComparisonProgress(console))
    title = "CoLA and its dense twin on Python's standard library"
    flops = {row: summary["training_flops"] for row, summary in found["summaries"].items()}
    write_whole(Path(out) / "loss.svg", curves_svg(found["curves"], title=title, flops=flops))
    rates = "its best learning rate of a sweep" + (" (of the full demo, not of this short one)" if steps else "")
    console.rule(f"CoLA and its dense twin: same tokens, each at {rates}")
    console.print(runs_table(found["summaries"]))
    for method, summary in found["summaries"].items():
        console.rule(f"{method} writes", align="left")
        console.print(visible(summary["sample"]), markup=False, highlight=False)
    console.rule()
    console.print(f"runs and curves: {', '.join(f'[bold]{out}/{name}[/bold]' for name in (*flops, 'loss.svg'))}")
