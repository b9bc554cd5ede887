"""The demonstration, shortened: both models train, the table and the picture are there."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lorank.comparison import demo
from lorank.comparison.demo import LEARNING_RATES, demo_recipe
from lorank.train.data import sources
from lorank.train.recipe import Recipe


def test_both_twins_see_the_same_tokens_in_the_same_order() -> None:
    dense, cola = demo_recipe("dense"), demo_recipe("cola")
    differing = {name for name, value in dense.to_dict().items() if cola.to_dict()[name] != value}
    assert differing <= {"method", "lr"} and set(LEARNING_RATES) == {"dense", "cola"}
    assert demo_recipe("cola", 50).steps == 50


def test_the_demo_leaves_two_runs_and_a_picture(
    processless, in_this_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here in one process, and on a part of the text."""
    some = sources.embedded_files()[::30]
    monkeypatch.setattr(sources, "embedded_files", lambda: some)
    monkeypatch.setattr(demo, "PretrainProcess", processless)
    out = tmp_path / "demo"
    code, said, err = in_this_process("demo", "--steps", "10", "--out", out)
    assert code == 0, err
    commands = [line.split()[:5] for line in said.splitlines() if line.startswith("$ ")]
    assert commands == [["$", "lorank", "pretrain", "--method", method] for method in ("dense", "cola")]
    summaries = {method: json.loads((out / method / "summary.json").read_text()) for method in LEARNING_RATES}
    for method, summary in summaries.items():
        assert Recipe.read(out / method / "recipe.yaml") == demo_recipe(method, 10)
        assert summary["validation_perplexity"] < 4096 and f"{summary['parameters']:,}" in said
        assert f"{method} writes" in said
    names = [one.text or "" for one in ElementTree.parse(out / "loss.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert any(name.startswith("dense ") for name in names) and any(name.startswith("cola ") for name in names)
    ratio = summaries["cola"]["block_parameters"] / summaries["dense"]["block_parameters"]
    assert 0.45 < ratio < 0.55
    assert summaries["cola"]["flops_per_token"] < 0.8 * summaries["dense"]["flops_per_token"]
    code, _, err = in_this_process("demo", "--steps", "10", "--out", out)
    assert code == 2 and "already holds a run" in err
