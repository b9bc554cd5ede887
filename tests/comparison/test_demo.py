"""The demonstration, shortened: all rows train, the table and the picture are there."""

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lorank.comparison import demo
from lorank.comparison.demo import ROWS, demo_recipe
from lorank.train.data import sources
from lorank.train.methods import methods_of
from lorank.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("forked_processes")


def test_all_rows_see_the_same_tokens_in_the_same_order() -> None:
    dense = demo_recipe("dense").to_dict()
    for row in ROWS:
        differing = {name for name, value in demo_recipe(row).to_dict().items() if dense[name] != value}
        assert differing <= {"method", "optimizer", "lr"}
    assert demo_recipe("cola-muon", 50).steps == 50


def test_the_demo_leaves_its_runs_and_a_picture(
    processless, in_this_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here in one process, in small batches, and on a part of the text."""

    class Small(processless):
        @classmethod
        def start(cls, recipe: Recipe, folder: Path) -> "Small":
            return super().start(dataclasses.replace(recipe, batch_size=4), folder)

    some = sources.embedded_files()[::30]
    monkeypatch.setattr(sources, "embedded_files", lambda: some)
    monkeypatch.setattr(demo, "PretrainProcess", Small)
    out = tmp_path / "demo"
    code, said, err = in_this_process("demo", "--steps", "10", "--out", out)
    assert code == 0, err
    commands = [line.partition(" --steps")[0] for line in said.splitlines() if line.startswith("$ ")]
    asked = ("dense --optimizer adamw", "dense --optimizer muon", "cola --optimizer muon")
    assert commands == [f"$ lorank pretrain --method {one}" for one in asked]
    summaries = {method: json.loads((out / method / "summary.json").read_text()) for method in ROWS}
    for method, summary in summaries.items():
        ran, asked = Recipe.read(out / method / "recipe.yaml"), demo_recipe(method, 10)
        ran = dataclasses.replace(ran, batch_size=asked.batch_size)
        assert dataclasses.replace(ran, optimizer=asked.optimizer) == asked and methods_of(ran) == methods_of(asked)
        assert summary["validation_perplexity"] < 4096 and f"{summary['parameters']:,}" in said
        assert f"{method} writes" in said
    names = [one.text or "" for one in ElementTree.parse(out / "loss.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert all(any(name.startswith(f"{row} ") for name in names) for row in ROWS) and "training FLOPs" in names
    ratio = summaries["cola-muon"]["block_parameters"] / summaries["dense"]["block_parameters"]
    assert 0.45 < ratio < 0.55
    assert summaries["cola-muon"]["flops_per_token"] < 0.8 * summaries["dense"]["flops_per_token"]
    code, _, err = in_this_process("demo", "--steps", "10", "--out", out)
    assert code == 2 and "already holds a run" in err
