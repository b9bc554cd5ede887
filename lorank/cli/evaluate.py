"""lorank evaluate: the perplexity of a trained model."""

import json
from typing import Any

import click

from lorank.cli.flags import SETTINGS, of_saved_model


@click.command(context_settings=SETTINGS)
@click.argument("model")
@of_saved_model
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=10_000_000, help="Stop after this many predicted tokens."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(model: str, as_json: bool, **settings: Any) -> None:
    """Compute the perplexity of a model, and its bits per byte.

    MODEL is a run, a folder or a hub name. A run is evaluated on the text that it held out, cut as in training. The perplexity
    is given twice: unbiased, and as the published tables compute it.
    """
    from lorank.cli.console import results_console
    from lorank.report.tables import evaluation_table
    from lorank.train.evaluation import evaluate_folder

    console = results_console()
    found = evaluate_folder(model, **settings)
    if as_json:
        click.echo(json.dumps({"text": found.text, **found.to_dict()}, indent=2))
    else:
        console.print(evaluation_table(found), highlight=False)
