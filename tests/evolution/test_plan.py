"""EGGROLL in `lorank plan` and in dry runs: its cost, its words, and what cannot be planned."""

from pathlib import Path
from typing import Any

import pytest

from lorank.accelerators import Fleet, find_accelerator
from lorank.plan.fits import fit_all
from lorank.plan.forecast import forecast_all
from lorank.train.budget import Budget
from lorank.train.recipe import Recipe

FLEET = Fleet(accelerator=find_accelerator("h100"), devices=1)
SHAPE = Recipe(size="20m", batch_size=4, micro_batch_size=2, sequence_length=32)


def test_a_forecast_counts_every_member() -> None:
    dense, eggroll = forecast_all([SHAPE], ["dense", "eggroll"], fleet=FLEET, budget=Budget(tokens=10_000))
    assert eggroll.counts.flops.forward / 4 > 64 * dense.counts.flops.forward / 2, "64 members, each on the whole batch"
    assert eggroll.counts.memory.activations_bytes == 0 and eggroll.checkpoint == "none"
    assert eggroll.to_dict()["flops_per_token"] == eggroll.counts.flops_per_token
    with pytest.raises(ValueError, match="the memory of eggroll depends on --option chunk"):
        fit_all([eggroll], 10.0)


def test_a_table_of_one_device(in_this_process: Any) -> None:
    code, said, error = in_this_process("plan", "--method", "eggroll", "--size", "20m", "--devices", "1")
    assert code == 0, error
    assert "eggroll" in said


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("egg", "rank-1 int8 noise, σ = 2^-4; votes"),
        ("--method eggroll --sequence-length 16", "rank-1 noise, σ = 0.01; adamw"),
        ("--method cola+eggroll --optimizer muon --sequence-length 16", "rank-1 noise, σ = 0.01; muon"),
    ],
)
def test_dry_runs(flags: str, line: str, in_this_process: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    (tmp_path / "fox.txt").write_text("the quick brown fox counts lazy dogs\n" * 5_000)
    text = ["--data", tmp_path / "fox.txt", "--set", "tokenizer=bytes"]
    code, said, error = in_this_process("pretrain", *flags.split(), *text, "--dry-run")
    assert code == 0, error
    assert line in said and "memory at the peak of a step" in said and " members, " in said
