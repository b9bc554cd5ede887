"""The demonstration, shortened: both twins train, the table and the picture come out."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorank.cli import cli
from lorank.train import demo
from lorank.train.data import sources
from lorank.train.demo import LEARNING_RATES, demo_recipe, run_demo
from lorank.train.recipe import Recipe


def test_both_twins_see_the_same_tokens_in_the_same_order() -> None:
    dense, cola = demo_recipe("dense"), demo_recipe("cola")
    differing = {name for name, value in dense.to_dict().items() if cola.to_dict()[name] != value}
    assert differing <= {"method", "lr"} and set(LEARNING_RATES) == {"dense", "cola"}
    assert demo_recipe("cola", 50).steps == 50


def test_the_demo_leaves_two_runs_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, and on a part of the text."""
    some = sources.embedded_files()[::100]
    monkeypatch.setattr(sources, "embedded_files", lambda: some)

    def call(command: list[str], check: bool) -> Any:
        assert command[:3] == [sys.executable, "-m", "lorank"] and not check
        cli(command[3:], standalone_mode=False)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=call))
    said: list[str] = []
    summaries = run_demo(tmp_path, 5, say=said.append)
    assert [line.split()[:4] for line in said] == [["$", "lorank", "pretrain", "--method"]] * 2
    for method in LEARNING_RATES:
        folder = tmp_path / method
        assert Recipe.read(folder / "recipe.yaml") == demo_recipe(method, 5)
        assert json.loads((folder / "summary.json").read_text())["validation_perplexity"] < 4096
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    ratio = summaries["cola"]["block_parameters"] / summaries["dense"]["block_parameters"]
    assert 0.45 < ratio < 0.55
    assert summaries["cola"]["flops_per_token"] < 0.8 * summaries["dense"]["flops_per_token"]
    with pytest.raises(ValueError, match="already holds a run"):
        run_demo(tmp_path, 5)
