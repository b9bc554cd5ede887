"""What every EGGROLL population needs: noise from seeds, a share of the batch for each member, sums over processes."""

import hashlib
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorank.fields import Bounds, Whole, check_value
from lorank.optim.shards import processes

Members = Annotated[int, Bounds(least=2)]
BLOCK = 32
"""Pairs drawn from one seed, so that not every pair costs a call."""


def pair_noise(key: tuple[int, int, int], pairs: range, size: int, device: torch.device | None = None) -> Tensor:
    """Standard normal numbers [pairs, size] for a key (seed, parameter, epoch). Those of a pair depend on nothing else."""
    drawn = []
    for block in range(pairs.start // BLOCK, -(-pairs.stop // BLOCK)):
        digest = hashlib.blake2b(repr((*key, block)).encode(), digest_size=8).digest()
        generator = torch.Generator(device=device or "cpu").manual_seed(int.from_bytes(digest) >> 1)
        noise = torch.randn(BLOCK, size, generator=generator, device=device)
        drawn.append(noise[max(0, pairs.start - block * BLOCK) : pairs.stop - block * BLOCK])
    return torch.cat(drawn)


def deal(batch: Tensor, population: int, group_size: int) -> Callable[[range], Tensor]:
    """Which rows of a batch [rows, T] a range of members sees: [members, rows of each, T].

    Raises:
        ValueError: the groups cannot be given equally many rows.
    """
    groups = population // group_size if group_size else 1
    if len(batch) % groups:
        raise ValueError(
            f"batch_size must be a multiple of the {groups} groups of members, got {len(batch)}; or use "
            f"group_size={population // len(batch)}"
        )
    dealt = batch.view(groups, -1, batch.shape[-1])
    return lambda members: dealt[torch.arange(members.start, members.stop, device=batch.device) * groups // population]


def over_processes(values: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce `values` in place over the processes, which evaluate the same members on different rows."""
    if processes() > 1:
        dist.all_reduce(values, op)


def check_population(population: int, group_size: int, chunk: int | None) -> None:
    """Raises ValueError for numbers of members that do not go together."""
    check_value("population", population, Members)
    check_value("group_size", group_size, Whole)
    check_value("chunk", chunk, Members | None)
    for name, value in {"population": population, "chunk": chunk or 0}.items():
        if value % 2:
            raise ValueError(f"{name} must be even, because members come in pairs, got {value}")
    if group_size % 2 or (group_size and population % group_size):
        raise ValueError(f"group_size must be 0 or an even divisor of population={population}, got {group_size}")


def check_whole(p: nn.Parameter, name: str) -> None:
    """Raises ValueError if a parameter is sharded."""
    if isinstance(p, DTensor):
        raise ValueError(
            f"{name} is sharded (FSDP2), but EGGROLL perturbs whole matrices; keep the whole model in each process: it "
            "stores no activations, and fitness is averaged over all processes"
        )
