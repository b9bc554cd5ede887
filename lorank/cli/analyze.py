"""lorank analyze: how many dimensions a trained model uses."""

from pathlib import Path
from typing import Any

import click

from lorank.cli.flags import SETTINGS, Folder, of_saved_model


@click.command(context_settings=SETTINGS)
@click.argument("model")
@of_saved_model
@click.option("--tokens", type=click.IntRange(min=1), default=50_000, help="Stop after this many tokens.")
@click.option(
    "--gradient-batches",
    type=click.IntRange(min=0),
    default=1,
    help="Batches whose mean gradient is analyzed; 0: none. More than one needs memory for all gradients.",
)
@click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    default=None,
    metavar="GIB",
    help="Memory for the sums over activations. If they need more, the text is read several times.",
    show_default="half of what is free",
)
@click.option("--alpha", type=float, default=0.95, help="Part of the energy that the effective rank must hold.")
@click.option(
    "--budget",
    default=None,
    metavar="N",
    help="Suggest ranks for this budget: a number of parameters such as 10M, or a part of the dense ones such as 0.5.",
)
@click.option("--out", type=Folder(), default=None, help="Folder of the results.", show_default="runs/analyze-MODEL")
def analyze(model: str, out: str | None, **settings: Any) -> None:
    """Measure how many dimensions a model uses.

    MODEL is a run, a folder or a hub name. The command prints the effective ranks of activations, weights and gradients. It
    writes results.json, analysis.html and, with --budget, suggested.yaml: ranks for `lorank pretrain`. It needs memory for the
    weights, for the activations of a batch, and for sums of 8 bytes times the square of each width. --memory limits these
    sums: for a 7B model they need 208 GB at once, or 3 GB for one projection at a time.
    """
    from lorank.cli.console import errors_console, results_console, shown_work
    from lorank.report.analysis import analysis_page
    from lorank.report.effective_ranks import analysis_table, budget_line, loss_line
    from lorank.train.analysis import analyze_folder
    from lorank.train.folder import write_whole

    console = results_console()
    folder = Path(out or f"runs/analyze-{model.rstrip('/').split('/')[-1]}")
    with errors_console().status("loading") as status, shown_work(status):
        results = analyze_folder(model, folder, **settings, say=status.update)
        write_whole(folder / "analysis.html", analysis_page(results))
    console.print(analysis_table(results), highlight=False)
    for note in results["notes"]:
        console.print(f"· {note}", markup=False, highlight=False)
    if suggestion := results["suggestion"]:
        refused = suggestion["no_recipe"]
        recipe = "no recipe" if refused else f"[bold]lorank pretrain {folder}/suggested.yaml[/bold]"
        console.print(f"ranks: {recipe}: {budget_line(results)}", highlight=False, soft_wrap=True)
        console.print(f"       {loss_line(suggestion)}", highlight=False, soft_wrap=True)
        if refused:
            console.print(
                f"no recipe, because pretrain cannot train it: {refused}", markup=False, highlight=False, soft_wrap=True
            )
    console.print(f"report: [bold]{folder}/analysis.html[/bold]", highlight=False, soft_wrap=True)
