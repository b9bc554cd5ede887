"""lorank repro: a published run, repeated and judged."""

import dataclasses
import sys
from typing import Any

import click

from lorank.cli.flags import SETTINGS


@click.command(context_settings=SETTINGS)
@click.argument("name", required=False)
@click.option("--out", metavar="DIR", default=None, help="Run it whole in this folder, or go on there; then judge it.")
@click.option(
    "--micro-batch-size", type=click.IntRange(min=1), default=None, help="With --out: smaller, for less memory."
)
@click.option("--first-steps", is_flag=True, help="Its first steps in miniature on a CPU; without NAME those of all.")
def repro(name: str | None, out: str | None, micro_batch_size: int | None, first_steps: bool) -> None:
    """Reproduce a published run: NAME is 60m-cola, 60m-galore, ...; without it, a list of them.

    With --out, C4 is streamed from the hub, and the end compared with the paper's perplexity. --first-steps takes seconds:
    the recipe on a model and a text small enough for any CPU, compared with a recorded curve. The exit code is 1 for a
    result outside the tolerance. With NAME alone: the settings, what the run takes, and what is expected.
    """
    if out is None and micro_batch_size is not None:
        raise ValueError("--micro-batch-size is for a whole run; give it with --out")
    if out is not None and (first_steps or name is None):
        raise ValueError(
            f"--out takes a NAME and no --first-steps, for example: lorank repro {name or '60m-cola'} --out {out}"
        )
    from lorank.cli.console import results_console

    console = results_console()
    from lorank.race import repro as library
    from lorank.report import repro as report

    found = [library.find(each) for each in ([name] if name else library.PUBLISHED)]
    if out is not None:
        from lorank.report.progress import TerminalProgress

        progress = TerminalProgress(found[0].name, console)
        try:
            outcome = library.reproduce(found[0].name, out, [progress], micro_batch_size=micro_batch_size)
        finally:
            progress.close()
        if outcome is None:
            again = f"lorank repro {found[0].name} --out {out}"
            console.print(f"stopped; continue with [bold]{again}[/bold]", highlight=False)
            sys.exit(130)
        console.print(report.outcome_table(outcome), highlight=False)
        sys.exit(outcome.within is False)
    if first_steps:
        sys.exit(not all([_first_steps(console, one, details=name is not None) for one in found]))
    if name is None:
        return console.print(report.list_table(found), highlight=False)
    from lorank.plan.counts import count
    from lorank.train.model import empty_model

    settings = dataclasses.replace(found[0].recipe, tokenizer=None)  # its vocabulary is written in the recipe
    console.print(report.card(found[0], count(settings, empty_model(settings))), highlight=False)


def _first_steps(console: Any, one: Any, details: bool) -> bool:
    """Run, print and judge one miniature."""
    from lorank.cli.console import errors_console
    from lorank.race import repro as library
    from lorank.report import repro as report

    expected = library.recorded(one)
    with errors_console().status(f"{one.name}: {library.STEPS} steps"):
        curve = library.first_steps(one.recipe)
    if details:
        console.print(report.changes_table(library.differences(one.recipe)), "", highlight=False)
        console.print(report.curve_table(curve, expected), "", highlight=False)
    console.print(report.first_steps_line(one, curve, expected), highlight=False, soft_wrap=True)
    return library.deviation(curve, expected)[0] <= library.tolerance_of(one.recipe)
