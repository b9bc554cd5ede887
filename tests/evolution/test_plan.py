"""EGGROLL in `lorank plan` and in dry runs: its cost, its words, and what cannot be planned."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lorank.accelerators import Fleet, find_accelerator
from lorank.plan.fits import fit_all
from lorank.plan.forecast import forecast_all
from lorank.train.budget import Budget
from lorank.train.recipe import Recipe

FLEET = Fleet(accelerator=find_accelerator("h100"), devices=1)
SHAPE = Recipe(size="tiny", batch_size=4, micro_batch_size=2, sequence_length=8)


def test_a_forecast_counts_every_member() -> None:
    dense, eggroll = forecast_all([SHAPE], ["dense", "eggroll"], fleet=FLEET, budget=Budget(tokens=10_000))
    assert eggroll.counts.flops.forward / 4 > 64 * dense.counts.flops.forward / 2, "64 members, each on the whole batch"
    assert eggroll.counts.memory.activations_bytes == 0 and eggroll.checkpoint == "none"
    assert eggroll.to_dict()["flops_per_token"] == eggroll.counts.flops_per_token
    with pytest.raises(ValueError, match="the memory of eggroll depends on --option chunk"):
        fit_all([eggroll], 10.0)


def test_a_step_includes_what_the_optimizer_does() -> None:
    """GaLore's products and its temporary matrices do not depend on where the gradient comes from."""
    one = dataclasses.replace(SHAPE, sequence_length=2, batch_size=2, options={"population": 2, "chunk": 2})
    galore, eggroll = forecast_all([one], ["galore", "galore+eggroll"], fleet=FLEET, budget=Budget(tokens=10_000))
    assert eggroll.optimizer_flops == galore.optimizer_flops > 0
    assert eggroll.counts.step == galore.counts.step
    assert eggroll.counts.memory.peak_when == "step", "two members of four tokens need less than the step"
    assert eggroll.counts.memory.peak_bytes == galore.counts.memory.peak_bytes


def test_integers_are_planned_by_recipe_and_by_flags(in_this_process: Any) -> None:
    integers = ["weight_decay=0", "clip=0", "warmup_steps=0", "precision=fp32", "lr=1", "tokenizer=bytes"]
    settings = [word for setting in integers for word in ("--set", setting)]
    small = [
        "--option",
        "population=2",
        "--option",
        "chunk=2",
        "--batch-size",
        "2",
        "--micro-batch-size",
        "2",
        "--sequence-length",
        "4",
    ]
    for asked in (["egg"], ["--model", "lorank_egg", "--method", "eggroll+votes", *settings]):
        code, said, error = in_this_process("plan", *asked, *small, "--tokens", "1M", "--json")
        assert code == 0, error
        (found,) = json.loads(said)["forecasts"]
        assert (found["method"], found["optimizer_flops_per_step"]) == ("eggroll+votes", 0)
        assert found["peak_bytes"] > 2 * found["parameters"]


def test_a_table_of_one_device(in_this_process: Any) -> None:
    code, said, error = in_this_process("plan", "--method", "eggroll", "--sequence-length", "4", "--devices", "1")
    assert code == 0, error
    assert "eggroll" in said


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("egg", "rank-1 int8 noise, σ = 2^-4; votes"),
        ("--method eggroll --sequence-length 4", "rank-1 noise, σ = 0.01; adamw"),
        ("--method cola+eggroll --optimizer muon --sequence-length 4", "rank-1 noise, σ = 0.01; muon"),
    ],
)
def test_dry_runs(flags: str, line: str, in_this_process: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    (tmp_path / "fox.txt").write_text("the quick brown fox counts lazy dogs\n" * 5_000)
    text = ["--data", tmp_path / "fox.txt", "--set", "tokenizer=bytes"]
    code, said, error = in_this_process("pretrain", *flags.split(), *text, "--dry-run")
    assert code == 0, error
    assert line in said and "memory at the peak of a step" in said and " members, " in said
