"""A trained model for people who do not have lorank, in a new folder.

dense     every layer merged into the dense layer that it equals: plain transformers loads the model, and so does all else
          that reads such models
trained   the layers as they were trained, next to a modelling file if they can be written to one (`lorank.portable`)
adapter   what an adapter added to the model, without the model (`lorank.adapter_files`)
peft      the same as a LoRA of peft
onnx      one graph with a key-value cache (`lorank.train.onnx`)
"""

import dataclasses
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from lorank.adapter_files import export_peft, save_adapter
from lorank.auto import type_of
from lorank.conversion import merge, method_of
from lorank.train.card import NAME, Card, write_card
from lorank.train.folder import check_apart, prepare_folder
from lorank.train.push import check_push, push
from lorank.train.recipe import check_license
from lorank.train.saved import load_model, whole_files
from lorank.train.text import TRAINED_ON, keep_text, recipe_of_text

Write = Callable[[PreTrainedModel, Path], PreTrainedModel]
"""Writes a model to a folder in one of the formats, and returns what it wrote."""


def export(
    model: str,
    out: Path,
    write: Write,
    *,
    tokenizer: str | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
) -> str | None:
    """Write a saved model, a run or a folder or a hub name, to the folder `out` with its tokenizer and a model card.

    Returns:
        Where it is on the hub, if it was pushed to `push_to_hub`.

    Raises:
        ValueError: `out` contains a model or is in the text that it was trained on, there is none to export, it has not that format, or nothing can be pushed.
        OSError: a file could not be written, or not be pushed.
    """
    check_license(license)
    check_folder(model, out)
    if (recipe := recipe_of_text(model)) is not None:
        check_apart(out, recipe.data, recipe.validation)
    place = None if push_to_hub is None else check_push(push_to_hub)
    loaded, reader = load_model(model, tokenizer=tokenizer, of_any_kind=True)
    prepare_folder(out, resume=True)
    try:
        with whole_files(out) as staging:
            loaded.config.use_cache = True
            method = method_of(loaded)
            written = write(loaded, staging)
            reader.save_pretrained(staging)
            names = sorted(file.name for file in staging.iterdir())
        keep_text(model, out)
        card = Card.of(written, names, run=model, method=method, license=license)
        write_card(out, dataclasses.replace(card, place=place or card.place))
    finally:
        if not any(out.iterdir()):
            out.rmdir()
    if place is None:
        return None
    again = f"hf upload {place} {shlex.quote(str(out))} . --private --exclude {TRAINED_ON}"
    return push(out, [*names, NAME], place, again=again)


def check_folder(model: str, out: Path) -> None:
    """Raises ValueError if an export to `out` would replace a model."""
    if os.path.realpath(out) == os.path.realpath(os.path.expanduser(model)):
        raise ValueError(f"--out must be another folder than the model's, got {out}")
    for name in ("config.json", "recipe.yaml", "adapter.json", "adapter_config.json"):
        if (out / name).exists():
            raise ValueError(f"--out must be a folder without a model, got {out}, which has {name}; choose another one")


def as_dense(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model of transformers with the same outputs.

    Raises:
        ValueError: there is none.
    """
    instead = "export the layers as they are with --format trained, or as a graph with --format onnx"
    if method_of(model) is not None:
        try:
            model = merge(model)
        except ValueError as error:
            raise ValueError(f"{error}; {instead}") from None
    elif not type(model).__module__.startswith("transformers."):
        raise ValueError(f"transformers has no model of type {type_of(model.config)}; {instead}")
    model.save_pretrained(folder)
    return model


def as_trained(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The layers as they are."""
    model.save_pretrained(folder)
    return model


def as_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """What an adapter added, and the hash of what it belongs to."""
    save_adapter(model, folder)
    return model


def as_peft(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """An adapter as a LoRA of peft."""
    export_peft(model, folder)
    return model
