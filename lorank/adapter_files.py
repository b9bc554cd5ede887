"""Adapters without the model that they adapt: saved, loaded, and in peft's format.

FOLDER/adapter.safetensors   what the adapter added to the model, and other parameters that were trained
FOLDER/adapter.json          the method with its settings, and which weights it belongs to, by their hash

The hash is that of all other weights, as single precision, so an adapter is never put on weights that it was not trained on.
"""

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorank.adapters.gated import Adapter
from lorank.conversion import convert, method_of
from lorank.factors import Pair
from lorank.fusion import FusedProjections, join_rows
from lorank.pretrained import dense_config, forget
from lorank.rewriting import converted_with
from lorank.table import from_record
from lorank.whole import made_whole

WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
PEFT_WEIGHTS, PEFT_ABOUT = "adapter_model.safetensors", "adapter_config.json"
RECORDED = ("method", "arguments", "targets", "exclude")


def save_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Write what an adapter added to a model, without the model, to a folder.

    Parameters outside the adapter that you let train, such as a classifier's new head, are saved with it.

    Raises:
        ValueError: the model has no adapter, or the adapter has changed the weights that it was put on, so that it means nothing
            without them (OSFT, and CoDyRA after its first task).
        OSError: a file cannot be written.
    """
    method = adapter_of(model)
    if (why := method.inseparable(model)) is not None:
        raise ValueError(f"{method.name} cannot be saved alone, because {why}; save the model with save_pretrained")
    own, more = _own(model, method)
    recorded: Any = converted_with(model)
    about = {
        **{name: recorded[name] for name in RECORDED},
        "trained_too": more,
        "base": {
            "architecture": _dense_class(model).__name__,
            "name": _public_name(model),
            "sha256": hash_without(model, own),
        },
    }
    state = model.state_dict()
    _write(Path(folder).expanduser(), WEIGHTS, {name: state[name].contiguous() for name in own}, ABOUT, about)


def load_adapter(folder: str | Path, base: PreTrainedModel | str | None = None) -> PreTrainedModel:
    """The model that `save_adapter` had, from the adapter and the dense model it belongs to.

    Args:
        base: the dense model, which is converted in place; or its folder or hub name. Default: the hub name that the adapter records.

    Raises:
        ValueError: `folder` has no adapter, or `base` is not the model it was trained on. A given model is then unchanged.
    """
    folder = Path(folder).expanduser()
    about = _read(folder)
    expected = about["base"]
    if isinstance(base, PreTrainedModel):
        model = base
    elif (name := base or expected["name"]) is None:
        raise ValueError(
            f"base must be the {expected['architecture']} that {folder} adapts; its adapter records no name"
        )
    else:
        model = getattr(transformers, expected["architecture"]).from_pretrained(name)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {str(error).splitlines()[0]}") from None
    before = {module: dict(module._modules) for module in model.modules()}
    trained = {p for p in model.parameters() if p.requires_grad}
    convert(model, from_record(about), targets=about["targets"], exclude=about["exclude"])
    state = model.state_dict()
    if tensors.keys() - state.keys() or hash_without(model, tensors) != expected["sha256"]:
        forget(model)
        for module, children in before.items():
            module._modules = children  # type: ignore[assignment]
        for p in model.parameters():
            p.requires_grad_(p in trained)
        raise ValueError(
            f"base must have the weights that {folder} was trained on (SHA-256 {expected['sha256'][:12]}...), got others"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    for name in about["trained_too"]:
        model.get_parameter(name).requires_grad_()
    return model


def export_peft(model: PreTrainedModel, folder: str | Path) -> None:
    """Write an adapter as a LoRA of peft, which loads it on the dense model with equal outputs.

    The scale is in the factors, and ranks that a gate has made zero are left out. A fused matrix, as GPT-2's query, key and value, gets
    one pair of factors of the sum of ranks.

    Raises:
        ValueError: the model has no adapter, or it is not a pair of factors for each matrix (its gate depends on the input, or it
            changes all of W).
        OSError: a file cannot be written.
    """
    method = adapter_of(model)
    if (why := method.inseparable(model)) is not None:
        raise ValueError(f"{method.name} cannot be a LoRA of peft, because {why}; merge it with lorank.merge")
    pairs: dict[str, Pair] = {}
    layers = method.layers(model)
    for name, layer in layers.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(parent, FusedProjections):
            pairs[name] = method.pair(layer)
        elif (fused := name.rpartition(".")[0]) not in pairs:
            pairs[fused] = _fused_pair(method, parent)
    ranks = {name: A.shape[0] for name, (_, A) in pairs.items()}
    usual = max(ranks.values(), key=[*ranks.values()].count)
    others = {name: r for name, r in ranks.items() if r != usual}
    with torch.device("meta"):
        dense = _dense_class(model)._from_config(dense_config(copy.deepcopy(model.config)))
    about = {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": _public_name(model),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [*pairs],
        "fan_in_fan_out": any(isinstance(dense.get_submodule(name), Conv1D) for name in pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": factor.detach().contiguous()
        for name, (B, A) in pairs.items()
        for side, factor in (("A", A), ("B", B))
    }
    _write(Path(folder).expanduser(), PEFT_WEIGHTS, tensors, PEFT_ABOUT, about)


def adapter_of(model: PreTrainedModel) -> Adapter:
    """The adapter of a model; ValueError if it has none."""
    method = method_of(model)
    if not isinstance(method, Adapter) or not isinstance(model, PreTrainedModel):
        kind = type(model).__name__ if method is None else f"one with {method.name}"
        raise ValueError(f"model must be a model of transformers with an adapter such as lora, got {kind}")
    return method


def _own(model: PreTrainedModel, method: Adapter) -> tuple[list[str], list[str]]:
    """Names of what belongs to the adapter, and of those among them that train outside its layers."""
    inside = [
        f"{name}.{key}"
        for name, layer in method.layers(model).items()
        for key in layer.state_dict()
        if not key.startswith("W.")
    ]
    more = [name for name, p in model.named_parameters() if p.requires_grad and name not in set(inside)]
    return [*inside, *more], more


def hash_without(model: PreTrainedModel, own: Any) -> str:
    """SHA-256 of the names and values of all weights but the adapter's."""
    digest, own = hashlib.sha256(), set(own)
    for name, tensor in sorted(model.state_dict().items()):
        if name not in own:
            digest.update(name.encode())
            digest.update(memoryview(tensor.detach().float().cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()


def _fused_pair(method: Adapter, fused: FusedProjections) -> Pair:
    """Of the one matrix that several projections are: all rows of A, and for each part its own columns of B."""
    pairs = [method.pair(part) if hasattr(part, "stands_for_linear") else None for part in fused.children()]
    A = torch.cat([pair[1] for pair in pairs if pair is not None])
    rows, done = [], 0
    for size, pair in zip(fused.fusion.sizes.values(), pairs, strict=True):
        B = A.new_zeros(size, len(A))
        if pair is not None:
            B[:, done : done + len(pair[1])] = pair[0]
            done += len(pair[1])
        rows.append(B)
    return join_rows(rows, fused.heads), A


def _dense_class(model: PreTrainedModel) -> Any:
    return type(model).__bases__[0]


def _public_name(model: PreTrainedModel) -> str | None:
    """The hub name that the model came from; None for a folder, which means nothing elsewhere."""
    name = getattr(model.config, "_name_or_path", "") or None
    return (
        None if name is None or os.path.exists(os.path.expanduser(name)) or name.startswith((".", "/", "~")) else name
    )


def _task(model: PreTrainedModel) -> str | None:
    """peft's name of what the model is for, if it has one."""
    ends = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    return next((task for end, task in ends.items() if type(model).__name__.endswith(end)), None)


def _read(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if (
            isinstance(about["base"], Mapping)
            and isinstance(about["base"]["sha256"], str)
            and about["trained_too"] is not None
        ):
            return {**{name: about[name] for name in RECORDED}, **about}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"folder must be one that lorank.save_adapter wrote, got {folder}")


def _write(folder: Path, weights: str, tensors: Mapping[str, Tensor], file: str, about: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with made_whole(folder / weights) as half:
        save_file(dict(tensors), half)
    with made_whole(folder / file) as half:
        half.write_text(json.dumps(about, indent=2), encoding="utf-8")
