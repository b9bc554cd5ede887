"""lorank export: a trained model in a form that other people's tools load."""

from pathlib import Path
from typing import Any

import click

from lorank.cli.flags import SETTINGS, Folder


@click.command(context_settings=SETTINGS)
@click.argument("model")
@click.option("--out", type=Folder(), default=None, help="Folder of the result.", show_default="runs/export-MODEL")
@click.option(
    "--format",
    "form",
    type=click.Choice(["dense", "trained", "adapter", "peft", "onnx"]),
    default="dense",
    help="dense: merged into dense layers, for plain transformers and what reads its models. trained: the layers as they are. "
    "adapter: what an adapter added, without the model. peft: the same as a LoRA of peft. "
    "onnx: a graph with a key-value cache (needs onnx and onnxscript).",
)
@click.option(
    "--tokenizer", default=None, metavar="NAME", help="Folder or hub name, or bytes.", show_default="the model's"
)
@click.option(
    "--license",
    default=None,
    metavar="ID",
    help="Licence for the model card, such as apache-2.0 or mit.",
    show_default="the run's, else none",
)
@click.option(
    "--push-to-hub",
    default=None,
    metavar="NAME",
    help="Also push it to this name on the hub, such as me/my-model; a new one is private.",
)
def export(model: str, out: str | None, form: str, **settings: Any) -> None:
    """Write a trained model for people who do not have lorank.

    MODEL is a run, a folder or a hub name. A method whose layers equal dense ones (low-rank, relora, switchlora, sst, sltrain,
    masa, self-guided) is merged, with the same outputs. The others (cola, crnet) keep their layers: --format trained writes
    them next to a file from which transformers loads them with trust_remote_code=True.
    """
    from lorank.cli.console import errors_console, results_console
    from lorank.train.export import as_adapter, as_dense, as_peft, as_trained, check_folder
    from lorank.train.export import export as write

    console = results_console()
    folder = Path(out or f"runs/export-{model.rstrip('/').split('/')[-1]}")
    check_folder(model, folder)  # before anything that takes seconds to import
    writers = {"dense": as_dense, "trained": as_trained, "adapter": as_adapter, "peft": as_peft}
    if form == "onnx":
        writers["onnx"] = _as_onnx()
    with errors_console().status("exporting"):
        place = write(model, folder, writers[form], **settings)
    if place is not None:
        console.print(f"pushed to [bold]{place}[/bold]", highlight=False, soft_wrap=True)
    console.print(f"the model is in [bold]{folder}[/bold]", highlight=False, soft_wrap=True)


def _as_onnx() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError(
            "--format onnx needs onnx and onnxscript; install them with: pip install onnx onnxscript"
        ) from None
    from lorank.train.onnx import as_onnx

    return as_onnx
