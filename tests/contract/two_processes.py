"""Run twice at a time by test_processes.py: every optimizer in two processes, as in one, and others; says what it found as JSON."""

import copy
import importlib.util
import json
import sys
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
from transformers import LlamaConfig, LlamaForCausalLM

from lorank import MASA, GaLore, Method, Muon, SelfGuided, adapt_convolutions, convert, optimizer, step_hook
from lorank.evolution.egg_model import EggConfig, EggForCausalLM
from lorank.evolution.eggroll import Eggroll
from lorank.evolution.integers import IntegerEggroll
from lorank.evolution.votes import VoteOptimizer
from lorank.methods.self_guided import FadingGuide, GuidedLinear
from lorank.optim.bases import singular_basis
from lorank.optim.shards import local, whole
from lorank.table import find, method_names
from tests.contract.conftest import METHODS, NEED_BITSANDBYTES, OPTIONS, mover, named
from tests.contract.gathering import Gathered


class Experts(nn.Module):
    """A pair of factors for each of three experts, which two processes cannot share evenly; their outputs are added."""

    def __init__(self, d: int, E: int = 3):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(E, 6, d) / d), nn.Parameter(torch.randn(E, d, 6) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ self.A.mT @ self.B.mT).sum(0)


def net(wide: bool, experts: int = 3) -> nn.Sequential:
    """If `wide`, then enough for moments of a byte."""
    torch.manual_seed(0)
    d = (80, 70) if wide else (20, 10)
    layers = [nn.Linear(12, d[0]), nn.Tanh(), nn.Linear(*d), nn.Tanh(), Experts(d[1], experts), nn.Linear(d[1], 8)]
    return nn.Sequential(*layers).to(torch.float32 if wide else torch.float64)


def groups(model: nn.Module, method: Method, rank: int = 3) -> list[dict[str, Any]]:
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    chosen = mover(method).chosen(rank=rank)
    if getattr(method, "structure", None):
        vectors.append(
            matrices.pop()
        )  # two layers are a pair of factors, and the experts' are; the last layer is in none
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
    seen = Gathered()
    for step in range(3):
        if step == stop:
            saved = optimizer.state_dict()
            optimizer = method.optimizer(groups(model, method), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
            optimizer.load_state_dict(saved)
        x = part(torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
        x = x.to(next(model.parameters()).dtype)
        (model(x) - x[:, :8].sin()).square().mean().backward()
        seen.bytes *= step != 1
        with seen:
            optimizer.step()
        optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    kept.append((sum(local(value).nbytes for value in states), seen.bytes / 2))
    return [whole(p).detach() for p in model.parameters()]


kept: list[tuple[int, float]] = []
"""Bytes of state in this process, and what became whole in it in the second and third step on average, by run."""


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


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, FloatingPointError) as error:
        return str(error)
    return "nothing"


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
    return "stepped" if error_of(optimizer.step) == "nothing" else "stopped"


def kept_in() -> list[str]:
    """Types of what GaLore keeps of a matrix in bfloat16, its counters left out."""
    model = shard(nn.Sequential(nn.Linear(12, 20, bias=False, dtype=torch.bfloat16)))
    optimizer = GaLore().optimizer([{"params": model.parameters(), "rank": 3}], lr=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return sorted({str(value.dtype) for state in optimizer.state.values() for value in state.values() if value.ndim})


def by_chance() -> list[bool]:
    """Whether weights that are rounded by chance are those of one process, of an odd number of rows too."""
    ends = []
    for wrap in (lambda model: model, shard):
        torch.manual_seed(0)
        model = wrap(nn.Sequential(nn.Linear(12, 21), nn.Linear(21, 8)).bfloat16())
        method = Muon(stochastic_rounding=True)
        optimizer = method.optimizer(groups(model, method), lr=0.01)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        ends.append([whole(p).detach() for p in model.parameters()])
    return list(map(torch.equal, *ends))


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


def masa(half: Callable[[Tensor], Tensor]) -> float:
    """How far MASA under FSDP2 is from one process: its atoms are at the root, its residuals in the blocks."""

    def converted() -> Any:
        torch.manual_seed(0)
        shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4}
        model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).double()
        return convert(model, MASA(groups=2, residual_rank=6))

    def trained(model: Any, part: Callable[[Tensor], Tensor]) -> list[Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(3):
            ids = part(torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(step)))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [whole(p).detach() for p in model.parameters()]

    alone, sharded, mesh = trained(converted(), lambda ids: ids), converted(), init_device_mesh("cpu", (2,))
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    ends = zip(alone, trained(fully_shard(sharded, mesh=mesh), half), strict=True)
    return max(((a - b).norm() / a.norm()).item() for a, b in ends)


def adapted(half: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """For every adapter, how far two processes are from one (with buffers), under DDP and FSDP2, or the sentence that refuses it."""
    torch.manual_seed(0)
    shape = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    dense, found = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).double(), {}

    def trained(name: str, wrap: Callable[[Any], Any], part: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        model = convert(copy.deepcopy(dense), find(name)(**find(name).soon, rank=4))
        wrapped, moving = wrap(model), optimizer(model, lr=1e-2)
        step_hook(model, moving, steps=3)
        for step in range(3):
            for ids in torch.randint(0, 24, (2, 4, 10), generator=torch.Generator().manual_seed(step)):
                wrapped(input_ids=part(ids), labels=part(ids)).loss.backward()
            moving.step()
            moving.zero_grad()
        return [whole(p).detach().double() for p in (*model.parameters(), *model.buffers())]

    def sharded(model: Any) -> Any:
        fully_shard(model.model.layers[0], mesh=mesh)
        return fully_shard(model, mesh=mesh)

    mesh = init_device_mesh("cpu", (2,))
    for name in [name for name in method_names("method") if find(name).adapts]:
        alone, found[name] = trained(name, lambda model: model, lambda ids: ids), []
        for wrap in (DistributedDataParallel, sharded):
            try:
                ends = zip(alone, trained(name, wrap, half), strict=True)
                found[name].append(max(((a - b).norm() / a.norm().clamp(min=1e-9)).item() for a, b in ends))
            except ValueError as refusal:
                found[name].append(str(refusal))
    return found


def convolved(half: Callable[[Tensor], Tensor]) -> list[float]:
    """The same of adapted convolutions."""
    ends, as_it_is = [], lambda x: x
    for wrap, part in ((as_it_is, as_it_is), (DistributedDataParallel, half), (fully_shard, half)):
        torch.manual_seed(0)
        model: Any = adapt_convolutions(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3)).double(), magnitude=True)
        wrapped, moving = wrap(model), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            wrapped(part(torch.randn(4, 2, 8, 8, dtype=torch.float64))).square().mean().backward()
            moving.step()
            moving.zero_grad()
        ends.append(torch.cat([whole(p).detach().flatten() for p in model.parameters()]))
    return [((ends[0] - other).norm() / ends[0].norm()).item() for other in ends[1:]]


def evolved(part: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights after three steps of EGGROLL, in which each process judges its part of a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 8)).double()
    estimate, optimizer = Eggroll(model, population=16, sigma=0.1, seed=1), torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        x = part(torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))

        def fitness(members: Any, x: Tensor = x) -> Tensor:
            error = model(x.repeat(len(members), 1)) - x[:, :8].sin().repeat(len(members), 1)
            return -error.square().view(len(members), -1).mean(1)

        estimate(fitness)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def voted(part: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights after three steps of votes on integers."""
    torch.manual_seed(0)
    model = EggForCausalLM(EggConfig(hidden_size=16, num_hidden_layers=1))
    estimate = IntegerEggroll(model, population=64, group_size=0, seed=1)
    optimizer = VoteOptimizer(model.parameters(), lr=0.3, pairs=32)
    for step in range(3):
        estimate(part(torch.randint(1, 256, (4, 12), generator=torch.Generator().manual_seed(step))))
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def evolution(half: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Whether both processes hold the same weights, how far they are from those of one, and how sharded matrices are refused."""
    found: dict[str, Any] = {}
    for name, train_with in (("eggroll", evolved), ("egg", voted)):
        mine = train_with(half)
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        found[name] = {"same": torch.equal(*both)}
        world, dist.get_world_size = dist.get_world_size, lambda *_: 1  # which sees the joint batch
        alone = train_with(lambda x: x)
        dist.get_world_size = world
        found[name]["ddp"] = (
            torch.equal(alone, mine) if name == "egg" else ((alone - mine).norm() / alone.norm()).item()
        )
    integers = fully_shard(
        EggForCausalLM(EggConfig(hidden_size=16, num_hidden_layers=1)), mesh=init_device_mesh("cpu", (2,))
    )
    refused: dict[str, Callable[[], Any]] = {
        "eggroll-fsdp": lambda: Eggroll(shard(net(False)), population=4, sigma=0.1),
        "egg-fsdp": lambda: IntegerEggroll(integers, population=4),
    }
    return found | {name: error_of(make) for name, make in refused.items()}


def others(rank: int, half: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """All but what each optimizer does."""
    found: dict[str, Any] = {
        "bases": shared_out(),
        "stage": stages(rank),
        "self-guided": self_guided(half),
        "masa": masa(half),
        "adapters": adapted(half),
        "convolutions": convolved(half),
        "kept in": kept_in(),
        "by chance": by_chance(),
        **evolution(half),
    }
    found["refusal"] = error_of(lambda: GaLore(in_backward=True).optimizer(groups(net(False), GaLore()), lr=0.01))
    bad = shard(net(False).append(nn.Linear(8, 1).double()))  # of which one process has nothing
    optimizer = GaLore().optimizer(groups(bad, GaLore()), lr=0.01)
    bad(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    if rank == 1:
        next(bad.parameters()).grad.to_local()[0, 0] = float("nan")  # type: ignore[union-attr]
    return found | {"nan": error_of(optimizer.step)}


OTHERS = "others"


def main() -> None:
    """With the names of optimizers, and `OTHERS`, as arguments: what is asked for, in JSON."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), dict[str, Any]()
    half = lambda x: x.chunk(2)[rank]  # noqa: E731
    with_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    for method in METHODS + OPTIONS[2:]:
        wide = named(method) in NEED_BITSANDBYTES
        if named(method) not in sys.argv[1:] or (wide and not with_bitsandbytes):
            continue
        alone = train(net(wide), method, lambda x: x)
        replicated = train(DistributedDataParallel(net(wide)), method, half)
        sharded, resumed = (train(shard(net(wide)), method, half, stop) for stop in (3, 1))
        state, made = kept[-4:], groups(net(wide), method)
        said = sum(method.gathered_bytes(p, group) for group in made for p in group["params"])
        both = [torch.empty_like(replicated[0]) for _ in range(2)]
        dist.all_gather(both, replicated[0])
        error = lambda other: max(((a - b).norm() / a.norm()).item() for a, b in zip(alone, other, strict=True))  # noqa: E731, B023
        found[named(method)] = {
            "ddp": error(replicated),
            "fsdp": error(sharded),
            "same": torch.equal(*both),
            "resumed": all(map(torch.equal, sharded, resumed)),
            "bytes": state[2][0] / state[0][0],
            "gathered": [said, state[2][1]],
        }
        if not wide:
            found[named(method)]["parallel"] = error(train(parallel(net(False)), method, lambda x: x))
            found[named(method)]["saved"] = saved_whole(method, half)
    if OTHERS in sys.argv:
        found |= others(rank, half)
    print(json.dumps(found) if rank == 0 else f"{found.get('stage')}; {found.get('nan')}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
