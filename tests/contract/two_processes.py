"""Run twice at a time by test_optimizer_states.py: every optimizer in two processes, as in one; says what it found as JSON."""

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lorank import GaLore, Method
from lorank.optim.shards import whole
from tests.contract.conftest import METHODS, NEED_BITSANDBYTES, OPTIONS, RULED, named


def net(wide: bool) -> nn.Sequential:
    """If `wide`, then enough for moments of a byte."""
    torch.manual_seed(0)
    d = (80, 70) if wide else (20, 10)
    layers = [nn.Linear(12, d[0]), nn.Tanh(), nn.Linear(*d), nn.Tanh(), nn.Linear(d[1], 8)]
    return nn.Sequential(*layers).to(torch.float32 if wide else torch.float64)


def groups(model: nn.Module, method: Method) -> list[dict[str, Any]]:
    matrices, vectors = ([p for p in model.parameters() if p.ndim == ndim] for ndim in (2, 1))
    chosen: dict[str, Any] = {"rank": 3} if hasattr(method, "rank") else {}
    chosen |= {"rule": RULED[method.name]} if method.name in RULED else {}
    if getattr(method, "structure", None):  # two layers are a pair of factors, the third is not in one
        vectors.append(matrices.pop())
    return [{"params": matrices, "weight_decay": 0.1, **chosen}, {"params": vectors, "weight_decay": 0.1}]


def shard(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, method: Method, part: Callable[[Tensor], Tensor], stop: int = 5) -> list[Tensor]:
    """Weights after five steps; at `stop` the optimizer is made anew and loads its state."""
    optimizer: Any = method.optimizer(groups(model, method), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    for step in range(5):
        if step == stop:
            saved = optimizer.state_dict()
            optimizer = method.optimizer(groups(model, method), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
            optimizer.load_state_dict(saved)
        x = part(torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
        x = x.to(next(model.parameters()).dtype)
        (model(x) - x[:, :8].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(p).detach() for p in model.parameters()]


def main() -> None:
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), dict[str, Any]()
    half = lambda x: x.chunk(2)[rank]  # noqa: E731
    with_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    for method in METHODS + OPTIONS[3:]:
        wide = named(method) in NEED_BITSANDBYTES
        if wide and not with_bitsandbytes:
            continue
        alone = train(net(wide), method, lambda x: x)
        replicated = train(DistributedDataParallel(net(wide)), method, half)
        sharded, resumed = (train(shard(net(wide)), method, half, stop) for stop in (5, 3))
        both = [torch.empty_like(replicated[0]) for _ in range(2)]
        dist.all_gather(both, replicated[0])
        error = lambda other: max(((a - b).norm() / a.norm()).item() for a, b in zip(alone, other, strict=True))  # noqa: E731, B023
        found[named(method)] = {
            "ddp": error(replicated),
            "fsdp": error(sharded),
            "same": torch.equal(*both),
            "resumed": all(map(torch.equal, sharded, resumed)),
        }
    try:
        GaLore(in_backward=True).optimizer(groups(net(False), GaLore()), lr=0.01)
    except ValueError as refusal:
        found["refusal"] = str(refusal)
    bad = shard(net(False).append(nn.Linear(8, 1).double()))  # of which one process has nothing
    optimizer = GaLore().optimizer(groups(bad, GaLore()), lr=0.01)
    bad(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    if rank == 1:
        next(bad.parameters()).grad.to_local()[0, 0] = float("nan")  # type: ignore[union-attr]
    try:
        optimizer.step()
        found["nan"] = "nothing"
    except FloatingPointError as error:
        found["nan"] = str(error)
    print(json.dumps(found) if rank == 0 else found["nan"], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
