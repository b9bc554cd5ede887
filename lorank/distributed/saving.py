"""Checkpoints that any number of processes writes and any other reads, with torch.distributed.checkpoint.

FOLDER/weights/*.safetensors     parameters and buffers; each process writes its parts
FOLDER/optimizer/*.safetensors   tensors of the optimizer's state, as NAME OF THE PARAMETER:NAME
FOLDER/optimizer.json            the rest of its state, and its groups

All of it is safetensors and JSON; torch's usual reader would load a pickle. What one process saves, model.safetensors and
optimizer.pt, is read too.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import Optimizer

from lorank.optim.shards import is_sharded, like, sharded

WEIGHTS, OPTIMIZER, OPTIMIZER_FILE = "weights", "optimizer", "optimizer.json"
WHOLE_OPTIMIZER = "optimizer.pt"
"""What one process saves."""


def save_weights(model: nn.Module, checkpoint: Path) -> None:
    """Write what the model holds. All processes must call this."""
    _write(_kept(model), checkpoint / WEIGHTS)


def load_weights(model: nn.Module, checkpoint: Path) -> list[str]:
    """Read what the model holds, however many processes have written it. All processes that share the model must call this.

    Returns:
        Names of weights that the checkpoint lacks, which stay as they are.
    """
    folder = checkpoint / WEIGHTS if (checkpoint / WEIGHTS).exists() else checkpoint
    kept, there = _kept(model), _shapes(folder)
    _read(
        {name: tensor for name, tensor in kept.items() if name in there},
        folder,
        alone=not is_sharded(model.parameters()),
    )
    return [name for name in kept if name not in there]


def save_optimizer(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """Write groups and state of an optimizer. All processes must call this."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[p]}:{key}"] = value
            else:
                values.setdefault(names[p], {})[key] = value
    _write(tensors, checkpoint / OPTIMIZER)
    if dist.get_rank() == 0:
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        (checkpoint / OPTIMIZER_FILE).write_text(json.dumps({"groups": groups, "values": values}), encoding="utf-8")


def load_optimizer(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """Read groups and state of an optimizer, however many processes have written them. All processes that share the model must call this."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if (checkpoint / OPTIMIZER_FILE).exists():
        names = {name: p for name, p in model.named_parameters()}
        state, groups = _of_several(names, parameters, checkpoint, alone=not is_sharded(model.parameters()))
    else:
        whole = torch.load(checkpoint / WHOLE_OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        groups = whole["param_groups"]
        state = {
            index: {key: _placed(value, parameters[index]) for key, value in its.items()}
            for index, its in whole["state"].items()
        }
    begin, given = 0, []
    for ours, saved in zip(optimizer.param_groups, groups, strict=True):
        indices = list(range(begin, begin := begin + len(ours["params"])))
        tuples = {
            name: tuple(saved[name]) for name, value in ours.items() if isinstance(value, tuple) and name in saved
        }
        given.append({**saved, **tuples, "params": indices})
    optimizer.load_state_dict({"state": state, "param_groups": given})


def _of_several(
    names: Mapping[str, nn.Parameter], parameters: Iterable[nn.Parameter], checkpoint: Path, *, alone: bool
) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """State by the number of the parameter, and groups, of what several processes have written."""
    rest = json.loads((checkpoint / OPTIMIZER_FILE).read_text(encoding="utf-8"))
    number = {p: index for index, p in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {number[names[name]]: dict(its) for name, its in rest["values"].items()}
    tensors: dict[str, Tensor] = {}
    for key, saved in _shapes(checkpoint / OPTIMIZER).items():
        name, _, entry = key.rpartition(":")
        tensors[key] = _placed(torch.empty(saved.size, dtype=saved.properties.dtype), names[name])
        state.setdefault(number[names[name]], {})[entry] = tensors[key]
    _read(tensors, checkpoint / OPTIMIZER, alone=alone)
    return state, rest["groups"]


def _placed(value: Any, p: Tensor) -> Any:
    """A tensor of a parameter's state, whole, where the optimizer would have it."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(p.device) if value.ndim else value
    return like(value, p) if value.shape == p.shape else sharded(value, p)


# ---- tensors


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved; one that has several names is there once."""
    saved = model.state_dict(keep_vars=True).keys()
    found = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in saved)]
    return {name: tensor.detach() for name, tensor in found}


def _straight(tensor: Tensor) -> Tensor:
    """A tensor whose parts are each one region of it, which torch's writer takes for granted: FSDP's parts of what tensor parallelism
    has split are none."""
    if not isinstance(tensor, DTensor) or not any(isinstance(one, _StridedShard) for one in tensor.placements):
        return tensor
    return tensor.redistribute(
        placements=[Shard(one.dim) if isinstance(one, _StridedShard) else one for one in tensor.placements]
    )


def _write(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raises OSError if the folder cannot be written."""
    straight: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr() if not isinstance(tensor, DTensor) else 0
        straight[name] = (
            tensor.clone() if place in places and place else _straight(tensor)
        )  # one table of several parameters
        places.add(place)
    try:
        dcp.save(straight, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise OSError(_reason(error)) from error


def _reason(error: CheckpointException) -> str:
    """What the first process that failed says. Torch's exception itself passes every ``except Exception``."""
    first, _ = next(iter(error.failures.values()))
    return f"{type(first).__name__}: {first}"


def _read(tensors: Mapping[str, Tensor], folder: Path, *, alone: bool) -> None:
    """Fill tensors from a folder; `alone` if other processes do not take part. Raises ValueError if it is damaged."""
    straight = {name: _straight(tensor) for name, tensor in tensors.items()}
    if not straight:
        return
    try:
        dcp.load(dict(straight), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except CheckpointException as error:
        raise ValueError(f"{folder} must be readable, but is damaged: {_reason(error)}") from error
    for name, tensor in tensors.items():
        if (read := straight[name]) is not tensor:
            assert isinstance(tensor, DTensor) and isinstance(read, DTensor)
            tensor.copy_(read.redistribute(placements=tensor.placements))


def _shapes(folder: Path) -> Mapping[str, Any]:
    """Size, type and parts of each tensor in a folder; ValueError if a file of it is damaged or missing."""
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise ValueError(f"{folder} must have whole files, but one is damaged: {error}") from error
    for name, saved in found.items():
        assert isinstance(saved, TensorStorageMetadata)
        if sum(math.prod(part.sizes) for part in saved.chunks) != math.prod(saved.size):  # the rest would stay as it is
            raise ValueError(f"{folder} must have all parts of {name}, but a file of it is missing")
    return found
