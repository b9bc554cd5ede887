"""A saved run is read on the text that it held out; text that it was trained on is refused or said."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorank.train.analysis import analyze_folder
from lorank.train.evaluation import evaluate_folder
from lorank.train.export import as_trained, export
from lorank.train.folder import read_run
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain
from lorank.train.text import recipe_of_run, text_of

pytestmark = pytest.mark.usefixtures("quick")
ROWS_AS_LINES = '{"body": "one more"}\n'
ROWS = [{"body": f"row {i} says {i * i} in {'abc'[i % 3]} and {i % 7}"} for i in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of rows, and another."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "data").mkdir()
    for name, rows in (("data/a", ROWS[:150]), ("data/b", ROWS[150:]), ("other", ROWS[:40])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, recipe: Callable[..., Recipe]) -> Path:
    """A run whose recipe differs from all defaults."""
    changes = {"data": str(folder / "data"), "text_column": "body", "documents": "padded", "seed": 7, "steps": 2}
    changes |= {"validation_tokens": 120}
    pretrain(recipe(**changes, warmup_steps=1, save_every=1, eval_every=0, sequence_length=24), folder / "run")
    return folder / "run"


def test_evaluate_repeats_the_figures_of_the_run(run: Path) -> None:
    summary, found = json.loads((run / "summary.json").read_text()), evaluate_folder(str(run))
    assert found.loss == summary["validation_loss_nats_per_token"]
    assert found.published_compatible_perplexity == summary["published_compatible_perplexity"]
    assert found.text == f"held-out part of {run.parent / 'data'}, as in the run's recipe, in sequences of 24 tokens"
    assert 120 <= found.tokens < 120 + 24
    last = evaluate_folder(str(run / "checkpoint-2"))
    assert (last.loss, last.tokens) == (found.loss, found.tokens)


def test_a_run_on_a_stream_resumes_where_it_was(
    folder: Path, recipe: Callable[..., Recipe], losses: Any, tmp_path: Path
) -> None:
    """Its later steps see the rows that they would have seen, and evaluation what was held out."""
    asked = recipe(data=str(folder / "data"), text_column="body", stream=True, steps=4, save_every=2, eval_every=0)
    summary = pretrain(asked, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("summary.json", "model.safetensors"):
        (tmp_path / "part" / name).unlink()
    shutil.rmtree(tmp_path / "part/checkpoint-4")
    resumed = pretrain(asked, tmp_path / "part", resume=True)
    assert summary is not None and resumed is not None and losses(tmp_path / "part") == losses(tmp_path / "whole")
    assert resumed.validation_loss_nats_per_token == summary.validation_loss_nats_per_token
    assert evaluate_folder(str(tmp_path / "whole")).loss == summary.validation_loss_nats_per_token


def test_an_export_is_read_on_the_text_of_its_run(run: Path, tmp_path: Path) -> None:
    """Also when it was exported again, and it is no run that could be resumed."""
    for model, name in ((run, "once"), (tmp_path / "once", "twice")):
        export(str(model), tmp_path / name, as_trained)
    found, own = evaluate_folder(str(tmp_path / "twice")), evaluate_folder(str(run))
    assert (found.loss, found.tokens, found.text) == (own.loss, own.tokens, own.text)
    with pytest.raises(ValueError, match=r"--seed must be 7, .* got 8: .*trained"):
        text_of(str(tmp_path / "twice"), seed=8)
    with pytest.raises(ValueError, match="contains no run to resume"):
        read_run(tmp_path / "twice")
    (tmp_path / "twice/trained_on.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"trained_on.json must say what the model was trained on"):
        text_of(str(tmp_path / "twice"))
    (tmp_path / "twice/trained_on.json").unlink()
    assert str(text_of(str(tmp_path / "twice"))) == "part of embedded", "nothing says that this is held out"


@pytest.mark.parametrize("stream", [False, True])
def test_text_that_has_changed_is_refused(
    folder: Path, recipe: Callable[..., Recipe], tmp_path: Path, stream: bool
) -> None:
    """It would hold out what the run was trained on. A run that began before the hash was written goes on as it was."""
    shutil.copytree(folder / "data", tmp_path / "data")
    changes = {"data": str(tmp_path / "data"), "text_column": "body", "steps": 1, "warmup_steps": 0, "eval_every": 0}
    pretrain(recipe(**changes, stream=stream), tmp_path / "run")
    export(str(tmp_path / "run"), tmp_path / "export", as_trained)
    before = evaluate_folder(str(tmp_path / "export")).loss
    assert before == evaluate_folder(str(tmp_path / "run"), sequence_length=None).loss
    for name in ("a", "b"):
        with (tmp_path / f"data/{name}.jsonl").open("r+") as file:
            rows = file.readlines()
            file.seek(0)
            file.writelines([*(json.dumps({"body": f"new {i}"}) + "\n" for i in range(20)), *rows])
    for model in ("run", "export"):
        with pytest.raises(ValueError, match=r"data=.* must be the text .* has changed since, .*trained on"):
            evaluate_folder(str(tmp_path / model))
    about = json.loads((tmp_path / "run/run.json").read_text())
    del about["held_out_hash"]
    (tmp_path / "run/run.json").write_text(json.dumps(about))
    assert evaluate_folder(str(tmp_path / "run")).tokens


def test_a_run_that_starts_from_another_holds_out_the_same(run: Path, tmp_path: Path) -> None:
    """With another split it holds out what that one was trained on, which is said."""
    changes: dict[str, Any] = {
        "data": str(run.parent / "data"),
        "text_column": "body",
        "validation_tokens": 120,
        "seed": 3,
    }
    changes |= {"steps": 2, "warmup_steps": 1, "eval_every": 0, "sequence_length": 24, "batch_size": 4}
    asked = Recipe(start_from=str(run), save_every=1, **changes)
    pretrain(asked, tmp_path / "tuned")
    found, own = text_of(str(tmp_path / "tuned")), text_of(str(run))
    assert (found.seed, found.held_out_hash, found.trained_on) == (7, own.held_out_hash, 0) and own.held_out_hash
    for name in ("summary.json", "model.safetensors"):
        (tmp_path / "tuned" / name).unlink()
    shutil.rmtree(tmp_path / "tuned/checkpoint-2")
    assert pretrain(asked, tmp_path / "tuned", resume=True), "it goes on with the split with which it began"
    pretrain(dataclasses.replace(asked, data_seed=3, save_every=0), tmp_path / "other")
    pretrain(dataclasses.replace(asked, start_from=str(tmp_path / "other"), save_every=0), tmp_path / "third")
    for name in ("other", "third"):
        said = evaluate_folder(str(tmp_path / name)).text
        assert said and "one that it started from, was trained on most of 2 of its files" in said
    apart = text_of(str(tmp_path / "other"), data=str(run.parent / "other.jsonl"))
    assert (apart.trained_on, text_of(str(run)).trained_on) == (0, 0)


def test_analyze_reads_the_same_text(run: Path, tmp_path: Path) -> None:
    found = analyze_folder(str(run), tmp_path / "analysis", gradient_batches=0)
    assert found["text"] == evaluate_folder(str(run)).text and found["sequence_length"] == 24
    assert found["data"] == str(run.parent / "data")


def test_what_is_asked_for_replaces_the_recipe(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = text_of(str(run))
    assert (own.seed, own.documents, own.text_column, own.batch_size, own.held_out) == (7, "padded", "body", 4, True)
    assert text_of(str(run), sequence_length=8, seed=None) == dataclasses.replace(own, sequence_length=8)
    monkeypatch.chdir(run.parent)
    assert text_of("run", data="data") == dataclasses.replace(own, run="run")  # the same text under another name
    other = text_of("run", data="other.jsonl", seed=3)
    assert (other.held_out, other.seed, other.run, other.trained_on) == (False, 3, None, 0)
    assert text_of("nowhere").data == "embedded" and recipe_of_run("nowhere/checkpoint-1") is None


def test_text_that_was_trained_on_is_refused_or_said(run: Path) -> None:
    with pytest.raises(ValueError, match=r"--seed must be 7, .* got 8: .*trained"):
        text_of(str(run), seed=8)
    part = text_of(str(run), data=str(run.parent / "data/b.jsonl"))
    assert part.trained_on == 1 and "trained on most of 1 of its files" in str(part)
    assert text_of(str(run), data=str(run.parent / "*.jsonl")).trained_on == 0


def test_a_copy_of_text_that_was_trained_on_is_said(run: Path, tmp_path: Path) -> None:
    """By what it contains, under any name: next to the run's text, and where only the run or its export remains."""
    trained, copy = run.parent / "data/a.jsonl", tmp_path / "copies/renamed.jsonl"
    copy.parent.mkdir()
    shutil.copy(trained, copy)
    (copy.parent / "longer.jsonl").write_text(trained.read_text() + ROWS_AS_LINES)
    (copy.parent / "empty.jsonl").write_text("")
    assert text_of(str(run), data=str(copy.parent)).trained_on == 1
    export(str(run), tmp_path / "export", as_trained)
    for model in (run, tmp_path / "export"):
        shutil.copytree(model, moved := tmp_path / f"moved {model.name}")
        for name in ("recipe.yaml", "trained_on.json"):
            if (moved / name).exists():  # as if on another machine
                told = (moved / name).read_text()
                (moved / name).write_text(told.replace(str(run.parent), "/elsewhere"))
        assert "trained on most of 1 of its files" in str(text_of(str(moved), data=str(copy.parent)))
    about = json.loads((moved := tmp_path / "moved run/run.json").read_text())
    assert len(about.pop("files")) == 2
    moved.write_text(json.dumps(about))
    assert text_of(str(moved.parent), data=str(copy)).trained_on == 0, "a run of an earlier lorank, without its text"


@pytest.mark.parametrize(
    ("recipe_says", "data", "held_out"),
    [({"validation": "v.txt"}, "v.txt", False), ({"validation": "t.txt"}, "t.txt", True), ({}, "t.txt", True)],
)
def test_validation_text_of_its_own_is_read_whole(
    tmp_path: Path, recipe_says: dict[str, Any], data: str, held_out: bool
) -> None:
    (tmp_path / "recipe.yaml").write_text(Recipe(data="t.txt", data_seed=5, **recipe_says).to_yaml())
    found = text_of(str(tmp_path))
    assert (found.data, found.held_out, found.seed) == (data, held_out, 5)
    if not held_out:
        assert text_of(str(tmp_path), seed=6).seed == 6, "the seed holds out nothing of this text"
    assert text_of(str(tmp_path), data="t.txt").held_out is held_out, "else all of it was trained on"
