"""The command line: reads what the user wants, calls the library, prints what came out.

Nothing heavy is imported before a command runs, so that ``lorank --help`` answers at once.
"""

import dataclasses
import errno
import os
import re
import sys
import typing
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

import lorank
from lorank.fields import alternatives_of, field_types
from lorank.sizes import find_size
from lorank.train.recipe import Recipe

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
SEED = click.IntRange(min=0, max=2**32 - 1)


@click.group(context_settings=SETTINGS)
@click.version_option(lorank.__version__, prog_name="lorank")
def cli() -> None:
    """Train language models whose structure is low rank, from the first token on."""


def main() -> None:
    """Entry point: a mistake or a failing disk is one sentence on stderr and exit code 2, without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        help = f"; see {error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else ""
        click.echo(f"lorank: {error.format_message().rstrip('.')}{help}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("LORANK_TRACEBACK"):
            raise
        click.echo(f"lorank: {_sentence(error)}", err=True)
        sys.exit(2)
    except Exception as error:
        if os.environ.get("LORANK_TRACEBACK"):
            raise
        click.echo(
            f"lorank: unexpected {type(error).__name__}: {_sentence(error)} (LORANK_TRACEBACK=1 shows where; please report it)",
            err=True,
        )
        sys.exit(1)


def _sentence(error: Exception) -> str:
    """What an error says, on one line; a full disk, which names no file, with where to look."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return (
            "the disk is full: free some space where --out, the cache (XDG_CACHE_HOME) or temporary files (TMPDIR) lie"
        )
    text = " ".join(str(error).split())
    return text if len(text) < 1000 else f"{text[:1000]} ..."


# ---------------------------------------------------------------------------------------------------------------------
# Flags made from the recipe's fields: one source of names, types and help
# ---------------------------------------------------------------------------------------------------------------------


class Number(click.ParamType):
    """An integer or a fraction."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return float(value) if any(c in str(value) for c in ".eE") else int(value)
        except ValueError:
            self.fail(f"{value!r} is neither an integer nor a fraction such as 0.25", param, ctx)


def _flag(field: dataclasses.Field, kind: Any, instead: Any = None) -> Any:
    """The flag of a field; `instead` of its default the help shows that."""
    alternatives = [option for option in alternatives_of(kind) if option is not type(None)]
    first, name = alternatives[0], f"--{field.name.replace('_', '-')}"
    default = instead or (field.default if field.default is not dataclasses.MISSING else None)
    shown = str(default) if default is not None else False
    common: dict[str, Any] = {"help": field.metadata["help"], "default": None, "show_default": shown}
    if field.name == "options":
        return click.option("--option", "options", multiple=True, metavar="NAME=VALUE", **common)
    if field.name == "betas":
        return click.option("--betas", nargs=2, type=float, **{**common, "show_default": "0.9 0.95"})
    if typing.get_origin(first) is list:
        return click.option(name, multiple=True, metavar="TEXT", **common)
    if first is bool:
        return click.option(f"{name}/--no-{name[2:]}", **common)
    if typing.get_origin(first) is typing.Literal:
        return click.option(name, type=click.Choice(typing.get_args(first)), **common)
    return click.option(name, type=Number() if len(alternatives) > 1 else first, **common)


def recipe_flags(command: Any, without: tuple[str, ...] = (), only: Mapping[str, Any] | None = None) -> Any:
    """Give a command one flag per field of `Recipe`, or per one that is named with another default or None."""
    kinds = field_types(Recipe)
    for field in reversed(dataclasses.fields(Recipe)):
        if field.name not in without and (only is None or field.name in only):
            command = _flag(field, kinds[field.name], (only or {}).get(field.name))(command)
    return command


def _recipe(path: str | None, flags: dict[str, Any]) -> Recipe:
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    if "options" in given:
        given["options"] = dict(_name_and_value(text) for text in given["options"])
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return Recipe.read(path, **given) if path else Recipe.from_dict(given)


def _name_and_value(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option {text!r} is not NAME=VALUE, for example nonlinearity=low-rank")
    return name, yaml.safe_load(value)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


@cli.command(context_settings=SETTINGS)
@click.argument("recipe", required=False)
@recipe_flags
@click.option("--out", default=None, help="Folder of the run.", show_default="runs/METHOD-SIZE")
@click.option(
    "--resume", metavar="RUN", default=None, help="Continue this run from its newest checkpoint, exactly as it began."
)
@click.option("--dry-run", is_flag=True, help="Print what becomes what, parameters, FLOPs and memory, and stop.")
def pretrain(recipe: str | None, out: str | None, resume: str | None, dry_run: bool, **flags: Any) -> None:
    """Pre-train a language model from scratch. RECIPE is a YAML file; flags have the same names and win over it.

    Without any argument a tiny CoLA model learns Python's standard library in a few minutes on a CPU.
    """
    given = [name for name, value in flags.items() if value not in (None, ())]
    if resume and (recipe or out or given or dry_run):
        other = recipe or ("--out" if out else "--dry-run" if dry_run else f"--{given[0].replace('_', '-')}")
        raise ValueError(f"--resume continues a run exactly as it began, so {other} cannot be given with it")
    if not resume:
        settings = _recipe(recipe, flags)
    console = _quiet_console()
    if dry_run:
        from lorank.plan.run import plan
        from lorank.report.tables import plan_tables

        return console.print(plan_tables(plan(settings)), highlight=False)
    from lorank.report.markup import visible
    from lorank.report.progress import TerminalProgress
    from lorank.report.tables import runs_table
    from lorank.train import run
    from lorank.train.folder import read_run

    if resume:
        settings = read_run(resume)
    shape = settings.model.rstrip("/").split("/")[-1] if settings.model else settings.size
    folder = Path(resume or out or f"runs/{settings.method}-{shape}")
    progress = TerminalProgress(f"{settings.method} {shape}", console)
    try:
        summary = run.pretrain(settings, folder, resume=resume is not None, callbacks=[progress])
    finally:
        progress.close()
    if summary is None:
        console.print(f"stopped; continue with [bold]lorank pretrain --resume {folder}[/bold]", highlight=False)
        sys.exit(130)
    console.print(runs_table({settings.method: {**dataclasses.asdict(summary), "lr": settings.lr}}))
    console.print(f"\n{visible(summary.sample)}\n", markup=False, highlight=False)
    console.print(f"model, metrics and model card are in [bold]{folder}[/bold]", highlight=False)


PLANNED = {
    **dict.fromkeys(
        ["rank", "options", "targets", "exclude", "checkpoint", "checkpoint_every", "attention", "optimizer"]
    ),
    "precision": "bf16",
    "vocab_size": 32_000,
    "sequence_length": 256,
    "batch_size": 512,
    "micro_batch_size": 16,
}
"""What `lorank plan` lets a user set of a recipe, and what it takes where neither the user nor a recipe says."""


@cli.command(context_settings=SETTINGS)
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="NAME",
    help="Llama of this size, 20m to 7b; may be repeated.",
    show_default="60m",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="CONFIG",
    help="A model type, folder, config.json or hub name; may be repeated.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="dense or a method; may be repeated.",
    show_default="eight of them",
)
@partial(recipe_flags, only=PLANNED)
@click.option(
    "--tokens",
    default=None,
    metavar="N",
    help="Budget, such as 1.1B.",
    show_default="20 per dense parameter, or the recipe's steps",
)
@click.option("--accelerator", default="h100", metavar="NAME", help="What the run is priced for.")
@click.option(
    "--devices",
    type=click.IntRange(min=1),
    default=None,
    help="How many of them, data parallel.",
    show_default="8, with recipes 1",
)
@click.option(
    "--utilisation", type=float, default=0.4, help="Assumed part of the peak rate; recomputation counts as work."
)
@click.option(
    "--flops", type=float, default=None, help="Peak FLOP/s of a device, in any precision.", show_default="data sheet"
)
@click.option("--watts", type=float, default=None, help="Power of a device.", show_default="data sheet")
@click.option("--price", type=float, default=None, help="Dollars per device and hour.", show_default="assumed")
@click.option(
    "--fits", type=float, default=None, metavar="GIB", help="Also find what fits in that much memory (some 10 s a row)."
)
@click.option(
    "--paper", default=None, metavar="NAME", help="Instead: a paper's published costs beside ours; all: every one."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values instead of tables.")
@click.pass_context
def plan(ctx: click.Context, paper: str | None, as_json: bool, as_csv: bool, fits: float | None, **given: Any) -> None:
    """What training would take before it is begun: parameters, FLOPs, memory, time, energy and price, method by method.

    Each RECIPE, a YAML file, is one row: the run that `lorank pretrain RECIPE` makes, where flags win over it as there. Without
    recipes there is a row for each method at each size or model; an option goes to the methods that have it. Nothing is
    trained, and no memory is taken for the models; a few seconds for each row.
    """
    if as_json and as_csv:
        raise ValueError("--json and --csv exclude each other; give one of them")
    console = _quiet_console()
    if paper is not None:
        flags = {option.name: option.opts[0] for option in ctx.command.params} | {"recipes": "the recipe"}
        untouched = click.core.ParameterSource.DEFAULT
        free = ("paper", "as_json", "as_csv")
        for name in ctx.params:
            if name not in free and ctx.get_parameter_source(name) != untouched:
                raise ValueError(f"--paper prints published costs at the paper's own settings; drop {flags[name]}")
        return _print_papers(console, paper, as_json, as_csv)
    from lorank.accelerators import Fleet, check_memory, find_accelerator

    if fits is not None:
        check_memory(fits)  # before anything that takes seconds to import
    from lorank.plan import forecast
    from lorank.report import plans

    flops = given.pop("flops")
    overrides = {
        "flops": flops,
        "tf32_flops": flops,
        "watts": given.pop("watts"),
        "dollars_per_hour": given.pop("price"),
    }
    accelerator = find_accelerator(given.pop("accelerator"))
    accelerator = accelerator._replace(**{name: value for name, value in overrides.items() if value is not None})
    recipes = given.pop("recipes")
    devices = given.pop("devices") or (1 if recipes else 8)
    fleet = Fleet(accelerator=accelerator, devices=devices, utilisation=given.pop("utilisation"))
    tokens = given.pop("tokens")
    budget = None if tokens is None else forecast.read_tokens(tokens)
    sizes, models, methods = (given.pop(name) for name in ("sizes", "models", "methods"))
    if recipes and (sizes or models or methods):
        raise ValueError(
            "a recipe has its own model and method; plan for them apart, or drop --size, --model and --method"
        )
    named = forecast.split_names(sizes)
    for size in named or sizes:  # of --size "" the latter says that it is none
        find_size(size)
    shapes = [{"size": size} for size in named] + [{"model": model} for model in models] or [{"size": "60m"}]
    names = forecast.split_names(methods) if methods else list(forecast.METHODS)
    flags = {name: value for name, value in given.items() if value not in (None, ())}
    with _errors_console().status("counting") as status:
        say = lambda line: status.update(f"counting {line}")  # noqa: E731
        if recipes:
            files = {path: _recipe(path, flags) for path in recipes}
            if fits is not None:
                forecast.check_budget(files.values(), fits)
            found = forecast.forecast_recipes(files, fleet=fleet, tokens=budget, say=say)
        else:
            asked = [_recipe(None, {**PLANNED, **flags, **shape}) for shape in shapes]
            if fits is not None:
                forecast.check_budget((forecast.with_method(shape, name) for shape in asked for name in names), fits)
            found = forecast.forecast_all(asked, names, fleet=fleet, tokens=budget, say=say)
        fit = forecast.fit_all(found, fits, say=say) if fits is not None else []
    if as_json:
        click.echo(plans.forecasts_json(found, fit, fits))
    elif as_csv:
        click.echo(plans.forecasts_csv(found, fit, fits))
    else:
        console.print(plans.forecast_tables(found, fit, fits or 0), highlight=False)


def of_saved_model(command: Any) -> Any:
    """Flags of what reads a text with a model that has been trained on another part of it."""
    seed = "The run's data_seed, or its seed if it has none: it decides what was held out."
    tokenizer: dict[str, Any] = {
        "metavar": "NAME",
        "help": "Folder or hub name, or bytes.",
        "show_default": "the model's",
    }
    return click.option("--seed", type=SEED, default=42, help=seed)(
        click.option("--tokenizer", default=None, **tokenizer)(command)
    )


@cli.command(context_settings=SETTINGS)
@click.argument("model")
@click.option("--data", default="embedded", help="As in pretrain; of embedded and hub data the held-out part is used.")
@click.option("--sequence-length", type=click.IntRange(min=2), default=256, help="Tokens per sequence.")
@click.option("--documents", type=click.Choice(["packed", "padded"]), default="packed", help="As in pretrain.")
@click.option("--text-column", default="text", help="As in pretrain.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Sequences per batch.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=10_000_000, help="Stop after this many predicted tokens."
)
@of_saved_model
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(model: str, as_json: bool, **settings: Any) -> None:
    """Perplexity of MODEL (a run, a folder, a hub name): unbiased, per byte, and as the published tables compute it."""
    console = _quiet_console()
    from lorank.report.tables import evaluation_table
    from lorank.train.saved import evaluate_folder

    found = evaluate_folder(model, **settings)
    if as_json:
        import json

        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        console.print(evaluation_table(found), highlight=False)


@cli.command(context_settings=SETTINGS)
@click.argument("model")
@click.option("--data", default="embedded", help="As in pretrain; of embedded and hub data the held-out part is used.")
@click.option("--sequence-length", type=click.IntRange(min=2), default=256, help="Tokens per sequence.")
@click.option("--documents", type=click.Choice(["packed", "padded"]), default="packed", help="As in pretrain.")
@click.option("--text-column", default="text", help="As in pretrain.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Sequences per batch.")
@click.option("--tokens", type=click.IntRange(min=1), default=50_000, help="Stop after this many tokens.")
@click.option(
    "--gradient-batches",
    type=click.IntRange(min=0),
    default=1,
    help="Batches whose mean gradient is looked at; 0: none. Several need room for all gradients, as large as the weights.",
)
@click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    default=None,
    metavar="GIB",
    help="Room for sums over activations; where they need more, the text is gone through several times.",
    show_default="half of what is free",
)
@click.option("--alpha", type=float, default=0.95, help="Part of the energy that the effective rank is to hold.")
@click.option(
    "--budget",
    default=None,
    metavar="N",
    help="Suggest ranks: parameters such as 10M, or a part of the dense ones: 0.5.",
)
@of_saved_model
@click.option("--out", default=None, help="Folder of what is written.", show_default="runs/analyze-MODEL")
def analyze(model: str, out: str | None, **settings: Any) -> None:
    """How many dimensions MODEL (a run, a folder, a hub name) uses: effective rank of activations, weights, gradients.

    Writes results.json, analysis.html and, with --budget, suggested.yaml: ranks for `lorank pretrain`. Needs memory for the
    weights, the activations of a batch, and sums of 8 bytes times the square of each width, within --memory: of a 7B model
    208 GB at once, or 3 GB for one projection at a time.
    """
    console = _quiet_console()
    from lorank.report.analysis import analysis_page
    from lorank.report.effective_ranks import analysis_table, budget_line, loss_line
    from lorank.train.analysis import analyze_folder
    from lorank.train.folder import write_whole

    folder = Path(out or f"runs/analyze-{model.rstrip('/').split('/')[-1]}")
    with _errors_console().status("loading") as status:
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
                f"no recipe, for pretrain cannot train it: {refused}", markup=False, highlight=False, soft_wrap=True
            )
    console.print(f"report: [bold]{folder}/analysis.html[/bold]", highlight=False, soft_wrap=True)


@cli.command(context_settings=SETTINGS)
@click.argument("model")
@click.option("--prompt", default="", help="Text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, help="Tokens to write.")
@click.option("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time.")
@click.option("--top-k", type=click.IntRange(min=0), default=50, help="Sample among the k likeliest tokens; 0: all.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Sample within this probability mass."
)
@click.option("--seed", type=SEED, default=None, help="Makes sampling repeatable.")
def generate(model: str, **settings: Any) -> None:
    """Text from MODEL (a run, a folder, a hub name)."""
    _quiet_console()
    from lorank.train.generation import generate_text
    from lorank.train.saved import load_model

    click.echo(generate_text(*load_model(model), **settings))


@cli.command(context_settings=SETTINGS)
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
    console = _quiet_console()
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
    from lorank.plan.run import count, empty_model

    settings = dataclasses.replace(found[0].recipe, tokenizer=None)  # its vocabulary is written in the recipe
    console.print(report.card(found[0], count(settings, empty_model(settings))), highlight=False)


def _first_steps(console: Any, one: Any, details: bool) -> bool:
    """Runs, prints and judges one miniature."""
    from lorank.race import repro as library
    from lorank.report import repro as report

    expected = library.recorded(one)
    with _errors_console().status(f"{one.name}: {library.STEPS} steps"):
        curve = library.first_steps(one.recipe)
    if details:
        console.print(report.changes_table(library.differences(one.recipe)), "", highlight=False)
        console.print(report.curve_table(curve, expected), "", highlight=False)
    console.print(report.first_steps_line(one, curve, expected), highlight=False, soft_wrap=True)
    return library.deviation(curve, expected)[0] <= library.tolerance_of(one.recipe)


@cli.command(context_settings=SETTINGS)
@click.option("--out", default="runs/demo", help="Folder of the two runs and the picture.")
@click.option(
    "--steps",
    type=click.IntRange(min=10),
    default=None,
    help="Optimizer steps of each run.",
    show_default="the recipe's",
)
def demo(out: str, steps: int | None) -> None:
    """Pre-train CoLA and its dense twin on Python's standard library, and compare them."""
    console = _quiet_console()
    from lorank.report.markup import visible
    from lorank.report.tables import runs_table
    from lorank.train.demo import run_demo

    summaries = run_demo(Path(out), steps, say=lambda line: console.print(f"[bold]{line}[/bold]", highlight=False))
    rates = "its best learning rate of one sweep" + (" (of the whole demo, not of this short one)" if steps else "")
    console.rule(f"CoLA and its dense twin: same tokens, each at {rates}")
    console.print(runs_table(summaries))
    for method, summary in summaries.items():
        console.rule(f"{method} writes", align="left")
        console.print(visible(summary["sample"]), markup=False, highlight=False)
    console.rule()
    console.print(f"runs and curves: [bold]{out}/dense[/bold], [bold]{out}/cola[/bold], [bold]{out}/loss.png[/bold]")


def _print_papers(console: Any, name: str, as_json: bool, as_csv: bool) -> None:
    from lorank.papers import PAPERS, find_paper
    from lorank.report import papers

    found = [find_paper(paper) for paper in (PAPERS if name == "all" else [name])]
    if as_json:
        click.echo(papers.papers_json(found))
    elif as_csv:
        click.echo(papers.papers_csv(found))
    else:
        console.print(papers.paper_tables(found), highlight=False)


def _errors_console() -> Any:
    """A console for what passes: progress that leaves no trace in what is piped on."""
    from rich.console import Console

    return Console(stderr=True)


@cli.command(context_settings=SETTINGS)
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
@partial(recipe_flags, without=("method", "seed"))
def compare(out: str, resume: str | None, **asked: Any) -> None:
    """Train several methods on the same tokens in the same order, and write a report.

    RECIPE and the flags of `lorank pretrain` are what all have in common. A dense model trained by AdamW and by Muon, and a
    narrower one of the same architecture (dense-small) run as well. dense-small has the FLOPs per token of the cheapest method;
    where none saves those, its parameters or memory; and the report says why where there is none. Without --lr or --sweep lr=...
    a method takes the learning rate that its recipe at that --size names; where there is none, and for dense rows, the best
    of three. With --lr methods take that, and dense rows the best of it, a third and three times it. The same command again,
    or --resume, continues what was stopped.
    """
    console = _quiet_console()
    from lorank.race.compare import Race
    from lorank.report.comparison import comparison_table, write_results
    from lorank.report.race import RaceProgress

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

    base = _recipe(recipe, flags)
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


def _quiet_console() -> Any:
    """A console for results, with the chatter of libraries turned down."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import warnings

    warnings.formatwarning = lambda message, *args, **kwargs: f"lorank: {message}\n"  # without the line of the code
    from rich.console import Console
    from transformers.utils import logging

    logging.disable_progress_bar()
    return Console(quiet=os.environ.get("RANK", "0") != "0")  # under torchrun the first process speaks


if __name__ == "__main__":
    main()
