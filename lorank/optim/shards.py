"""Parameters that are sharded (FSDP2): each process gathers what is needed whole, computes the same, and keeps its part."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def processes() -> int:
    """Of a distributed run; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(p: Tensor) -> Tensor:
    """This process's part of a parameter's gradient, split as the parameter is; all processes must ask for it."""
    G = p.grad
    if isinstance(G, DTensor) and isinstance(p, DTensor) and G.placements != p.placements:
        G = G.redistribute(p.device_mesh, p.placements)  # a sum that is outstanding, under tensor parallelism
    return local(G)  # type: ignore[arg-type]


def like(values: Tensor, of: Tensor) -> Tensor:
    """`values`, the same in all processes, sharded as `of` is."""
    if not isinstance(of, DTensor):
        return values
    return distribute_tensor(values, of.device_mesh, of.placements, src_data_rank=None)


def stand_in(p: Tensor) -> Tensor:
    """A whole tensor of the shape, type and device of `p` that uses no memory."""
    return local(p).new_empty(()).expand(p.shape)


def add_product(p: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """p ← p + scale a b for a [m, r] and b [r, n], the same in all processes, without a matrix m x n in between."""
    if isinstance(p, DTensor):
        if all(type(placement) in (Shard, Replicate) for placement in p.placements):
            rows = [placement if placement.is_shard(0) else Replicate() for placement in p.placements]
            columns = [placement if placement.is_shard(1) else Replicate() for placement in p.placements]
            a = distribute_tensor(a, p.device_mesh, rows, src_data_rank=None).to_local()
            b = distribute_tensor(b, p.device_mesh, columns, src_data_rank=None).to_local()
        else:
            return local(p).add_(local(like(a @ b, p)), alpha=scale)  # type: ignore[return-value]
    part = local(p)
    if part.dtype == a.dtype:
        part.addmm_(a, b, alpha=scale)
    else:
        part.add_(a @ b, alpha=scale)  # in the type of a, rounded once


def put_back(values: dict[str, Any], into: dict[str, Any]) -> None:
    """Store a state that was gathered by `gathered`, and has been changed since."""
    for name, value in values.items():
        if isinstance(into[name], DTensor):
            local(into[name]).copy_(local(like(value, into[name])))
        else:
            into[name] = value


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    return {name: whole(value) if isinstance(value, Tensor) else value for name, value in state.items()}


@torch.compiler.disable
def all_finite(norms: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Which of the norms of these parameters' gradients are finite in all processes that share some of the parameters."""
    meshes = dict.fromkeys(p.device_mesh for p in parameters if isinstance(p, DTensor))
    for mesh in meshes:
        for dim in range(mesh.ndim):
            dist.all_reduce(norms, group=mesh.get_group(dim))  # a sum that is not finite where one is not
    return norms.isfinite()
