"""`lorank pretrain --fsdp` and `--tensor-parallel`: what one process computes, resumed by any other number, or refused by name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lorank.cli import cli
from lorank.train import run
from lorank.train.engine import Engine
from lorank.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("forked_processes")

PROGRAM = Path(__file__).with_name("several_processes.py")


@pytest.mark.parametrize("chain", ["two, one, two", pytest.param("two, four, one", marks=pytest.mark.slow)])
def test_a_run_goes_from_engine_to_engine_without_a_trace(chain: str, tmp_path: Path) -> None:
    """By tensor parallelism in two processes, of which one is killed, then in one, then by FSDP2 in two; or by FSDP2 in two, by both in
    four, and in one, on text that is read while it trains. Losses and weights are those of one process, and so are the files."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", PROGRAM, tmp_path, chain], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["losses"] < 1e-6 and found["weights"] < 1e-6 and found["same files"], found
    first, *_, last = found["ends"]
    assert found["ends"][first][0]["said"].startswith("another process of this run was killed or has failed"), found
    shared = first if "fsdp" in first else last
    assert max(end["held"] for end in found["ends"][shared]) < 0.51, "each process holds its part"


@pytest.mark.parametrize(
    ("world", "engine", "changes", "said"),
    [
        (1, {"fsdp": True}, {}, "--fsdp needs several processes, got one; start it with torchrun"),
        (1, {"tensor_parallel": 2}, {}, "--tensor-parallel 2 needs several processes, got one"),
        (4, {"tensor_parallel": 3}, {}, "--tensor-parallel must divide the 4 processes, got 3"),
        (4, {"tensor_parallel": 2}, {}, "--tensor-parallel 2 of 4 processes needs --fsdp for the others"),
        (2, {"fsdp": True}, {"compile": True}, "compile must be false with --fsdp"),
        (2, {"fsdp": True}, {"distil": "teacher"}, "distil must be left out with --fsdp"),
        (2, {"tensor_parallel": 2}, {"method": "crnet"}, "--tensor-parallel 2: .* must be two factors"),
        (2, {"tensor_parallel": 2}, {"shape": {"num_attention_heads": 3, "hidden_size": 24, "num_key_value_heads": 3}}, "--tensor-parallel 2: num_attention_heads must be a multiple of the 2 processes"),
        (2, {"fsdp": True}, {"batch_size": 3}, "batch_size must be a multiple of micro_batch_size=1 times 2 processes, got 3"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_training(
    world: int,
    engine: dict[str, Any],
    changes: dict[str, Any],
    said: str,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=said):
        run.pretrain(recipe(**changes), tmp_path / "run", on_cpu=True, engine=Engine(**engine))
    assert not [*tmp_path.glob("run/checkpoint-*"), *tmp_path.glob("run/recipe.yaml")]


def test_the_command_has_the_flags() -> None:
    done = CliRunner().invoke(cli, ["pretrain", "--fsdp", "--tensor-parallel", "2", "--method", "cola"])
    assert "needs several processes, got one" in str(done.exception)


def test_accelerate_that_was_told_to_shard_gets_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own wrapping would hold the whole model in every process."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert Engine.of(None) == Engine(fsdp=True) and os.environ["ACCELERATE_USE_FSDP"] == "false"
    assert Engine.of(None) == Engine()
