"""The command line: one command, one file. A command reads what the user wants, calls the library and prints the result.

Nothing heavy is imported before a command runs, so that ``lorank --help`` answers at once.
"""

import importlib.metadata
import os
import platform
from typing import Any

import click

import lorank
from lorank.cli import (
    analyze,
    bench,
    cache,
    compare,
    compress,
    continual,
    demo,
    errors,
    evaluate,
    export,
    federated,
    finetune,
    generate,
    papers,
    plan,
    pretrain,
    recipes,
    repro,
)
from lorank.cli.flags import SETTINGS
from lorank.fields import unknown

COMMANDS = (
    analyze.analyze,
    bench.bench,
    cache.cache,
    compare.compare,
    compress.compress,
    continual.continual,
    demo.demo,
    evaluate.evaluate,
    export.export,
    federated.federated,
    finetune.finetune,
    generate.generate,
    papers.papers,
    plan.plan,
    pretrain.pretrain,
    recipes.recipes,
    repro.repro,
)
PACKAGES = ("torch", "transformers", "accelerate", "datasets")
"""Their versions decide what a run computes."""


def _print_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    """What a report of a problem needs; the device comes last, because asking for it takes a second."""
    if not wanted or ctx.resilient_parsing:
        return
    lines = {"lorank": lorank.__version__, "Python": platform.python_version()}
    lines |= {name: _version_of(name) for name in PACKAGES}
    for name, value in {**lines, "platform": platform.platform()}.items():
        click.echo(f"{name:<14}{value}")
    click.echo(f"{'device':<14}{_device()}")
    ctx.exit()


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    try:
        import torch

        found = torch.accelerator.current_accelerator()
        if found is None:
            return "cpu"
        name = torch.cuda.get_device_name() if found.type == "cuda" else found.type
        return f"{torch.accelerator.device_count()} x {name}"
    except Exception as error:  # a broken torch is what the report may be about
        return f"unknown: {errors.sentence(error)}"


class Commands(click.Group):
    """Commands, the nearest of which is named when one is mistyped."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            raise ValueError(unknown("command", name, known))
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings=SETTINGS, invoke_without_command=True)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    show_default=False,
    help="Print the versions of lorank and of the packages that it uses, and exit.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train language models whose structure is low rank, from the first token on."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _command in COMMANDS:
    cli.add_command(_command)


def main() -> Any:
    """Entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    errors.run(cli)


if __name__ == "__main__":
    main()
