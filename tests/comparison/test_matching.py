"""What rows cost, and how ranks, widths and steps are chosen so that all spend the same."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorank.comparison.matching import CLOSE, Costs, narrow_to_match, with_steps
from lorank.comparison.results import gather
from lorank.comparison.rows import plan_rows
from lorank.comparison.runner import Comparison
from lorank.comparison.settings import ComparisonSettings
from lorank.train.model import build_config, build_model, check_causal
from lorank.train.recipe import Recipe

PLAIN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**PLAIN, "intermediate_size": 172},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
    "opt": {**PLAIN, "ffn_dim": 256, "word_embed_proj_dim": 64},
    "qwen2": {**PLAIN, "intermediate_size": 172, "num_key_value_heads": 2},
    "qwen3": {**PLAIN, "intermediate_size": 172, "num_key_value_heads": 2, "head_dim": 32},
    "gpt_neox": {**PLAIN, "intermediate_size": 256},
    "phi": {**PLAIN, "intermediate_size": 256},  # half of each head is rotated
}


@pytest.mark.parametrize("method", ["cola+spectron", "low-rank+loro", "cola+factor-lr", "apollo-mini"])
def test_an_optimizer_for_factors_may_take_part(
    of_type: Callable[..., Recipe], costs: Costs, tmp_path: Path, method: str
) -> None:
    recipe = of_type("llama", tmp_path / "m", **SHAPES["llama"])
    costs.check(dataclasses.replace(recipe, method=method, rank=None, options={}))


@pytest.mark.parametrize("model_type", SHAPES)
def test_a_narrower_model_is_of_the_same_architecture(
    of_type: Callable[..., Recipe], costs: Costs, tmp_path: Path, model_type: str
) -> None:
    recipe = dataclasses.replace(of_type(model_type, tmp_path / "m", **SHAPES[model_type]), method="dense", rank=None)
    whole = build_config(recipe, costs.tokenizer)
    kinds = [type(module) for module in build_model(recipe, whole).modules()]
    for part in (0.8, 0.45):
        target = part * costs.of("parameters", recipe)
        narrow, _ = narrow_to_match(recipe, costs, target, "parameters", tmp_path / str(part))
        small = build_config(narrow, costs.tokenizer)
        assert type(small) is type(whole) and small.hidden_size < whole.hidden_size + 1
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            assert getattr(small, name, None) == getattr(whole, name, None)
        model = build_model(narrow, small)
        assert [type(module) for module in model.modules()] == kinds
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(target, rel=CLOSE)
        check_causal(model)  # it runs


@pytest.mark.parametrize(("match", "figure"), [("params", "parameters"), ("memory", "memory_bytes")])
def test_rank_or_width_make_costs_equal(base: Recipe, costs: Costs, tmp_path: Path, match: Any, figure: Any) -> None:
    base = dataclasses.replace(base, rank=6)
    names = ["cola", "sltrain", "d=dense"] if match == "params" else ["cola", "sltrain"]
    found, _ = plan_rows(ComparisonSettings(base=base, methods=names, match=match, only=True), costs, tmp_path)
    target = costs.of(figure, found[0].candidates[0].recipe)
    for one in found[1:]:
        assert costs.of(figure, one.candidates[0].recipe) == pytest.approx(target, rel=0.02)
        assert one.chosen.startswith("hidden size" if one.method == "dense" else "rank")


def test_what_is_dropped_after_training_is_not_matched(
    base: Recipe, costs: Costs, quick, watcher, tmp_path: Path
) -> None:
    """MASA has a network for its coefficients while it trains, half as large as a small model."""
    short = dataclasses.replace(base, rank=None, steps=2, warmup_steps=1, eval_every=0, save_every=0)
    asked = ComparisonSettings(base=short, methods=["cola", "masa"], match="params", only=True)
    comparison = Comparison(tmp_path, asked, plan_rows(asked, costs, tmp_path / "models")[0], {"corpus": ""})
    comparison.run(watcher, after_each=lambda comparison: None)
    results = gather(comparison)
    assert results["match"]["ratios"]["masa"] == pytest.approx(1, abs=0.02)
    assert not any("not matched" in note for note in results["notes"])


def test_equal_time_means_steps_by_measured_speed(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    asked = ComparisonSettings(base=base, methods=["cola", "d=dense"], match="time")
    seconds = {"cola": 0.1, "d": 0.3, "dense": 0.15, "dense-muon": 0.2, "dense-small": 0.05, "dense-small-muon": 0.1}
    found, _ = plan_rows(asked, costs, tmp_path, seconds)
    assert [one.candidates[0].recipe.steps for one in found] == [6, 2, 4, 3, 12, 6]
    assert found[-2].candidates[0].recipe.warmup_steps == 4 and found[-2].candidates[0].recipe.eval_every == 4
    assert with_steps(dataclasses.replace(base, warmup_steps=0.25), 40).warmup == 10
    tight = dataclasses.replace(base, steps=40, schedule_steps=4, warmup_steps=3)
    assert (with_steps(tight, 9).schedule_steps, with_steps(tight, 9).warmup_steps) == (1, 0)
