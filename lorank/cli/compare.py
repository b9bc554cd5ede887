"""lorank compare: several methods on the same tokens, and a report."""

import re
import sys
from functools import partial
from typing import Any

import click

from lorank.cli.flags import SETTINGS, Folder, InGroups, changes_of, recipe_flags, recipe_of, split_budget

OWN = {
    "method": "--method",
    "seed": "--seeds",
    "push_to_hub": "lorank export RUN --push-to-hub NAME",
    "start_from": "lorank pretrain --start-from MODEL",
    "distil": "lorank pretrain --distil TEACHER",
}


@click.command(cls=InGroups, context_settings=SETTINGS)
@click.argument("recipe", required=False)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="METHOD",
    help="A row of the report: METHOD, several joined by + such as cola+galore, or NAME=METHOD; may be repeated, or have commas.",
)
@click.option(
    "--seeds",
    default="42",
    metavar="N,N...",
    help="Seeds for initial values and the order of data: each row runs once per seed. Several give intervals.",
)
@click.option(
    "--sweep", multiple=True, metavar="NAME=V,V...", help="Values to try for a setting; each row uses its best."
)
@click.option("--for", "own", nargs=2, multiple=True, metavar="ROW NAME=V,V...", help="A row's own value or values.")
@click.option(
    "--match",
    type=click.Choice(["tokens", "flops", "time", "params", "memory"]),
    default="tokens",
    help="What is made equal to the first row's. flops and time change steps, params and memory change rank or width.",
)
@click.option("--only", is_flag=True, help="Compare the named methods alone; add no dense models.")
@click.option(
    "--tasks",
    default="",
    metavar="TASK,TASK...",
    help="Tasks of lm-evaluation-harness (needs lm-eval), or YAML files in its format.",
)
@click.option("--out", type=Folder(), default="runs/compare", help="Folder of the runs, results.json and report.html.")
@click.option(
    "--resume", type=Folder(), metavar="FOLDER", default=None, help="Continue this comparison exactly as it began."
)
@recipe_flags(own=OWN)
def compare(out: str, resume: str | None, **asked: Any) -> None:
    """Train several methods on the same tokens in the same order, and write a report.

    RECIPE and the flags of `lorank pretrain` hold for all rows, --option for those that have the setting. Four dense models are added: one trained by AdamW, one
    trained by Muon, and for each of these optimizers a narrower one of the same architecture (dense-small). dense-small has the
    FLOPs per token of the cheapest method or, if no method saves those, its parameters or memory. If none of these can be
    matched, there is no dense-small, and the report explains why. With --only, the named methods are compared alone.

    Without --lr or --sweep lr=..., a method uses the learning rate of its recipe at that --size; dense rows, and methods
    without a recipe, use the best of three rates. With --lr, methods use that rate, and dense rows the best of it, a third of
    it and three times it. If the best value of a sweep is its smallest or largest, the sweep is extended by one step, at most
    twice.

    --tokens-per-parameter counts the parameters of the first row; all train on as many tokens.

    The same command again, or --resume, continues a comparison that was stopped.
    """
    from lorank.cli.console import results_console, shown_work
    from lorank.comparison.runner import Comparison, with_budget
    from lorank.report.comparison import comparison_table
    from lorank.report.progress import ComparisonProgress

    console = results_console()
    watcher = ComparisonProgress(console)
    if resume:
        source = click.core.ParameterSource.DEFAULT
        context = click.get_current_context()
        given = [n for n in context.params if n != "resume" and context.get_parameter_source(n) is not source]
        if given:
            raise ValueError("--resume continues a comparison exactly as it began; leave out all other arguments")
        comparison = Comparison.open(resume)
    else:
        budget, asked = split_budget(asked)
        settings = _settings(**asked)
        if budget is not None:
            watcher.say("reading the data for the number of steps")
            with shown_work():
                settings = with_budget(settings, budget)
        with shown_work():
            comparison = Comparison.plan(settings, out, watcher)
    try:
        comparison.run(watcher, after_each=partial(_report, whole=False))
        watcher.say("computing singular values and writing the report")
        results = _report(comparison, whole=True)
    except KeyboardInterrupt:
        _report(comparison, whole=False)
        again = f"lorank compare --resume {comparison.out}"
        console.print(f"stopped; continue with [bold]{again}[/bold]", highlight=False)
        sys.exit(130)
    console.print(comparison_table(results), highlight=False)
    for note in results["notes"]:
        console.print(f"· {note}", markup=False, highlight=False)
    console.print(f"report: [bold]{comparison.out}/report.html[/bold]", highlight=False, soft_wrap=True)
    rows = [row for row in results["rows"] if row["kind"] == "method"] or results["rows"]
    if not any(row["loss"] for row in rows):
        which = "run" if len(rows) == len(results["rows"]) else "run of a method"
        raise ValueError(
            f"every {which} failed; the last line of each is above, the whole output in {comparison.out}/runs"
        )


def _report(comparison: Any, *, whole: bool) -> dict[str, Any]:
    """Write results.json and report.html, and return the results."""
    from lorank.comparison.results import write_results
    from lorank.report.comparison import comparison_page
    from lorank.train.folder import write_whole

    results = write_results(comparison, whole=whole)
    write_whole(comparison.out / "report.html", comparison_page(results))
    return results


def _settings(
    recipe: str | None,
    methods: tuple[str, ...],
    seeds: str,
    sweep: tuple[str, ...],
    own: Any,
    match: Any,
    tasks: str,
    only: bool,
    **flags: Any,
) -> Any:
    """What `lorank compare` was asked for."""
    from lorank.comparison.settings import ComparisonSettings, parse_values
    from lorank.train.shipped import recipe_path
    from lorank.train.yamls import load

    base = recipe_of(recipe, flags, own=OWN, shared=True)
    if not all(re.fullmatch(r"\s*[0-9]+\s*", seed) for seed in seeds.split(",")):
        raise ValueError(f"--seeds must be whole numbers such as 1,2,3, got {seeds}")
    settings: dict[str, list[Any]] = {}
    for name, values in map(parse_values, sweep):
        settings.setdefault(name, []).extend(values)
    rate_given = "lr" in changes_of(flags) or (recipe and "lr" in load(recipe_path(recipe).read_text()))
    each: dict[str, dict[str, list[Any]]] = {}
    for row, text in own:
        name, values = parse_values(text)
        each.setdefault(row, {}).setdefault(name, []).extend(values)
    return ComparisonSettings(
        base=base,
        methods=[name for text in methods for name in text.split(",")],
        seeds=[int(seed) for seed in seeds.split(",")],
        sweep=settings,
        own=each,
        tuned="dense" if rate_given else "all",
        match=match,
        tasks=[task for task in tasks.split(",") if task],
        only=only,
    )
