"""lorank bench: how fast methods train on this machine."""

from typing import Any

import click

from lorank.cli.flags import SETTINGS, InGroups, recipe_flags, recipe_of

TIMED = dict.fromkeys(
    ["size", "model", "rank", "options", "precision", "sequence_length", "batch_size", "micro_batch_size", "checkpoint"]
)
"""Settings that have a flag here."""
OWN = {
    "method": "--method",
    "start_from": "lorank pretrain --start-from MODEL",
    "distil": "lorank pretrain --distil TEACHER",
}


@click.command(cls=InGroups, context_settings=SETTINGS)
@click.argument("recipe", required=False)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="A method, or several with commas; may be repeated. The first is what the others are compared with.",
    show_default="dense,cola,cola-m",
)
@recipe_flags(own=OWN, only={**TIMED, "precision": "fp32; bf16 on CUDA"})
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=25.0, help="Time to spend in all, but three rounds at least."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def bench(recipe: str | None, methods: tuple[str, ...], seconds: float, as_json: bool, **flags: Any) -> None:
    """Time methods and the dense model, step by step in turn, on this machine.

    They take turns with forward and backward passes: through a block of the 1B shape, then through the whole model of
    RECIPE, a YAML file or the name of one that comes with lorank, or of --size or --model. Nothing is read or written.
    """
    import torch

    from lorank.cli.console import errors_console, results_console
    from lorank.plan import bench as timing
    from lorank.plan.forecast import split_names
    from lorank.report.bench import bench_json, bench_tables

    base = {"precision": "bf16"} if torch.cuda.is_available() else {}
    chosen = recipe_of(recipe, flags, own=OWN, base=base, shared=True)
    names = split_names(methods) if methods else list(timing.METHODS)
    console = results_console()
    with errors_console().status("timing") as status:
        found = timing.bench(chosen, names, seconds=seconds, say=lambda line: status.update(f"timing {line}"))
    if as_json:
        click.echo(bench_json(found))
    else:
        console.print(bench_tables(found), highlight=False)
