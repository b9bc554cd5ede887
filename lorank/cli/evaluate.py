"""lorank evaluate: the perplexity of a trained model."""

import json
from typing import Any

import click

from lorank.cli.flags import SETTINGS, of_saved_model


@click.command(context_settings=SETTINGS)
@click.argument("model")
@of_saved_model
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=None,
    help="Stop after this many predicted tokens.",
    show_default="as the run's last evaluation, else 10000000",
)
@click.option(
    "--tasks",
    default="",
    metavar="TASK,TASK...",
    help="Instead of a text: tasks of lm-evaluation-harness (needs lm-eval), or YAML files in its format.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(model: str, tasks: str, as_json: bool, **settings: Any) -> None:
    """Compute the perplexity of a model and its bits per byte, or its results on tasks.

    MODEL is a run, a folder or a hub name. A run is evaluated on the text that it held out, cut as in training. The perplexity
    is unbiased, and given once more as the published tables compute it where that means something. With --tasks
    hellaswag,arc_easy the harness asks its own questions.
    """
    if tasks:
        return _run_tasks(model, [task for task in tasks.split(",") if task], as_json, **settings)
    from lorank.cli.console import results_console, shown_work
    from lorank.report.tables import evaluation_table
    from lorank.train.evaluation import evaluate_folder

    console = results_console()
    with shown_work():
        found = evaluate_folder(model, **settings)
    if as_json:
        figures = found.to_dict()
        if not found.is_comparable:
            figures["published_compatible_perplexity"] = None
        click.echo(json.dumps({"text": found.text, **figures}, indent=2))
    else:
        console.print(evaluation_table(found), highlight=False)


def _run_tasks(
    model: str, tasks: list[str], as_json: bool, tokenizer: str | None, batch_size: int | None, **text: Any
) -> None:
    context, default = click.get_current_context(), click.core.ParameterSource.DEFAULT
    for name in text:
        if context.get_parameter_source(name) is not default:
            raise ValueError(f"--tasks bring their own text; leave out --{name.replace('_', '-')}")
    from lorank.cli.console import results_console
    from lorank.report.tables import tasks_table
    from lorank.train.tasks import check_tasks, run_tasks

    console = results_console()
    check_tasks(tasks)
    found = run_tasks(model, tasks, tokenizer=tokenizer, batch_size=batch_size or 8)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        console.print(tasks_table(found), highlight=False)
