"""A trained model on disk: written and loaded. Weights are read from safetensors alone; a pickle may hold code."""

import contextlib
import copy
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorank.adapter_files import ABOUT
from lorank.auto import type_of
from lorank.train.data import load_tokenizer
from lorank.train.entries import last_line
from lorank.train.hub import ForeignCode, asked_if_reachable, is_reachable, own_code, read_config
from lorank.trial import check_quantization
from lorank.whole import open_to_others


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> list[str]:
    """Save model and tokenizer in `out`, and return the names of the files."""
    with whole_files(out) as staging:
        model.config.use_cache = True
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        return sorted(file.name for file in staging.iterdir())


@contextlib.contextmanager
def whole_files(out: Path) -> Iterator[Path]:
    """A folder for the files of a model, which are moved to `out` when all of them are written.

    Raises:
        OSError: a file could not be written, or not be moved.
    """
    try:
        with _staging(out) as staging:
            yield staging
            files = [*staging.iterdir()]
            open_to_others(files)
            for file in files:
                os.replace(file, out / file.name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write the model to {out}: {str(error).splitlines()[0]}") from error


def rehearse_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write to `out` what `save_model` will, but for the weights, read it back, and remove it: what fails here would lose a
    run at its end.

    Raises:
        ValueError: the configuration or the tokenizer cannot be saved, or not be read again.
        OSError: the disk is full, or the like.
    """
    with _staging(out) as staging:
        try:
            what = "the model's configuration"
            config: PretrainedConfig = copy.deepcopy(model.config)
            config.use_cache = True
            config.save_pretrained(staging)
            AutoConfig.from_pretrained(staging)
            if model.generation_config is not None:
                what = "the model's settings of generation"
                copy.deepcopy(model.generation_config).save_pretrained(staging)
            what = "the tokenizer"
            tokenizer.save_pretrained(staging)
            what = "a file of weights"
            save_file({"weight": torch.zeros(1)}, staging / "model.safetensors")
        except Exception as error:  # each of these classes checks its settings in its own way
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk
            raise ValueError(f"{what} cannot be saved in {out}: {last_line(error)}") from error


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder in `out` that is removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix=".model-", dir=out))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_model(
    folder: str, *, tokenizer: str | None = None, of_any_kind: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A saved model (folder or hub name) and its tokenizer, in evaluation mode.

    Args:
        tokenizer: folder or hub name of another one, or "bytes"; by default the model's own.
        of_any_kind: also load other models than causal language models, as the class that config.json names: a masked
            language model, or a body without a head.

    Raises:
        ValueError: there is no model, its weights are not safetensors or not finite, it does not read text, or it names code that
            would be downloaded.
    """
    if not folder.strip():
        raise ValueError("model must be a run, a folder with a config.json or a hub name, got an empty name")
    path = Path(folder).expanduser()
    looks_local = folder.startswith((".", "/", "~")) or path.exists()
    if looks_local and not (path / "config.json").exists():
        hints = {
            "recipe.yaml": "; it is an unfinished run: continue it with --resume",
            ABOUT: "; it is an adapter alone: lorank.load_adapter puts it on its model",
        }
        hint = next((words for file, words in hints.items() if (path / file).exists()), "")
        missing = "it has no config.json" if path.is_dir() else "there is no such folder"
        raise ValueError(f"{folder} must be a folder with a model, but {missing}{hint}")
    place = str(path) if looks_local else folder
    try:
        with asked_if_reachable():
            config = read_config(place)
            kind: Any = _kind_of(config, folder) if of_any_kind else AutoModelForCausalLM
            if getattr(config, "auto_map", None) and type(config) not in kind._model_mapping:
                raise own_code(folder)
            if getattr(config, "lorank", None) is not None:
                check_quantization(config)
            if looks_local:
                _check_weights(path, config)
            model = kind.from_pretrained(place, config=config, trust_remote_code=False, use_safetensors=True)
    except (_Unfit, ForeignCode):
        raise
    except Exception as error:  # whatever the modelling code makes of somebody's files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not looks_local and not is_reachable():
            reason = "there is no such folder, and the hub cannot be reached"
        elif isinstance(error, pickle.UnpicklingError) or "use_safetensors" in reason:
            reason = "its weights must be safetensors, and lorank reads no others"
        elif isinstance(error, KeyError):
            reason = f"transformers does not know {reason}, which its config.json names"
        raise ValueError(f"no model could be loaded from {folder}: {reason}") from None
    check_finite(model, folder)
    return model.eval(), _tokenizer_of(place, folder, tokenizer)


class NoTokenizer(ValueError):
    """A model whose tokenizer is elsewhere."""


class _Unfit(ValueError):
    """A model that was found, but cannot be used here."""


def _check_weights(folder: Path, config: PretrainedConfig) -> None:
    """Raises _Unfit for weights in files that may hold code, and for an adapter, of which transformers may read another model's."""
    if (folder / "adapter_config.json").exists():
        raise _Unfit(
            f"{folder} must have all weights of its model, got an adapter (adapter_config.json); merge it into its model"
        )
    named = getattr(config, "transformers_weights", None)
    names = [str(named)] if named else ["model.safetensors", "model.safetensors.index.json"]
    found = [folder / name for name in names if (folder / name).exists()][:1]
    if found and found[0].suffix == ".json":
        try:
            found = [folder / name for name in json.loads(found[0].read_text(encoding="utf-8"))["weight_map"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Unfit(
                f"{found[0]} must be an index of weights, but cannot be read as one: {type(error).__name__}: {error}"
            ) from None
    elif not found:
        found = [
            file for end in ("bin", "pt", "pth", "pkl", "ckpt", "h5", "msgpack") for file in folder.glob(f"*.{end}")
        ]
    if others := [file for file in found if file.suffix != ".safetensors" and file.name != "training_args.bin"]:
        raise _Unfit(
            f"the weights of {folder} must be safetensors, got {others[0].name}, which may hold code; have them saved with "
            "save_pretrained where they are trusted"
        )


def _kind_of(config: PretrainedConfig, folder: str) -> Any:
    """The Auto class of the architecture that a configuration names, else that of the body."""
    if config.is_encoder_decoder:
        raise _Unfit(f"{folder} must be a model that reads one text, got an encoder-decoder ({type_of(config)})")
    named, autos = (config.architectures or [""])[0], (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel)
    fitting = [auto for auto in autos if type(config) in auto._model_mapping]
    for auto in fitting:
        classes: Any = auto._model_mapping[type(config)]
        if named in [one.__name__ for one in (classes if isinstance(classes, tuple) else (classes,))]:
            return auto
    return fitting[-1] if fitting else AutoModel  # of a classifier and the like, the body


def _tokenizer_of(place: str, folder: str, other: str | None) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(other or place)
    except OSError as error:
        if other is not None:
            raise ValueError(str(error)) from None
        reason = str(error).partition(": ")[2]
        raise NoTokenizer(
            f"{folder} has a model but no readable tokenizer: {reason}; give one with --tokenizer"
        ) from None


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Raise ValueError if weights of a model are NaN or infinite, naming them."""
    broken = [key for key, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if broken:
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ValueError(
            f"{name} has weights that are not finite: {broken[0]}{others}; it has diverged or was damaged, use an earlier one"
        )
