"""The golden curves: the first steps of every recipe against its recorded curve, and what a curve notices."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from lorank.comparison import first_steps, repro
from lorank.comparison.first_steps import RECORDED, STEPS, TOLERANCE, WIDER, WIDTH, Curve
from lorank.methods.relora import ReLoRAHook
from lorank.methods.sst import SSTHook
from lorank.methods.switchlora import SwitchLoRAHook
from lorank.train import run
from lorank.train.data import sources
from lorank.train.folder import history
from lorank.train.methods import methods_of
from lorank.train.recipe import Recipe
from lorank.train.shipped import recipes_folder

pytestmark = pytest.mark.usefixtures("uncounted")


def off(name: str, **changes: Any) -> float:
    """How far the first steps are from their curve."""
    found = repro.find(name)
    curve = first_steps.first_steps(dataclasses.replace(found.recipe, **changes))
    return first_steps.deviation(curve, first_steps.recorded(found))[0]


def test_every_recipe_at_60m_has_a_reproduction_with_a_curve() -> None:
    """And every method of a paper has a recipe: tests/test_recipes.py."""
    recipes = {path.stem.removesuffix("-60m") for path in recipes_folder().glob("*-60m.yaml")}
    assert {f"{name}-60m" for name in ["cola-m", *recipes]} == set(repro.names())
    perplexities = {"cola-60m": 34.04, "sltrain-60m": 34.15, "galore-60m": 34.88, "fira-60m": 31.06, "sst-60m": None}
    assert {name: repro.find(name).published.perplexity for name in perplexities} == perplexities
    for name in repro.names():
        curve = first_steps.recorded(repro.find(name))
        assert len(curve.losses) == STEPS + 1
        assert curve.losses[-1] < curve.losses[0] - 0.5


@pytest.mark.parametrize("name", repro.names())
def test_a_curve_is_as_recorded(name: str) -> None:
    assert off(name) <= first_steps.tolerance_of(repro.find(name).recipe)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cola-60m", {"lr": 5e-3}),  # instead of 6e-3
        ("dense-60m", {"seed": 1}),
        ("sltrain-60m", {"options": {"alpha": 16.0, "density": 0.03}}),
        ("fira-60m", {"options": {"update_gap": 200, "scale": 0.25, "residual": "paper"}}),
    ],
    ids=lambda value: str(value),
)
def test_another_setting_is_noticed(name: str, changes: dict[str, Any]) -> None:
    assert off(name, **changes) > first_steps.tolerance_of(repro.find(name).recipe)


@pytest.mark.parametrize(
    ("name", "hook"), [("relora-60m", ReLoRAHook), ("switchlora-60m", SwitchLoRAHook), ("sst-60m", SSTHook)]
)
def test_a_method_that_never_acts_is_noticed(name: str, hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for act in ("before_step", "after_step"):
        monkeypatch.setattr(hook, act, lambda self: None)
    assert off(name) > TOLERANCE


def test_a_basis_that_is_never_refreshed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDED, "galore", {"update_gap": 1000})
    assert off("galore-60m") > WIDER["galore"]


def test_what_the_miniature_changes_is_listed(tmp_path: Path) -> None:
    """And nothing else is changed."""
    full = repro.find("sltrain-60m").recipe
    small = first_steps.miniature(full, tmp_path)
    listed = first_steps.differences(full)
    assert listed["alpha"] == (32.0, 4.0) and listed["warmup_steps"] == (1_100, 2) and listed["rank"] == (128, 0.25)
    sltrain = methods_of(small).method
    assert sltrain.alpha / (sltrain.rank * WIDTH) == 32 / 128  # type: ignore[attr-defined]
    silent = {"size", "model", "data", "method", "optimizer", "gradient", "rank", "options"}  # in words, or one by one
    for name in {field.name for field in dataclasses.fields(Recipe)} - set(listed) - silent:
        assert getattr(small, name) == getattr(full, name)
    assert (small.lr, small.precision, small.betas, small.seed) == (3e-3, "bf16-pure", [0.9, 0.999], 42)


@pytest.mark.parametrize("name", ["cola-60m", "galore-60m"])
def test_first_steps_on_the_embedded_corpus_learn(name: str, tmp_path: Path, monkeypatch) -> None:
    """A part of it, for time; no curve is kept: the standard library, which the corpus is, differs from Python to Python."""
    part = sources.embedded_files()[::40]
    monkeypatch.setattr(sources, "embedded_files", lambda: part)
    small = dataclasses.replace(first_steps.miniature(repro.find(name).recipe, tmp_path), data="embedded")
    summary = run.pretrain(small, tmp_path / "run", on_cpu=True)
    losses = [r["loss_nats_per_token"] for r in history(tmp_path / "run") if "loss_nats_per_token" in r]
    assert summary is not None and len(losses) == STEPS and all(map(math.isfinite, losses))
    assert sum(losses[-4:]) / 4 < losses[0] - 0.5


def test_a_curve_is_judged_by_its_worst_loss() -> None:
    curve = Curve([4.0, 2.0, 1.0], "", {})
    assert first_steps.deviation(curve._replace(losses=[4.0, 2.05, 1.0]), curve) == (pytest.approx(0.025), 2)
    assert first_steps.deviation(curve._replace(losses=[4.0, 2.0, 0.9]), curve) == (pytest.approx(0.1), 3)
    assert first_steps.deviation(curve._replace(losses=[4.0, math.nan, 1.0]), curve) == (math.inf, 2)
    assert first_steps.deviation(curve._replace(losses=[4.0, 2.0]), curve) == (math.inf, 3)


def test_the_command_fails_for_a_curve_that_is_off(repro_command, monkeypatch) -> None:
    expected = first_steps.recorded(repro.find("relora-60m"))
    monkeypatch.setattr(first_steps, "first_steps", lambda recipe: expected)
    code, out, err = repro_command("relora-60m", "--first-steps")
    assert code == 0 and "warmup_steps" in out and "recorded" in out and "within 0.3 %" in out, err
    shifted = expected._replace(losses=[loss * 1.02 for loss in expected.losses], versions={"torch": "9.9"})
    monkeypatch.setattr(first_steps, "first_steps", lambda recipe: shifted)
    code, out, _ = repro_command("relora-60m", "--first-steps")
    assert code == 1 and "OUTSIDE 0.3 %" in out and "(here 9.9)" in out


def test_other_calendars_and_missing_curves_are_one_sentence(repro_command, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(first_steps, "months", lambda: ["Brumaire"])
    code, _, err = repro_command("cola-60m", "--first-steps")
    assert code == 2 and "prints another text" in err and len(err.splitlines()) == 1
    found = dataclasses.replace(repro.find("cola-60m"), curve_file=tmp_path / "none.json")
    with pytest.raises(ValueError, match="has no curve of first steps"):
        first_steps.recorded(found)
