"""lorank continual: one trained model, one task after another."""

from pathlib import Path
from typing import Any

import click

import lorank
from lorank.cli.flags import SEED, SETTINGS, Folder, name_and_value, value_of


@click.command(context_settings=SETTINGS)
@click.argument("model")
@click.option(
    "--tasks", required=True, metavar="TEXT,TEXT...", help="Files, folders or globs of text, in order, with commas."
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="A method for trained models, or full for all weights; several with commas, or repeated.",
    show_default="codyra,osft,moram,full",
)
@click.option(
    "--rank", default=None, metavar="RANK", help="Of the methods that have one.", show_default="each method's own"
)
@click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="A setting of a method; may be repeated."
)
@click.option(
    "--lr",
    "rates",
    multiple=True,
    metavar="[NAME=]RATE",
    help="Learning rate of all methods, or of one; may be repeated.",
    show_default="1e-3; full and osft 1e-4",
)
@click.option("--steps", type=click.IntRange(min=1), default=200, help="Optimizer steps of each task.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Sequences in a step.")
@click.option("--sequence-length", type=click.IntRange(min=2), default=128, help="Tokens of a sequence.")
@click.option("--text-column", default="text", help="Of jsonl, json, parquet and csv files.")
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, help="How often all is trained, each time with another seed."
)
@click.option("--seed", type=SEED, default=0, help="The first seed.")
@click.option("--out", type=Folder(), default=None, help="Folder of the results.", show_default="runs/continual-MODEL")
@click.option("--save", is_flag=True, help="Keep each model after its last task.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def continual(
    model: str,
    tasks: str,
    methods: tuple[str, ...],
    rank: str | None,
    options: tuple[str, ...],
    rates: tuple[str, ...],
    seeds: int,
    seed: int,
    out: str | None,
    save: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a model on one task after another, and see what it learns and forgets.

    MODEL is a run, a folder or a hub name of a dense model. Each method starts from its weights and sees the same text in the same
    order. The losses on all tasks are measured before the first and after each, on text that is held out of it, and written to
    OUT/results.json, and OUT/report.html shows them. The same command goes on where an interrupted one was.
    """
    from lorank.cli.console import results_console, shown_work
    from lorank.report.continual import continual_json, continual_page, continual_tables
    from lorank.train.continual import FILE, Settings
    from lorank.train.continual import continual as run
    from lorank.train.folder import read_json, write_whole

    given = dict(name_and_value(text, "--option") for text in options)
    if rank is not None:
        if "rank" in given:
            raise ValueError(f"rank is given twice, as --rank {rank} and among the options; give it once")
        given["rank"] = value_of(rank)
    names = [name for text in methods or ("codyra,osft,moram,full",) for name in text.split(",") if name]
    sources = [task for task in tasks.split(",") if task]
    folder = Path(out or f"runs/continual-{model.rstrip('/').split('/')[-1]}")
    console = results_console()
    with shown_work():
        streams = run(
            model,
            sources,
            list(dict.fromkeys(names)),
            folder,
            seeds=range(seed, seed + seeds),
            rates=dict(map(_rate, rates)),
            options=given,
            settings=Settings(**settings),
            save=save,
            say=lambda line: None if as_json else console.print(line, highlight=False, markup=False),
        )
    page = continual_page(read_json(folder / FILE), f"lorank {lorank.__version__}")
    write_whole(folder / "report.html", page)
    if as_json:
        click.echo(continual_json(streams))
    else:
        console.print(continual_tables(streams, [Path(task).stem or task for task in sources]), highlight=False)
        console.print(f"report: [bold]{folder / 'report.html'}[/bold]", highlight=False, soft_wrap=True)


def _rate(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--lr must be a positive number, or NAME=NUMBER, got {text!r}")
    return name, value
