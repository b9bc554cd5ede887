"""lorank plan: what training would take, method by method."""

import math
from typing import Any

import click

from lorank.cli.flags import SETTINGS, InGroups, budget_flags, changes_of, recipe_flags, recipe_of, split_budget
from lorank.sizes import find_size
from lorank.train.recipe import Recipe

PLANNED = {
    **dict.fromkeys(["optimizer", "rank", "options", "targets", "exclude", "checkpoint"]),
    "precision": "bf16",
    "sequence_length": 256,
    "batch_size": 512,
    "micro_batch_size": 16,
}
"""Settings that have a flag here, and what holds if neither the user nor a recipe sets them."""
VOCAB_SIZE = 32_000
OWN = {
    "size": "--size",
    "model": "--model",
    "method": "--method",
    "start_from": "lorank pretrain --start-from MODEL",
    "distil": "lorank pretrain --distil TEACHER",
}


@click.command(cls=InGroups, context_settings=SETTINGS)
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
    help="dense, a method, or several joined by +; may be repeated.",
    show_default="eight of them",
)
@recipe_flags(own=OWN, only=PLANNED)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=None,
    help="Optimizer steps.",
    show_default="the recipe's, else 20 tokens per parameter of the dense model",
)
@budget_flags
@click.option(
    "--accelerator", default="h100", metavar="NAME", help="Device to plan for, for example a100, h200 or rtx-4090."
)
@click.option(
    "--devices",
    type=click.IntRange(min=1),
    default=None,
    help="Number of devices, data parallel.",
    show_default="8; 1 for recipes and for what runs in one process",
)
@click.option(
    "--tensor-parallel",
    type=click.IntRange(min=2),
    default=None,
    metavar="N",
    help="Also show what N devices that share a model send each other.",
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
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values instead of tables.")
def plan(
    recipes: tuple[str, ...],
    sizes: tuple[str, ...],
    models: tuple[str, ...],
    methods: tuple[str, ...],
    steps: int | None,
    accelerator: str,
    devices: int | None,
    tensor_parallel: int | None,
    utilisation: float,
    flops: float | None,
    watts: float | None,
    price: float | None,
    fits: float | None,
    as_json: bool,
    as_csv: bool,
    **flags: Any,
) -> None:
    """Count what training would cost, method by method.

    The tables have parameters, FLOPs, memory, time, energy and price. Each RECIPE, a YAML file or the name of one that comes
    with lorank, gives one row: the cost of `lorank pretrain RECIPE`. Flags override the recipe as they do there. Without
    recipes there is a row for each method at each size or model, and --option applies to the methods that have the setting.
    Nothing is trained and no weights are allocated; a row needs a few seconds. Only --epochs reads the data. Padding counts as
    tokens, and --tokens-per-parameter means those of each row's own model.
    """
    if as_json and as_csv:
        raise ValueError("give --json or --csv, not both")
    if recipes and (sizes or models or methods):
        raise ValueError(
            "a recipe has its own model and method; plan for them separately, or leave out --size, --model and --method"
        )
    from lorank.accelerators import Fleet, check_memory, find_accelerator

    if fits is not None:
        check_memory(fits)  # before anything that takes seconds to import
    given: dict[str, Any] = {"flops": flops, "tf32_flops": flops, "watts": watts, "dollars_per_hour": price}
    device = find_accelerator(accelerator)._replace(**{k: value for k, value in given.items() if value is not None})
    fleet = Fleet(accelerator=device, devices=devices or (1 if recipes else 8), utilisation=utilisation)
    budget, flags = split_budget(flags if steps is None else {**flags, "steps": steps})
    from lorank.cli.console import errors_console, results_console, shown_work
    from lorank.plan import forecast
    from lorank.plan.fits import check_budget, fit_all
    from lorank.report import plans
    from lorank.train.budget import Budget

    console = results_console()
    with errors_console().status("counting") as status, shown_work(status):
        say = lambda line: status.update(f"counting {line}")  # noqa: E731
        if recipes:
            files = {path: recipe_of(path, flags) for path in recipes}
            if fits is not None:
                check_budget(files.values(), fits)
            found = forecast.forecast_recipes(
                files, fleet=fleet, budget=budget, tensor_parallel=tensor_parallel, say=say
            )
        else:
            asked = _shapes(forecast.split_names(sizes) or list(sizes), models, flags)
            if budget is None and "steps" in changes_of(flags):
                budget = Budget(steps=asked[0].steps)
            names = forecast.split_names(methods) if methods else list(forecast.METHODS)
            if fits is not None:
                check_budget((forecast.with_method(shape, name) for shape in asked for name in names), fits)
            alone = devices is None
            found = forecast.forecast_all(
                asked, names, fleet=fleet, budget=budget, alone=alone, tensor_parallel=tensor_parallel, say=say
            )
        fit = fit_all(found, fits, say=say) if fits is not None else None
    if as_json:
        click.echo(plans.forecasts_json(found, fit))
    elif as_csv:
        click.echo(plans.forecasts_csv(found, fit))
    else:
        console.print(plans.forecast_tables(found, fit), highlight=False)


def _shapes(sizes: list[str], models: tuple[str, ...], flags: dict[str, Any]) -> list[Recipe]:
    """A recipe for each size and model; its method does not matter."""
    for size in sizes:  # an empty one too
        find_size(size)
    defaults = {name: value for name, value in PLANNED.items() if value is not None}
    if batch_size := changes_of(flags).get("batch_size"):
        defaults["micro_batch_size"] = math.gcd(int(defaults["micro_batch_size"]), batch_size)
    if changes_of(flags).get("tokenizer") is None:
        defaults["vocab_size"] = VOCAB_SIZE
    shapes = [{"size": size} for size in sizes] + [{"model": model} for model in models] or [{"size": "60m"}]
    return [recipe_of(None, flags, own=OWN, base={**defaults, **shape}, shared=True) for shape in shapes]
