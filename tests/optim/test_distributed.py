"""Every low-rank optimizer in two processes: replicated (DDP) and sharded (FSDP2), as in one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = r"""
import json, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from lorank.optim import DCTAdamW, Eggroll, FiraAdamW, GaLoreAdamW, IntegerEggroll, Subspace, Trion, Votes
from lorank.evolution.egg import EggConfig, EggForCausalLM
from lorank.train.optimizers import adamw_8bit

MAKE = {
    "galore": lambda g: GaLoreAdamW(g, lr=0.01, weight_decay=0.1, update_gap=2),
    "galore-randomised": lambda g: GaLoreAdamW(g, lr=0.01, update_gap=2, basis="randomised", stagger=True),
    "fira": lambda g: FiraAdamW(g, lr=0.01, update_gap=2),
    "dct-adamw": lambda g: DCTAdamW(g, lr=0.01, weight_decay=0.1, error_feedback="8bit"),
    "trion": lambda g: Trion(g, lr=0.01, weight_decay=0.1),
}

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 8)).double()

def groups(model):
    return [{"params": [p for p in model.parameters() if p.ndim == 2], "rank": 3}, {"params": [p for p in model.parameters() if p.ndim == 1]}]

def batch(step):
    return torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))

def train(model, name, part):
    optimizer = MAKE[name](groups(model))
    for step in range(5):
        x = part(batch(step))
        (model(x) - x[:, :8].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in model.parameters()]

dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
half = lambda x: x.chunk(2)[rank]
for name in MAKE:
    alone = train(net(), name, lambda x: x)
    replicated = train(DistributedDataParallel(net()), name, half)
    sharded = net()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    sharded = train(fully_shard(sharded, mesh=mesh), name, half)
    error = lambda other: max(((a - b).norm() / a.norm()).item() for a, b in zip(alone, other))
    both = [torch.empty_like(replicated[0]) for _ in range(2)]
    dist.all_gather(both, replicated[0])
    found[name] = {"ddp": error(replicated), "fsdp": error(sharded), "same": torch.equal(*both)}
def evolve(part):
    model = net()
    estimate, optimizer = Eggroll(model, population=16, sigma=0.1, seed=1), torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        x = part(batch(step))
        fitness = lambda members: -(model(x.repeat(len(members), 1)) - x[:, :8].sin().repeat(len(members), 1)).square().view(len(members), -1).mean(1)
        estimate(fitness)
        optimizer.step()
    return [p.detach() for p in model.parameters()]

mine = evolve(half)
both = [torch.empty_like(mine[0]) for _ in range(2)]
dist.all_gather(both, mine[0].contiguous())
found["eggroll"] = {"same": torch.equal(*both), "ddp": max(((a - b).norm() / a.norm()).item() for a, b in zip(evolve(lambda x: x), mine))}
def vote(part):
    torch.manual_seed(0)
    model = EggForCausalLM(EggConfig(hidden_size=16, num_hidden_layers=1))
    estimate, optimizer = IntegerEggroll(model, population=64, group_size=0, seed=1), Votes(model.parameters(), lr=0.3, pairs=32)
    for step in range(3):
        estimate(part(torch.randint(1, 256, (4, 12), generator=torch.Generator().manual_seed(step))))
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])

mine = vote(half)
both = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(both, mine)
world, dist.get_world_size = dist.get_world_size, lambda *_: 1  # which sees the joint batch
found["egg"] = {"same": torch.equal(*both), "ddp": torch.equal(vote(lambda x: x), mine)}
dist.get_world_size = world
def shard(model):
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return model
sharded = shard(net())
optimizer = Subspace(groups(sharded), torch.optim.Adafactor, lr=0.01)
sharded(batch(0)).sum().backward()
try:
    optimizer.step()
except ValueError as refusal:
    found["adafactor"] = str(refusal)
sharded = shard(net().float())
optimizer = Subspace(groups(sharded), adamw_8bit, lr=0.01)
sharded(batch(0).float()).sum().backward()
integers = fully_shard(EggForCausalLM(EggConfig(hidden_size=16, num_hidden_layers=1)), mesh=mesh)
for name, refused in (
    ("8bit", optimizer.step),
    ("eggroll-fsdp", lambda: Eggroll(sharded, population=4, sigma=0.1)),
    ("egg-fsdp", lambda: IntegerEggroll(integers, population=4)),
):
    try:
        refused()
    except ValueError as refusal:
        found[name] = str(refusal)
try:
    GaLoreAdamW(groups(net()), lr=0.01, in_backward=True)
except ValueError as refusal:
    found["refusal"] = str(refusal)
bad = nn.Sequential(*net())
bad.append(nn.Linear(bad[-1].out_features, 1).double())  # of which one process has nothing
for layer in bad:
    if isinstance(layer, nn.Linear):
        fully_shard(layer, mesh=mesh)
optimizer = MAKE["galore"](groups(bad))
bad(batch(0)).sum().backward()
if rank == 1:
    next(bad.parameters()).grad.to_local()[0, 0] = float("nan")  # in one process's part only
try:
    optimizer.step()
    found["nan"] = "nothing"
except FloatingPointError as error:
    found["nan"] = str(error)
print(json.dumps(found) if rank == 0 else found["nan"], flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    script = tmp_path_factory.mktemp("distributed") / "program.py"
    script.write_text(PROGRAM)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = str(Path(__file__).parents[2])
    both = [
        subprocess.Popen([sys.executable, script], env={**shared, "RANK": r}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in "01"
    ]  # fmt: skip
    (said, error), (other, _) = (process.communicate(timeout=240) for process in both)
    assert both[0].returncode == 0, error
    return {**json.loads(said), "other": other.strip()}


@pytest.mark.parametrize("name", ["galore", "galore-randomised", "fira", "dct-adamw", "trion"])
def test_two_processes_do_what_one_does(found: dict, name: str) -> None:
    assert found[name]["ddp"] < 1e-9
    assert found[name]["fsdp"] < 1e-9
    assert found[name]["same"], "both processes have the same weights"


def test_members_of_eggroll_are_judged_by_the_rows_of_all_processes(found: dict) -> None:
    assert found["eggroll"]["same"] and found["eggroll"]["ddp"] < 1e-6


def test_integers_count_the_same_votes_in_all_processes(found: dict) -> None:
    assert found["egg"] == {"same": True, "ddp": True}


def test_what_cannot_work_on_parts_of_parameters_refuses_them(found: dict) -> None:
    for name, kind in (("adafactor", "Adafactor"), ("8bit", "AdamW8bit")):
        assert found[name].startswith(
            f"{kind} needs whole parameters and sees a part of those without rank, which are sharded"
        )
    assert found["eggroll-fsdp"].startswith("0.weight is sharded (FSDP2), and EGGROLL perturbs whole matrices")
    assert "is sharded (FSDP2), and EGGROLL perturbs whole matrices" in found["egg-fsdp"]


def test_gradients_of_one_process_only_are_refused(found: dict) -> None:
    assert "in_backward=True sees the gradient of one process only" in found["refusal"]


def test_a_gradient_that_is_no_number_in_one_part_stops_all_processes(found: dict) -> None:
    assert (
        found["nan"]
        == found["other"]
        == "the gradient of a parameter of shape (20, 12) is not finite; lower lr or clip gradients"
    )
