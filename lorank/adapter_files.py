"""Adapters without the model that they adapt: saved, loaded, and in peft's format.

FOLDER/adapter.safetensors   what the adapter added to the model, other parameters that were trained, and statistics of BatchNorm
FOLDER/adapter.json          the method with its settings, and which weights it belongs to, by their hash

An adapter is a method's (`lorank.convert`), or that of convolutions (`lorank.adapt_convolutions`) in any model.

The hash is that of all other weights, as single precision, so an adapter is never put on weights that it was not trained on.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorank.adapters.cp_conv import adapt_convolutions, adapted
from lorank.adapters.gated import Adapter
from lorank.conversion import convert, method_of
from lorank.factors import Pair
from lorank.fusion import FusedProjections, join_rows
from lorank.method import SHARED
from lorank.optim.shards import is_sharded
from lorank.pretrained import dense_config, forget
from lorank.rewriting import converted_with
from lorank.table import from_record
from lorank.whole import made_whole

WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
PEFT_WEIGHTS, PEFT_ABOUT = "adapter_model.safetensors", "adapter_config.json"
RECORDED = ("method", "arguments", "targets", "exclude")
CONVOLUTIONS = "convolutions"
"""In place of these: the settings of `adapt_convolutions`, and names."""


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write what an adapter added to a model, without the model, to a folder.

    Parameters outside the adapter that you let train, such as a classifier's new head, are saved with it, and so are the statistics of
    BatchNorm layers, which training changes.

    Raises:
        ValueError: the model has no adapter, or the adapter has changed the weights that it was put on, so that it means nothing
            without them (OSFT, and CoDyRA after its first task).
        OSError: a file cannot be written.
    """
    _check_whole(model)
    convolutions = adapted(model)
    layers: Mapping[str, nn.Module] = convolutions
    if convolutions:
        recorded: Any = {CONVOLUTIONS: {**next(iter(convolutions.values())).settings(), "names": [*convolutions]}}
    else:
        method = adapter_of(model)
        if (why := method.inseparable(model)) is not None:
            raise ValueError(f"{method.name} cannot be saved alone, because {why}; save the model with save_pretrained")
        layers, converted = method.layers(model), converted_with(model) or {}
        recorded = {name: converted[name] for name in RECORDED}
    own, more = _own(model, layers)
    about = {
        **recorded,
        "trained_too": more,
        "base": {
            "architecture": _dense_class(model).__name__,
            "name": _public_name(model),
            "sha256": hash_without(model, own),
        },
    }
    state = model.state_dict()
    _write(Path(folder).expanduser(), WEIGHTS, {name: state[name].contiguous() for name in own}, ABOUT, about)


def load_adapter(folder: str | Path, base: nn.Module | str | None = None) -> Any:
    """The model that `save_adapter` had, from the adapter and the dense model it belongs to.

    Args:
        base: the dense model, which is converted in place; or its folder or hub name. Default: the hub name that the adapter records.

    Raises:
        ValueError: `folder` has no adapter, or `base` is not the model it was trained on. A given model is then unchanged.
    """
    folder = Path(folder).expanduser()
    about = _read(folder)
    expected = about["base"]
    if isinstance(base, nn.Module):
        model = base
    elif (name := base or expected.get("name")) is None or not hasattr(transformers, expected["architecture"]):
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
    _adapt(model, about, folder)
    try:
        state, names = model.state_dict(), {name for name, _ in model.named_parameters()}
        if tensors.keys() - state.keys() or hash_without(model, tensors) != expected["sha256"]:
            raise ValueError(
                f"base must have the weights that {folder} was trained on (SHA-256 {expected['sha256'][:12]}...), got others"
            )
        if wrong := [name for name in tensors if tensors[name].shape != state[name].shape]:
            raise ValueError(
                f"{folder / WEIGHTS} must fit {ABOUT}, but {wrong[0]} must have the shape {[*state[wrong[0]].shape]}, got "
                f"{[*tensors[wrong[0]].shape]}"
            )
        if unknown := [name for name in about["trained_too"] if name not in names]:
            raise ValueError(f"{folder / ABOUT} must name parameters of the model as trained, got {unknown[0]!r}")
    except ValueError:
        if isinstance(model, PreTrainedModel) and CONVOLUTIONS not in about:
            forget(model)
        for module, children in before.items():
            module._modules = children  # type: ignore[assignment]
        for p in model.parameters():
            p.requires_grad_(p in trained)
        raise
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    for name in about["trained_too"]:
        model.get_parameter(name).requires_grad_()
    return model


def _adapt(model: nn.Module, about: Mapping[str, Any], folder: Path) -> None:
    """Put the recorded adapter, with new values, on a model; ValueError, and nothing is changed, if it cannot be."""
    try:
        if CONVOLUTIONS in about:
            settings = dict(about[CONVOLUTIONS])
            targets = "|".join(f"^{re.escape(name)}$" for name in settings.pop("names"))
            adapt_convolutions(model, targets=targets, **settings)
        else:
            convert(model, from_record(about), targets=about["targets"], exclude=about["exclude"])  # type: ignore[type-var]
    except (TypeError, AttributeError, KeyError):
        raise ValueError(
            f"{folder / ABOUT} must be as lorank.save_adapter wrote it, but its settings cannot be used"
        ) from None


def export_peft(model: nn.Module, folder: str | Path) -> None:
    """Write an adapter as a LoRA of peft, which loads it on the dense model with equal outputs.

    The scale is in the factors, and ranks that a gate has made zero are left out. A fused matrix, as GPT-2's query, key and value, gets
    one pair of factors of the sum of ranks. A CP form of a convolution is written as peft's two convolutions, and magnitudes as DoRA.
    Statistics of BatchNorm layers, which training changes, have no place in a LoRA: freeze them if you need the file.

    Raises:
        ValueError: the model has no adapter, it is not a pair of factors for each matrix (its gate depends on the input, or it changes
            all of W), or parameters outside it train too.
        OSError: a file cannot be written.
    """
    _check_whole(model)
    convolutions = adapted(model)
    layers, pairs = (convolutions, {n: m.pair() for n, m in convolutions.items()}) if convolutions else _pairs(model)
    if more := [name for name in _own(model, layers)[1] if SHARED not in name]:
        raise ValueError(
            f"only the adapter may train for a LoRA of peft, but {more[0]} does too; use save_adapter, or lorank.merge"
        )
    ranks = {name: A.shape[0] for name, (_, A) in pairs.items()}
    usual = max(ranks.values(), key=[*ranks.values()].count)
    others = {name: r for name, r in ranks.items() if r != usual}
    magnitudes = {
        name: layer.mu.detach().transpose(0, 1) for name, layer in convolutions.items() if layer.mu is not None
    }
    about = {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": _public_name(model),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [*pairs],
        "fan_in_fan_out": not convolutions and _is_transposed(model, pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": bool(magnitudes),
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": factor.detach().contiguous()
        for name, (B, A) in pairs.items()
        for side, factor in (("A", A), ("B", B))
    }
    for name, mu in magnitudes.items():
        tensors[f"base_model.model.{name}.lora_magnitude_vector"] = mu.contiguous()
    _write(Path(folder).expanduser(), PEFT_WEIGHTS, tensors, PEFT_ABOUT, about)


def _check_whole(model: nn.Module) -> None:
    """Raises ValueError for sharded weights."""
    if is_sharded(model.parameters()):
        raise ValueError(
            "weights must be whole, but they are sharded (FSDP2); save them with torch.distributed.checkpoint, load them in one process, and "
            "save the adapter there"
        )


def _pairs(model: nn.Module) -> tuple[Mapping[str, nn.Module], dict[str, Pair]]:
    """Layers of a method's adapter, and B and A of each matrix of the dense model."""
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
    return layers, pairs


def _is_transposed(model: Any, names: Iterable[str]) -> bool:
    """Whether the dense model keeps these matrices as [d_in, d_out], as GPT-2 does."""
    with torch.device("meta"):
        dense = _dense_class(model)._from_config(dense_config(copy.deepcopy(model.config)))
    return any(isinstance(dense.get_submodule(name), Conv1D) for name in names)


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model; ValueError if it has none."""
    method = method_of(model)
    if not isinstance(method, Adapter) or not isinstance(model, PreTrainedModel):
        kind = type(model).__name__ if method is None else f"one with {method.name}"
        raise ValueError(f"model must be a model of transformers with an adapter such as lora, got {kind}")
    return method


def _own(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[list[str], list[str]]:
    """Names of what belongs to the adapter, and of those among them that train outside its layers."""
    inside = [
        f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict() if not key.startswith("W.")
    ]
    more = [name for name, p in model.named_parameters() if p.requires_grad and name not in set(inside)]
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _NormBase)]
    return [*inside, *more, *(f"{name}.{key}" for name, norm in norms for key, _ in norm.named_buffers())], more


def hash_without(model: nn.Module, own: Any) -> str:
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


def _dense_class(model: nn.Module) -> Any:
    return type(model) if converted_with(model) is None else type(model).__bases__[0]


def _public_name(model: nn.Module) -> str | None:
    """The hub name that the model came from; None for a folder, which means nothing elsewhere."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    return (
        None if name is None or os.path.exists(os.path.expanduser(name)) or name.startswith((".", "/", "~")) else name
    )


def _task(model: nn.Module) -> str | None:
    """peft's name of what the model is for, if it has one."""
    ends = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    return next((task for end, task in ends.items() if type(model).__name__.endswith(end)), None)


def _read(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        base, trained_too = about["base"], about["trained_too"]
        of_strings = [base["sha256"], base["architecture"], *trained_too]
        if isinstance(trained_too, list) and all(isinstance(one, str) for one in of_strings):
            return about if CONVOLUTIONS in about else {**{name: about[name] for name in RECORDED}, **about}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"folder must be one that lorank.save_adapter wrote, got {folder}")


def _write(folder: Path, weights: str, tensors: Mapping[str, Tensor], file: str, about: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with made_whole(folder / weights) as half:
        save_file(dict(tensors), half)
    with made_whole(folder / file) as half:
        half.write_text(json.dumps(about, indent=2), encoding="utf-8")
