"""lorank compress: a trained dense model in a smaller form."""

import sys
from pathlib import Path
from typing import Any

import click

from lorank.cli.flags import SETTINGS, Folder, name_and_value, of_saved_model


@click.command(context_settings=SETTINGS)
@click.argument("model", required=False)
@click.option("--method", default="svd", help="The form: svd, eora, cola, dictionary, pela, masa, int2 or codebook.")
@click.option(
    "--budget",
    default=None,
    metavar="N",
    help="Parameters in the factors: a part of those of the dense matrices such as 0.5, or a number such as 10M.",
    show_default="0.5; eora, int2: 0.1; codebook: 0.05; pela: 1/3",
)
@click.option(
    "--policy",
    type=click.Choice(["uniform", "energy", "break-even"]),
    default="uniform",
    help="Who gets them: each matrix the same part; those that gain most; or all up to the break-even rank, without a budget.",
)
@click.option(
    "--metric",
    type=click.Choice(["gram", "identity"]),
    default="gram",
    help="Which error is least: that of the layers' outputs on the text, or that of the weights.",
)
@click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="A setting of the method, such as base=int3."
)
@click.option("--targets", multiple=True, metavar="REGEX", help="As in pretrain.")
@click.option("--exclude", multiple=True, metavar="REGEX", help="As in pretrain.")
@of_saved_model
@click.option("--tokens", type=click.IntRange(min=1), default=100_000, help="Tokens of text for the metric.")
@click.option(
    "--eval-tokens",
    type=click.IntRange(min=1),
    default=50_000,
    help="Other tokens, to judge the model by before and after; at most a quarter of the text.",
)
@click.option(
    "--out", type=Folder(), default=None, help="Folder of the result.", show_default="runs/compress-METHOD-MODEL"
)
@click.option(
    "--resume",
    type=Folder(),
    metavar="DIR",
    default=None,
    help="Continue the compression that was stopped in this folder.",
)
def compress(model: str | None, out: str | None, resume: str | None, options: tuple[str, ...], **flags: Any) -> None:
    """Write a trained dense model in a smaller form, without training.

    MODEL is a run, a folder or a hub name. Its matrices become factors that keep what its layers compute on the text. The command
    prints what each projection lacks, and perplexity, size and speed before and after. The result is a model that transformers
    loads after `import lorank`, and that `lorank export` makes dense again. After Ctrl-C finished projections are kept.
    """
    from lorank.cli.console import errors_console, results_console, shown_work
    from lorank.report.compression import errors_table, sizes_table
    from lorank.train.compress import Job, compress_folder, unfinished

    if resume is not None:
        job, folder = _job_of(resume, model), Path(resume)
    else:
        if model is None:
            raise ValueError("MODEL must be a run, a folder or a hub name, got none")
        own = ("method", "budget", "policy", "metric", "targets", "exclude", "tokens", "eval_tokens", "tokenizer")
        given: dict[str, Any] = {
            name: [*value] if isinstance(value, tuple) else value for name, value in flags.items() if name in own
        }
        text = {name: value for name, value in flags.items() if name not in own and value is not None}
        settings = dict(name_and_value(one, "--option") for one in options)
        job = Job(model=model, settings=settings, text=text, **given)
        folder = Path(out or f"runs/compress-{job.method}-{model.rstrip('/').split('/')[-1]}")
    console = results_console()
    try:
        with errors_console().status("loading") as status, shown_work(status):
            results = compress_folder(job, folder, resume=resume is not None, say=status.update)
    except KeyboardInterrupt:
        try:
            unfinished(folder)
        except ValueError:
            raise KeyboardInterrupt from None  # nothing was finished
        console.print(f"stopped; continue with [bold]lorank compress --resume {folder}[/bold]", highlight=False)
        sys.exit(130)
    console.print(errors_table(results), highlight=False)
    console.print()
    console.print(sizes_table(results), highlight=False)
    console.print(f"\nthe model is in [bold]{folder}[/bold]", highlight=False, soft_wrap=True)


def _job_of(resume: str, model: str | None) -> Any:
    """The job that was stopped in a folder; ValueError if the command line says something else too."""
    from lorank.train.compress import unfinished

    context, default = click.get_current_context(), click.core.ParameterSource.DEFAULT
    given = [name for name in context.params if context.get_parameter_source(name) is not default]
    others = [name for name in given if name != "resume"]
    if others:
        flag = {"model": model, "options": "--option"}.get(others[0], f"--{others[0].replace('_', '-')}")
        raise ValueError(f"--resume continues a compression exactly as it began; leave out {flag}")
    return unfinished(Path(resume))
