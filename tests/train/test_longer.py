"""A finished run is trained longer: its schedule stays, and the result is that of a run which was that long from the start."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorank.train.budget import Budget
from lorank.train.folder import longer, read_json, read_run
from lorank.train.methods import schedule_of
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain

pytestmark = pytest.mark.usefixtures("quick")


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "relora", "options": {"cycle": 3, "restart_warmup_steps": 1}},
        {"method": "switchlora", "options": {"interval": 2, "freeze_steps": 1}},
        {"method": "self-guided"},
        {"method": "low-rank+loro", "options": {"update_gap": 2, "restart_warmup_steps": 1}},
    ],
    ids=lambda changes: changes.get("method", "cola"),
)
def test_a_longer_run_is_what_it_would_have_been(
    changes: dict[str, Any], recipe: Callable[..., Recipe], losses: Any, tmp_path: Path
) -> None:
    """Six steps, then ten; then stopped and resumed; and ten at once with the schedule of six."""
    short, out = recipe(steps=6, eval_every=0, **changes), tmp_path / "run"
    pretrain(short, out)
    summary = pretrain(read_run(out), out, budget=Budget(steps=10), resume=True)
    assert summary is not None and summary.steps == read_run(out).steps == 10
    whole = dataclasses.replace(short, steps=10, schedule_steps=6)
    pretrain(whole, tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole") and len(losses(out)) == 10
    assert same_weights(out, tmp_path / "whole")


def test_a_constant_rate_is_no_other_in_a_longer_run(
    recipe: Callable[..., Recipe], losses: Any, tmp_path: Path
) -> None:
    """Nor is a schedule that has not ended: six steps of a schedule of ten, and four more."""
    constant, unended = (
        recipe(min_lr_ratio=1.0, eval_every=0),
        recipe(schedule_steps=10, warmup_steps=0.2, eval_every=0),
    )
    for name, one in (("constant", constant), ("unended", unended)):
        pretrain(dataclasses.replace(one, steps=6), tmp_path / name)
        pretrain(read_run(tmp_path / name), tmp_path / name, budget=Budget(tokens=10 * 4 * 32), resume=True)
        pretrain(dataclasses.replace(one, steps=10, schedule_steps=None), tmp_path / f"{name}-whole")
        assert losses(tmp_path / name) == losses(tmp_path / f"{name}-whole")


def test_a_longer_run_that_is_stopped_resumes(
    recipe: Callable[..., Recipe], losses: Any, before_step: Any, tmp_path: Path
) -> None:
    out, lines = tmp_path / "run", list[str]()
    pretrain(recipe(steps=4, eval_every=0), out)
    began, model = (out / "run.json").read_text(), (out / "model.safetensors").read_bytes()
    with pytest.raises(MemoryError):
        pretrain(read_run(out), out, budget=Budget(steps=8), resume=True, callbacks=[before_step(6)], say=lines.append)
    assert lines[0].startswith("8 steps") and lines[1] == "the learning rate stays where its schedule ends, at step 4"
    assert (out / "model.safetensors").read_bytes() == model and read_json(out / "summary.json")["steps"] == 4
    summary = pretrain(read_run(out), out, resume=True)
    assert summary is not None and summary.steps == 8 and (out / "run.json").read_text() == began
    with pytest.raises(ValueError, match="is finished.*train it longer with --steps"):
        pretrain(read_run(out), out, resume=True)


def test_what_cannot_be_longer_is_refused(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(recipe(steps=2, warmup_steps=0, eval_every=0, save_every=0), out)
    for steps, said in ((2, "steps must be above 2"), (1, "steps must be above 2")):
        with pytest.raises(ValueError, match=said):
            longer(read_run(out), steps)
    with pytest.raises(ValueError, match="has no checkpoint, from which it could be trained longer"):
        pretrain(read_run(out), out, budget=Budget(steps=4), resume=True)
    with pytest.raises(ValueError, match="min_lr_ratio must be above 0 to train a run longer"):
        longer(recipe(min_lr_ratio=0.0), 20)


def test_only_a_longer_run_may_have_another_recipe(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(recipe(steps=2, warmup_steps=0, eval_every=0), out)
    text = (out / "recipe.yaml").read_text()
    for steps in (1, 3):
        (out / "recipe.yaml").write_text(text.replace("\nsteps: 2\n", f"\nsteps: {steps}\n"))
        with pytest.raises(ValueError, match="steps was 2 when the run began"):
            read_run(out)


@pytest.mark.parametrize("method", ["cola", "relora", "sst", "low-rank+loro"])
def test_no_rate_rises_above_where_the_schedule_ends(method: str) -> None:
    """Restarts climb to it from 0."""
    plain = Recipe(method=method, steps=400, rank=8)
    later = schedule_of(longer(plain, 1_000))
    assert [later(step) for step in range(400)] == [schedule_of(plain)(step) for step in range(400)]
    late = 80 if "loro" in method else 0  # LORO's cosine ends that much later
    assert max(later(step) for step in range(400 + late, 1_000)) == pytest.approx(0.1)
