"""lorank compare: several methods on the same tokens, and a report."""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from lorank.cli.flags import SETTINGS, recipe_flags, recipe_of

OWN = {"method": "--method", "seed": "--seeds"}


@click.command(context_settings=SETTINGS)
@click.argument("recipe", required=False)
@click.option(
    "--method", "methods", multiple=True, metavar="METHOD", help="A contestant, or NAME=METHOD; once for each."
)
@click.option(
    "--seeds",
    default="42",
    metavar="N,N...",
    help="Seeds of every contestant, of initial values and the order of data; several give intervals.",
)
@click.option("--sweep", multiple=True, metavar="NAME=V,V...", help="Values of a setting of which each takes its best.")
@click.option(
    "--for", "own", nargs=2, multiple=True, metavar="CONTESTANT NAME=V,V...", help="A contestant's own value or values."
)
@click.option(
    "--match",
    type=click.Choice(["tokens", "flops", "time", "params", "memory"]),
    default="tokens",
    help="What is the same for all: the first contestant's. flops and time change steps, params and memory rank or width.",
)
@click.option(
    "--tasks",
    default="",
    metavar="TASK,TASK...",
    help="Of lm-evaluation-harness (lorank[eval]), or YAML files in its format.",
)
@click.option("--out", default="runs/compare", help="Folder of the runs, results.json and report.html.")
@click.option("--resume", metavar="FOLDER", default=None, help="Continue this comparison exactly as it began.")
@recipe_flags(own=OWN)
def compare(out: str, resume: str | None, **asked: Any) -> None:
    """Train several methods on the same tokens in the same order, and write a report.

    RECIPE and the flags of `lorank pretrain` are what all have in common. A dense model trained by AdamW and by Muon, and a
    narrower one of the same architecture (dense-small) run as well. dense-small has the FLOPs per token of the cheapest method;
    where none saves those, its parameters or memory; and the report says why where there is none. Without --lr or --sweep lr=...
    a method takes the learning rate that its recipe at that --size names; where there is none, and for dense rows, the best
    of three. With --lr methods take that, and dense rows the best of it, a third and three times it. The same command again,
    or --resume, continues what was stopped.
    """
    from lorank.cli.console import results_console
    from lorank.race.compare import Race
    from lorank.report.comparison import comparison_table, write_results
    from lorank.report.race import RaceProgress

    console = results_console()
    watcher = RaceProgress(console)
    if resume:
        source = click.core.ParameterSource.DEFAULT
        context = click.get_current_context()
        given = [n for n in context.params if n != "resume" and context.get_parameter_source(n) is not source]
        if given:
            raise ValueError(
                "--resume continues a comparison exactly as it began, so nothing else can be given with it"
            )
        race = Race.open(resume)
    else:
        race = Race.plan(_comparison(**asked), out, watcher)
    try:
        race.run(watcher, after_each=partial(write_results, whole=False))
        watcher.say("looking at the weights and writing the report")
        results = write_results(race)
    except KeyboardInterrupt:
        write_results(race, whole=False)
        console.print(f"stopped; continue with [bold]lorank compare --resume {race.out}[/bold]", highlight=False)
        sys.exit(130)
    console.print(comparison_table(results), highlight=False)
    for note in results["notes"]:
        console.print(f"· {note}", markup=False, highlight=False)
    console.print(f"report: [bold]{race.out}/report.html[/bold]", highlight=False, soft_wrap=True)
    rows = [row for row in results["contestants"] if row["kind"] == "method"] or results["contestants"]
    if not any(row["loss"] for row in rows):
        which = "run" if len(rows) == len(results["contestants"]) else "run of a method"
        raise ValueError(f"every {which} failed; their last words are above, all of them in {race.out}/runs")


def _comparison(
    recipe: str | None,
    methods: tuple[str, ...],
    seeds: str,
    sweep: tuple[str, ...],
    own: Any,
    match: Any,
    tasks: str,
    **flags: Any,
) -> Any:
    """What `lorank compare` was asked for."""
    import yaml

    from lorank.race.contest import Comparison, parse_values

    base = recipe_of(recipe, flags, own=OWN)
    if not all(re.fullmatch(r"\s*[0-9]+\s*", seed) for seed in seeds.split(",")):
        raise ValueError(f"--seeds {seeds} is not a list of whole numbers such as 1,2,3")
    settings: dict[str, list[Any]] = {}
    for name, values in map(parse_values, sweep):
        settings.setdefault(name, []).extend(values)
    rate_given = flags["lr"] is not None or (recipe and "lr" in yaml.safe_load(Path(recipe).read_text()))
    each: dict[str, dict[str, list[Any]]] = {}
    for contestant, text in own:
        name, values = parse_values(text)
        each.setdefault(contestant, {}).setdefault(name, []).extend(values)
    return Comparison(
        base=base,
        methods=methods,
        seeds=[int(seed) for seed in seeds.split(",")],
        sweep=settings,
        own=each,
        tuned="dense" if rate_given else "all",
        match=match,
        tasks=[task for task in tasks.split(",") if task],
    )
