"""Parameters that are sharded (FSDP2, tensor parallelism): each process gathers what is needed whole, and keeps its part.

State is sharded as the weights are, whatever its shape: along its longest side. An elementwise rule moves each process's part of it.
Bases, which take by far the longest to find, are shared out: process i mod w finds the i-th that is due, in windows of w
matrices, so that all w processes of a mesh work at once and none holds more whole gradients than it decomposes.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def processes() -> int:
    """Of a distributed run; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of them is a part of a tensor."""
    return any(isinstance(p, DTensor) for p in parameters)


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


def sharded(values: Any, of: Tensor) -> Any:
    """A matrix of any shape, the same in all processes, sharded along its longest side over those that share `of`; anything else,
    or what is sharded already, as it is."""
    if not isinstance(of, DTensor) or not isinstance(values, Tensor) or isinstance(values, DTensor) or values.ndim < 2:
        return values
    if values.numel() == of.numel():
        return like(values, of)
    longest = max(range(values.ndim), key=lambda dim: values.shape[dim])
    split = [Shard(longest) if placement.is_shard() else Replicate() for placement in of.placements]
    return distribute_tensor(values, of.device_mesh, split, src_data_rank=None)


class Shared(NamedTuple):
    """Bases [k, m, r] of a stack that are due, of which this process finds some from their gradients."""

    shape: tuple[int, int, int]
    mine: list[int]
    gradients: Tensor
    """[of mine, m, n]"""
    mesh: DeviceMesh
    basis: Callable[[Tensor, int], Tensor]
    store: Callable[[Tensor], None]

    def find(self) -> Tensor:
        P = self.gradients.new_zeros(self.shape)
        if self.mine:
            P[self.mine] = self.basis(self.gradients, self.shape[-1])
        return P

    def send(self, P: Tensor) -> None:
        for dim in range(self.mesh.ndim):
            dist.all_reduce(P, group=self.mesh.get_group(dim))  # to which the others add 0
        self.store(P)


class Waiting:
    """Bases that processes of a sharded run find together."""

    def __init__(self) -> None:
        self.shared: list[Shared] = []
        self.count = 0

    def find(
        self, basis: Callable[[Tensor, int], Tensor], G: Tensor, rank: int, of: Tensor, store: Callable[[Tensor], None]
    ) -> None:
        """Store the bases of gradients [k, m, n] of parameters like `of`, at once if they are not sharded. Else keep the gradients
        whose basis this process finds, by how many there were before."""
        if not isinstance(of, DTensor):
            return store(basis(G, rank))
        flat = of.device_mesh.mesh.flatten().tolist()
        me, w = flat.index(dist.get_rank()), len(flat)
        mine = [i for i in range(len(G)) if (self.count + i) % w == me]
        self.count += len(G)
        self.shared.append(Shared((len(G), G.shape[1], rank), mine, G[mine], of.device_mesh, basis, store))
        if sum(shared.shape[0] for shared in self.shared) >= w:
            self.settle()

    def settle(self) -> None:
        """Find them, and let all have them."""
        found = [shared.find() for shared in self.shared]
        for shared, P in zip(self.shared, found, strict=True):
            shared.send(P)
        self.shared.clear()


def stand_in(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A whole tensor of the shape, device and, unless another is given, type of `p` that uses no memory."""
    return local(p).new_empty((), dtype=dtype).expand(p.shape)


def add_product(p: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """p ← p + scale a b for a [..., m, r] and b [..., r, n], the same in all processes, without a matrix m x n in between."""
    if isinstance(p, DTensor):
        if all(type(placement) in (Shard, Replicate) for placement in p.placements):
            last, placed = p.ndim - 1, p.placements
            rows = [Replicate() if placement.is_shard(last) else placement for placement in placed]
            columns = [Replicate() if placement.is_shard(last - 1) else placement for placement in placed]
            a = distribute_tensor(a, p.device_mesh, rows, src_data_rank=None).to_local()
            b = distribute_tensor(b, p.device_mesh, columns, src_data_rank=None).to_local()
        else:
            return local(p).add_(local(like(a @ b, p)), alpha=scale)  # type: ignore[return-value]
    part = local(p)
    if part.dtype == a.dtype:
        (part.addmm_ if part.ndim == 2 else part.baddbmm_)(a, b, alpha=scale)
    else:
        part.add_(a @ b, alpha=scale)  # in the type of a, rounded once


@torch.compiler.disable
def all_finite(norms: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Which of the norms of these parameters' gradients are finite in all processes that share the parameter."""
    shared: dict[DeviceMesh, list[int]] = {}
    for i, p in enumerate(parameters):
        if isinstance(p, DTensor):
            shared.setdefault(p.device_mesh, []).append(i)
    for mesh, some in shared.items():  # other processes may have more parameters that are not of this mesh
        sums = norms[some]
        for dim in range(mesh.ndim):
            dist.all_reduce(sums, group=mesh.get_group(dim))  # not finite where one is not
        norms[some] = sums
    return norms.isfinite()
