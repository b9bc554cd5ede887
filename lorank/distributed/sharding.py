"""A model that processes share from the start: it is built without storage, split, and then gets its weights one tensor at a time.

No device ever holds the whole of it. The first process draws the initial weights in its main memory, where they are those of a run in one
process, and sends them.

    whole = copy.deepcopy(emptied(model)[0])     the model on the meta device, for `filled` in the end
    shard(model, mesh)                           torch's FSDP2 block by block, and the cut of `lorank.distributed.tensor_parallel`
    fill(model, held, device)                    held: what `emptied` took out; None but in the first process
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from lorank.distributed.tensor_parallel import parallelize
from lorank.optim.shards import like, local, whole
from lorank.sites import blocks

DATA, TENSOR = "dp_shard", "tp"
"""Dimensions of a mesh, with the names that accelerate gives them. Processes along the second one get the same rows."""
M = TypeVar("M", bound=nn.Module)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that has several names is there once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def emptied(model: M) -> tuple[M, dict[str, Tensor]]:
    """The model without storage, and what it held. It is changed in place; tied weights stay tied."""
    return model, _replaced(model, lambda name, tensor: tensor.to("meta"))


def filled(model: M, held: Mapping[str, Tensor]) -> M:
    """The model with these parameters and buffers in place of those it has. It is changed in place; tied weights stay tied."""
    _replaced(model, lambda name, tensor: held[name])
    return model


def _replaced(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Exchange every parameter and buffer for another; what there was."""
    before = tensors_of(model)
    made = {id(tensor): make(name, tensor) for name, tensor in before.items()}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = made[id(p)] = _parameter(made[id(p)], p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made[id(buffer)]
    return before


def _parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=requires_grad)


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Split a model over the processes of a mesh with a dimension `DATA`, `TENSOR` or both, in place.

    Raises:
        ValueError: the model cannot be cut at its bottlenecks; see `parallelize`.
    """
    names = mesh.mesh_dim_names or ()
    if TENSOR in names:
        parallelize(model, mesh[TENSOR])
    if DATA in names:
        for _, _, block in blocks(model):
            fully_shard(block, mesh=mesh[DATA])
        fully_shard(model, mesh=mesh[DATA])
    return model


def fill(model: nn.Module, held: Mapping[str, Tensor] | None, device: torch.device) -> None:
    """Give a model that was sharded on the meta device its weights, those that the first process holds. All processes must call this."""
    _to_empty(model, device)
    with torch.no_grad():
        for name, place in tensors_of(model).items():
            if held is None:
                values = torch.empty(place.shape, dtype=place.dtype, device=device)
            else:
                values = held[name].detach().to(device).contiguous()
            dist.broadcast(values.view(-1).view(torch.uint8), 0)  # of any type
            local(place).copy_(local(like(values, place)))


def _to_empty(model: nn.Module, device: torch.device) -> None:
    """``to_empty``, which would untie tied weights."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            owners.setdefault(id(p), []).append((module, name))
    model.to_empty(device=device)
    for (first, own), *others in owners.values():
        for module, name in others:
            module._parameters[name] = first._parameters[own]


def gathered(model: nn.Module) -> dict[str, Tensor] | None:
    """All parameters and buffers, whole, in the main memory of the first process; None in the others. All processes must call this."""
    first, found = dist.get_rank() == 0, {}
    for name, tensor in tensors_of(model).items():
        every = whole(tensor.detach())
        if first:
            found[name] = every.to("cpu", copy=True)
    return found if first else None
