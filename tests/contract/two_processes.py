"""Run twice at a time by test_optimizer_states.py: every optimizer in two processes, as in one; says what it found as JSON."""

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lorank import GaLore, Method, SelfGuided
from lorank.methods.self_guided import FadingGuide, GuidedLinear
from lorank.optim.bases import singular_basis
from lorank.optim.shards import local, whole
from tests.contract.conftest import METHODS, NEED_BITSANDBYTES, OPTIONS, RULED, named


class Experts(nn.Module):
    """A pair of factors for each of three experts, which two processes cannot share evenly; their outputs are added."""

    def __init__(self, d: int):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(3, 6, d) / d), nn.Parameter(torch.randn(3, d, 6) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ self.A.mT @ self.B.mT).sum(0)


def net(wide: bool) -> nn.Sequential:
    """If `wide`, then enough for moments of a byte."""
    torch.manual_seed(0)
    d = (80, 70) if wide else (20, 10)
    layers = [nn.Linear(12, d[0]), nn.Tanh(), nn.Linear(*d), nn.Tanh(), Experts(d[1]), nn.Linear(d[1], 8)]
    return nn.Sequential(*layers).to(torch.float32 if wide else torch.float64)


def groups(model: nn.Module, method: Method) -> list[dict[str, Any]]:
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    chosen: dict[str, Any] = {"rank": 3} if hasattr(method, "rank") else {}
    chosen |= {"rule": RULED[method.name]} if method.name in RULED else {}
    if getattr(
        method, "structure", None
    ):  # two layers are a pair of factors, and the experts' are; the last layer is in none
        vectors.append(matrices.pop())
    return [{"params": matrices, "weight_decay": 0.1, **chosen}, {"params": vectors, "weight_decay": 0.1}]


def shard(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if isinstance(layer, nn.Linear | Experts):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, method: Method, part: Callable[[Tensor], Tensor], stop: int = 3) -> list[Tensor]:
    """Weights after three steps; at `stop` the optimizer is made anew and loads its state."""
    optimizer: Any = method.optimizer(groups(model, method), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    for step in range(3):
        if step == stop:
            saved = optimizer.state_dict()
            optimizer = method.optimizer(groups(model, method), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
            optimizer.load_state_dict(saved)
        x = part(torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
        x = x.to(next(model.parameters()).dtype)
        (model(x) - x[:, :8].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept.append(
        sum(local(v).nbytes for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    )
    return [whole(p).detach() for p in model.parameters()]


kept: list[int] = []
"""Bytes of state in this process, by run."""


def saved_whole(method: Method, half: Callable[[Tensor], Tensor]) -> float:
    """How far a single process is off that goes on from what two sharded ones saved with torch.distributed.checkpoint, and they from
    what they saved, from those that never stopped."""
    one, many, again = net(False), shard(net(False)), shard(net(False))
    make = lambda model: method.optimizer(groups(model, method), lr=0.01, betas=(0.9, 0.99), eps=1e-8)  # noqa: E731
    optimizers: list[Any] = [make(model) for model in (one, many, again)]

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
        (model(x) - x[:, :8].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    draw = lambda seed: torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    step(many, optimizers[1], half(draw(0)))
    options = StateDictOptions(full_state_dict=True)
    weights, state = get_state_dict(many, optimizers[1], options=options)
    one.load_state_dict(weights)
    names = {p: name for name, p in one.named_parameters()}
    params = [[names[p] for p in group["params"]] for group in optimizers[0].param_groups]
    flat = {name: i for i, name in enumerate(name for group in params for name in group)}
    optimizers[0].load_state_dict(
        {
            "state": {flat[name]: kept for name, kept in state["state"].items()},
            "param_groups": [
                {**group, "params": [flat[n] for n in group["params"]]} for group in state["param_groups"]
            ],
        }
    )
    set_state_dict(again, optimizers[2], model_state_dict=weights, optim_state_dict=state, options=options)
    for seed in range(1, 3):
        step(one, optimizers[0], draw(seed))
        step(many, optimizers[1], half(draw(seed)))
        step(again, optimizers[2], half(draw(seed)))
    ends = [[whole(p).detach() for p in model.parameters()] for model in (one, many, again)]
    return max((a - b).norm().item() for i in (0, 2) for a, b in zip(ends[i], ends[1], strict=True))


def shared_out() -> list[int]:
    """How many bases each process finds of those that are due: of three matrices and two stacks of three."""
    calls = [0]

    def basis(G: Tensor, rank: int) -> Tensor:
        calls[0] += len(G)
        return singular_basis(G, rank)

    train(shard(net(False)), GaLore(basis=basis), lambda x: x)
    both = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(both, torch.tensor([float(calls[0])]))
    return [int(count) for count in both]


def stages(rank: int) -> str:
    """Each process is a pipeline stage of its own with another number of matrices, next to a layer that both share; only the second
    sees what is not finite."""
    meshes = [DeviceMesh("cpu", [0]), DeviceMesh("cpu", [1]), init_device_mesh("cpu", (2,))]
    model, both = nn.Sequential(*[nn.Linear(4, 4) for _ in range(1 + rank)]), nn.Linear(4, 4)
    fully_shard(model, mesh=meshes[rank])
    fully_shard(both, mesh=meshes[2])
    optimizer = GaLore().optimizer(groups(nn.ModuleList([model, both]), GaLore()), lr=0.01)
    (model(torch.ones(2, 4)).sum() + both(torch.ones(2, 4)).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    model(torch.full((2, 4), float("nan") if rank else 1.0)).sum().backward()
    try:
        optimizer.step()
    except FloatingPointError:
        return "stopped"
    return "stepped"


def parallel(model: nn.Module) -> nn.Module:
    """Biases are sharded next to others that are whole."""
    plan = {"0": ColwiseParallel(output_layouts=Replicate()), "2": RowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def self_guided(half: Callable[[Tensor], Tensor]) -> tuple[float, bool]:
    """How far eight steps are off those of one process, of which four have a guide, and whether both processes draw alike."""
    ends, drawn = [], []
    for wrap, part in ((lambda model: model, lambda x: x), (DistributedDataParallel, half)):
        torch.manual_seed(0)
        model = nn.Sequential(*(GuidedLinear(12, 12, 4, passes=0.25, dtype=torch.float64) for _ in range(4)))
        outer, optimizer = wrap(model), torch.optim.AdamW(model.parameters(), lr=0.01)
        FadingGuide(SelfGuided(), model, optimizer, until=4, seed=0)
        for seed in range(8):
            drawn.append([layer.runs for layer in model])
            x = part(torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
            (outer(x) - x.sin()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    both = [torch.zeros(8, 4) for _ in range(2)]
    dist.all_gather(both, torch.tensor(drawn[8:]).float())
    return max((a - b).norm().item() for a, b in zip(*ends, strict=True)), bool((both[0] == both[1]).all())


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
        sharded, resumed = (train(shard(net(wide)), method, half, stop) for stop in (3, 1))
        state = kept[-4:]
        both = [torch.empty_like(replicated[0]) for _ in range(2)]
        dist.all_gather(both, replicated[0])
        error = lambda other: max(((a - b).norm() / a.norm()).item() for a, b in zip(alone, other, strict=True))  # noqa: E731, B023
        found[named(method)] = {
            "ddp": error(replicated),
            "fsdp": error(sharded),
            "same": torch.equal(*both),
            "resumed": all(map(torch.equal, sharded, resumed)),
            "bytes": state[2] / state[0],
        }
        if not wide:
            found[named(method)]["parallel"] = error(train(parallel(net(False)), method, lambda x: x))
            found[named(method)]["saved"] = saved_whole(method, half)
    found["bases"], found["stage"], found["self-guided"] = shared_out(), stages(rank), self_guided(half)
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
    print(json.dumps(found) if rank == 0 else f"{found['stage']}; {found['nan']}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
