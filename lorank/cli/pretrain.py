"""lorank pretrain: train a model from scratch, or print what training would do."""

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorank.cli.flags import (
    BUDGETS,
    SETTINGS,
    Folder,
    InGroups,
    changes_of,
    recipe_flags,
    recipe_of,
    resume_flag,
    split_budget,
)

if TYPE_CHECKING:
    from lorank.train.budget import Budget
    from lorank.train.recipe import Recipe


@click.command(cls=InGroups, context_settings=SETTINGS)
@click.argument("recipe", required=False)
@recipe_flags(shown=dict.fromkeys(("optimizer", "lr"), "the best known for the method"))
@click.option("--out", type=Folder(), default=None, help="Folder of the run.", show_default="runs/METHODS-SIZE")
@resume_flag
@click.option(
    "--fsdp",
    is_flag=True,
    help="Under torchrun: each process has a part of the model and of its optimizer's state (FSDP2).",
)
@click.option(
    "--tensor-parallel",
    type=click.IntRange(min=1),
    metavar="N",
    default=1,
    help="Under torchrun: N processes share every matrix of a cola, cola-m or low-rank model.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Read the data, print what each layer becomes, parameters, FLOPs, memory and tokens, and stop.",
)
def pretrain(
    recipe: str | None,
    out: str | None,
    resume: str | None,
    fsdp: bool,
    tensor_parallel: int,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Pre-train a language model from scratch, or with --start-from train a saved one on.

    RECIPE is a YAML file, or the name of one that comes with lorank (cola-60m). Flags have the same names as its settings
    and override it; --set changes the settings that have no flag. Methods that answer different questions combine:
    --method cola+galore, or --method cola --optimizer galore. Without RECIPE, the optimizer and the learning rate are the
    best known for the method, unless they are given; and zero_outputs is, for a --size whose methods have no setting but a rank.

    Without any argument a tiny CoLA model learns Python's standard library in a few minutes on a CPU.
    """
    changes = changes_of(flags)
    engine = {"fsdp": fsdp, "tensor_parallel": tensor_parallel}
    if resume:
        return resumed(resume, flags, {recipe or "": recipe, "--out": out, "--dry-run": dry_run}, engine)
    budget, flags = split_budget(flags)
    if "start_from" in changes and recipe is None and "method" not in changes:
        from lorank.train.start import method_of_start

        flags = {**flags, "method": method_of_start(changes["start_from"])}
    settings = recipe_of(recipe, flags)
    if settings.start_from is not None:
        from lorank.train.start import started

        settings = started(settings)
    elif recipe is None:
        from lorank.cli.console import results_console
        from lorank.train.best import with_best

        settings, chosen = with_best(settings, changes)
        if chosen is not None:
            results_console().print(chosen, highlight=False)
    if dry_run:
        return show_plan(settings, budget)
    train(settings, out, budget, None, engine)


def resumed(
    run: str, flags: Mapping[str, Any], others: Mapping[str, Any], engine: Mapping[str, Any] | None = None
) -> None:
    """Go on with a run. `flags` may say how long it becomes; ValueError for any other, and for one of `others` that is given."""
    changes = changes_of(flags)
    given = [name for name, value in others.items() if value]
    given += [f"--{name.replace('_', '-')}" for name in changes if name not in ("steps", *BUDGETS)]
    if given:
        raise ValueError(f"--resume continues a run exactly as it began, or to more steps; leave out {given[0]}")
    budget, _ = split_budget(flags)
    if budget is None and "steps" in changes:
        from lorank.train.budget import Budget

        budget = Budget(steps=changes["steps"])
    train(None, None, budget, run, engine)


def show_plan(settings: "Recipe", budget: "Budget | None") -> None:
    """Print what a run would be."""
    from lorank.cli.console import results_console, shown_work
    from lorank.plan.dry_run import plan, plan_with_data
    from lorank.report.plans import plan_tables
    from lorank.train.data.sources import check_sources
    from lorank.train.model import warn_of_weights

    check_sources(settings.data, settings.validation)  # before the seconds that counting takes
    found = plan(settings)
    try:
        with shown_work():
            found = plan_with_data(settings, found, budget)
    finally:  # without data, what is known without them
        results_console().print(plan_tables(found), highlight=False)
    warn_of_weights(settings.model)


def train(
    settings: "Recipe | None",
    out: str | None,
    budget: "Budget | None",
    resume: str | None,
    engine: Mapping[str, Any] | None = None,
) -> None:
    """Run a recipe, or go on with the run `resume`, and print what came of it. `engine` has the fields of an `Engine`."""
    from lorank.cli.console import results_console, shown_run
    from lorank.report.markup import visible
    from lorank.report.tables import runs_table
    from lorank.speed.allocator import keep_freed_memory
    from lorank.train import run
    from lorank.train.engine import Engine
    from lorank.train.folder import read_json, read_run
    from lorank.train.methods import run_title

    keep_freed_memory()
    console = results_console()
    settings = settings or read_run(resume or "")
    named = settings.start_from or settings.model
    shape = named.rstrip("/").split("/")[-1] if named else settings.size
    title = run_title(settings)
    folder = Path(resume or out or f"runs/{title}-{shape}")
    with shown_run(f"{title} {shape}", console) as progress:
        summary = run.pretrain(
            settings,
            folder,
            budget=budget,
            resume=resume is not None,
            say=partial(console.print, markup=False, highlight=False, soft_wrap=True),
            callbacks=[progress],
            engine=Engine(**(engine or {})),
        )
    if summary is None:
        console.print(f"stopped; continue with [bold]lorank pretrain --resume {folder}[/bold]", highlight=False)
        sys.exit(130)
    console.print(runs_table({title: {**dataclasses.asdict(summary), "lr": settings.lr}}))
    console.print(f"\n{visible(summary.sample)}\n", markup=False, highlight=False)
    console.print(f"text: {visible(read_json(folder / 'run.json')['corpus'])}", markup=False, highlight=False)
    if settings.push_to_hub is not None:
        console.print(f"pushed to [bold]{settings.push_to_hub}[/bold]", highlight=False)
    console.print(f"model, metrics and model card are in [bold]{folder}[/bold]", highlight=False)
    if (folder / run.ADAPTER).exists():
        console.print(f"the adapter alone is in [bold]{folder / run.ADAPTER}[/bold]", highlight=False)
