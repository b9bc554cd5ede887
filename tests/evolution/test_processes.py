"""EGGROLL in two processes: each judges its part of a batch, and both hold the same weights afterwards."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = r"""
import json, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from lorank.evolution.egg import EggConfig, EggForCausalLM
from lorank.evolution.eggroll import Eggroll
from lorank.evolution.integers import IntegerEggroll
from lorank.evolution.votes import VoteOptimizer

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 8)).double()

def batch(step):
    return torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))

dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
half = lambda x: x.chunk(2)[rank]
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
    estimate, optimizer = IntegerEggroll(model, population=64, group_size=0, seed=1), VoteOptimizer(model.parameters(), lr=0.3, pairs=32)
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
sharded = net()
mesh = init_device_mesh("cpu", (2,))
for layer in sharded:
    if isinstance(layer, nn.Linear):
        fully_shard(layer, mesh=mesh)
integers = fully_shard(EggForCausalLM(EggConfig(hidden_size=16, num_hidden_layers=1)), mesh=mesh)
for name, refused in (
    ("eggroll-fsdp", lambda: Eggroll(sharded, population=4, sigma=0.1)),
    ("egg-fsdp", lambda: IntegerEggroll(integers, population=4)),
):
    try:
        refused()
    except ValueError as refusal:
        found[name] = str(refusal)
print(json.dumps(found), flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
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
    (said, error), _ = (process.communicate(timeout=240) for process in both)
    assert both[0].returncode == 0, error
    return json.loads(said)


def test_members_are_judged_by_the_rows_of_all_processes(found: dict[str, Any]) -> None:
    assert found["eggroll"]["same"] and found["eggroll"]["ddp"] < 1e-6


def test_integers_count_the_same_votes_in_all_processes(found: dict[str, Any]) -> None:
    assert found["egg"] == {"same": True, "ddp": True}


def test_sharded_matrices_are_refused(found: dict[str, Any]) -> None:
    assert found["eggroll-fsdp"].startswith("0.weight is sharded (FSDP2), but EGGROLL perturbs whole matrices")
    assert "is sharded (FSDP2), but EGGROLL perturbs whole matrices" in found["egg-fsdp"]
