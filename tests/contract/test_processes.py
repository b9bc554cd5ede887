"""Two processes do what one does: every optimizer, populations that are judged together, and a dictionary that blocks share."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorank import Method
from lorank.table import find, method_names
from tests.contract.conftest import METHODS, NEED_BITSANDBYTES, OPTIONS, named
from tests.contract.two_processes import OTHERS

pytestmark = pytest.mark.usefixtures("forked_processes")

PROGRAM = Path(__file__).parent / "two_processes.py"


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What `two_processes.py` says in each of two processes, of what the chosen tests ask for."""
    items: list[Any] = [item for item in request.session.items if item.path.name == Path(__file__).name]
    optimizers = [item for item in items if item.originalname == test_two_processes_do_what_one_does.__name__]
    asked = [named(item.callspec.params["method"]) for item in optimizers]
    asked += [OTHERS] if len(optimizers) < len(items) else []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = str(Path(__file__).parents[2])
    both = [
        subprocess.Popen([sys.executable, PROGRAM, *asked], env={**shared, "RANK": r}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in "01"
    ]  # fmt: skip
    (said, error), (other, _) = (process.communicate(timeout=600) for process in both)
    assert both[0].returncode == 0, error
    return {**json.loads(said), "other": other.strip()}


@pytest.mark.parametrize("method", METHODS + OPTIONS[2:], ids=named)
def test_two_processes_do_what_one_does(found: dict[str, Any], method: Method) -> None:
    """Replicated (DDP), and sharded (FSDP2), where state as large as the weights is sharded too."""
    result = found[named(method)]
    tolerance = 1e-3 if named(method) in NEED_BITSANDBYTES else 1e-12  # a code may be rounded the other way
    assert result["ddp"] < tolerance and result["fsdp"] < tolerance
    assert result["same"], "both processes have the same weights"
    assert result["resumed"], "a sharded run goes on from its saved state bit by bit"
    assert result.get("parallel", 0) < tolerance, "tensor parallel"
    assert result.get("saved", 0) < tolerance, (
        "saved whole with torch.distributed.checkpoint, and loaded by one process or two"
    )
    said, gathered = result["gathered"]
    assert said == gathered, "bytes that are gathered in a step"
    most = 0.95 if method.name == "adafactor" else 0.6  # whose state is counters, a row and a column
    assert result["bytes"] < most, (
        "of three experts one process has two; else each keeps half, but for counters and scales"
    )


def test_two_processes_share_a_fading_guide(found: dict[str, Any]) -> None:
    error, alike = found["self-guided"]
    assert error < 1e-12 and alike


def test_each_process_finds_a_part_of_the_bases(found: dict[str, Any]) -> None:
    assert found["bases"] == [5, 4]


def test_moments_of_sharded_weights_have_their_type(found: dict[str, Any]) -> None:
    assert found["kept in"] == ["torch.bfloat16"]


def test_sharded_weights_are_rounded_by_the_same_chance(found: dict[str, Any]) -> None:
    assert found["by chance"] == [True] * 4


def test_a_pipeline_stage_steps_for_itself(found: dict[str, Any]) -> None:
    assert (found["stage"], found["other"].partition(";")[0]) == ("stepped", "stopped")


def test_gradients_of_one_process_only_are_refused(found: dict[str, Any]) -> None:
    assert "in_backward must be False in distributed runs" in found["refusal"]


def test_one_part_that_is_not_finite_stops_all_processes(found: dict[str, Any]) -> None:
    said = "the gradient of a parameter of shape (20, 12) is not finite; lower lr or clip gradients"
    assert found["nan"] == found["other"].partition("; ")[2] == said


def test_masa_sharded_over_two_processes_trains_as_in_one(found: dict[str, Any]) -> None:
    """FSDP2: atoms at the root, residuals in the blocks."""
    assert found["masa"] < 1e-9


WHOLE = ("osft", "comp-lora")
"""Adapters that edit whole matrices between steps."""


@pytest.mark.parametrize("name", [name for name in method_names("method") if find(name).adapts])
def test_adapters_train_in_two_processes_as_in_one(found: dict[str, Any], name: str) -> None:
    ddp, fsdp = found["adapters"][name]
    assert ddp < 1e-9
    if name in WHOLE:
        assert "changes whole weights between steps, but they are sharded" in fsdp
    else:
        assert fsdp < 1e-9


def test_adapted_convolutions_train_in_two_processes_as_in_one(found: dict[str, Any]) -> None:
    assert max(found["convolutions"]) < 1e-9


def test_members_are_judged_by_the_rows_of_all_processes(found: dict[str, Any]) -> None:
    assert found["eggroll"]["same"] and found["eggroll"]["ddp"] < 1e-6


def test_integers_count_the_same_votes_in_all_processes(found: dict[str, Any]) -> None:
    assert found["egg"] == {"same": True, "ddp": True}


def test_sharded_matrices_cannot_be_perturbed(found: dict[str, Any]) -> None:
    assert found["eggroll-fsdp"].startswith("0.weight is sharded (FSDP2), but EGGROLL perturbs whole matrices")
    assert "is sharded (FSDP2), but EGGROLL perturbs whole matrices" in found["egg-fsdp"]
