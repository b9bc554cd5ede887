"""lorank repro: a published run, repeated and judged."""

import sys
from typing import Any, NoReturn

import click

from lorank.cli.flags import SETTINGS, Folder


@click.command(context_settings=SETTINGS)
@click.argument("name", required=False)
@click.option(
    "--out",
    type=Folder(),
    metavar="DIR",
    default=None,
    help="Do the whole run in this folder, or continue it there, then compare its perplexity with the paper's.",
)
@click.option(
    "--micro-batch-size",
    type=click.IntRange(min=1),
    default=None,
    help="With --out: a smaller micro-batch than the recipe's, to use less memory.",
)
@click.option("--first-steps", is_flag=True, help="The first steps in miniature on a CPU; without NAME, those of all.")
def repro(name: str | None, out: str | None, micro_batch_size: int | None, first_steps: bool) -> None:
    """Reproduce a published run: NAME is cola-60m, galore-60m, ... Without NAME, the runs are listed.

    With NAME alone, the command prints the settings, what the run needs, and what is expected. With --out, it does the whole
    run: C4 is streamed from the hub, and the final perplexity is compared with the paper's. With --first-steps, it trains the
    recipe for seconds on a small model and text, and compares the losses with a recorded curve. The exit code is 1 for a
    result outside the tolerance.
    """
    if out is None and micro_batch_size is not None:
        raise ValueError("--micro-batch-size is for a whole run; give it with --out")
    if out is not None and (first_steps or name is None):
        raise ValueError(
            f"--out needs a NAME and excludes --first-steps, for example: lorank repro {name or 'cola-60m'} --out {out}"
        )
    from lorank.cli.console import results_console
    from lorank.comparison import repro as library
    from lorank.report import repro as report

    console = results_console()
    if name is None and not first_steps:
        return console.print(report.list_table(library.listing()), highlight=False)
    found = [library.find(each) for each in ([name] if name else library.names())]
    if out is not None:
        _whole_run(console, found[0].name, out, micro_batch_size)
    if first_steps:
        sys.exit(not all([_first_steps(console, one, details=name is not None) for one in found]))
    console.print(report.card(library.card(found[0])), highlight=False)


def _whole_run(console: Any, name: str, out: str, micro_batch_size: int | None) -> NoReturn:
    """Run, print and judge a whole reproduction."""
    from lorank.cli.console import shown_run
    from lorank.comparison.repro import reproduce
    from lorank.report.repro import outcome_table

    with shown_run(name, console) as progress:
        outcome = reproduce(name, out, [progress], micro_batch_size=micro_batch_size)
    if outcome is None:
        console.print(f"stopped; continue with [bold]lorank repro {name} --out {out}[/bold]", highlight=False)
        sys.exit(130)
    console.print(outcome_table(outcome), highlight=False)
    sys.exit(outcome["within"] is False)


def _first_steps(console: Any, one: Any, details: bool) -> bool:
    """Run, print and judge one miniature."""
    from lorank.cli.console import errors_console
    from lorank.comparison import first_steps
    from lorank.report import repro as report

    with errors_console().status(f"{one.name}: {first_steps.STEPS} steps"):
        found = first_steps.check(one)
    if details:
        console.print(report.changes_table(found), "", report.curve_table(found), "", highlight=False)
    console.print(report.first_steps_line(found), highlight=False, soft_wrap=True)
    return found["within"]
