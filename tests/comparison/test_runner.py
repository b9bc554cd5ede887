"""A comparison keeps what is finished, whoever stops or kills it, and all its runs see the same text."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lorank.comparison import runner as module
from lorank.comparison.matching import Costs
from lorank.comparison.process import PretrainProcess
from lorank.comparison.rows import Candidate, Row, plan_rows
from lorank.comparison.runner import Comparison, Run, with_budget
from lorank.comparison.settings import ComparisonSettings
from lorank.train import data
from lorank.train.budget import Budget
from lorank.train.folder import LOCK, history
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain

pytestmark = pytest.mark.usefixtures("forked_processes")


@pytest.mark.parametrize("written", ["", "[]", '{"steps": 6}'])
def test_a_damaged_summary_is_named(written: str, base: Recipe, tmp_path: Path) -> None:
    row = Row("cola", "cola", "method", "", [candidate := Candidate({"lr": 1e-2}, base, 1.0, None)])
    comparison = Comparison(tmp_path, ComparisonSettings(base=base, methods=["cola"]), [row], {})
    folder = comparison.folder(run := Run(row, candidate, seed=1))
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(written)
    with pytest.raises(ValueError, match=r"summary\.json (cannot be read|must hold names|is damaged)"):
        comparison.summary(run)


def test_equal_flops_are_planned(finished) -> None:
    candidates = [candidate for one in finished.comparison.rows for candidate in one.candidates]
    first = candidates[0].flops
    assert all(abs(one.flops - first) * one.recipe.steps / one.flops <= 1 for one in candidates), "to a step"


def test_further_seeds_come_last_and_only_for_the_best(finished) -> None:
    names = [title.split()[0] for title in finished.watchers[0].started]
    assert names == [
        *["cola"] * 4,  # the sweep is extended twice
        *("dense", "dense-muon", "dense-small", "dense-small-muon"),
        *("cola", "dense", "dense-small", "dense-small-muon"),  # the second seed of those that have not failed
    ]
    assert "failed: the loss became nan" in finished.watchers[0].outcomes[5]


def test_a_folder_of_lorank_0_2_is_continued(finished, tmp_path: Path) -> None:
    plan = json.loads((finished.comparison.out / "comparison.json").read_text())
    (tmp_path / "comparison.json").write_text(json.dumps({**plan, "contestants": plan.pop("rows")}))
    assert Comparison.open(tmp_path).rows == Comparison.open(finished.comparison.out).rows


def test_the_same_command_again_runs_only_what_failed(finished, watcher) -> None:
    assert finished.watchers[1].started == ["dense-muon lr=0.01 seed 1", "dense-muon lr=0.01 seed 2"]
    assert finished.untouched
    Comparison.open(finished.comparison.out).run(watcher, after_each=lambda comparison: None)
    assert watcher.started == []


def test_a_budget_is_spent_by_all_on_the_first_rows_terms(base: Recipe, costs: Costs) -> None:
    asked = ComparisonSettings(base=base, methods=["cola", "dense"])
    dense = dataclasses.replace(base, method="dense", rank=None)
    small, large = costs.of("parameters", base), costs.of("parameters", dense)
    for methods, parameters in ((["cola", "dense"], small), (["dense", "cola"], large)):
        one = with_budget(dataclasses.replace(asked, methods=methods), Budget(tokens_per_parameter=0.1))
        assert one.base.steps == math.ceil(0.1 * parameters / (4 * 32))
    assert with_budget(asked, Budget(tokens=1_000)).base == dataclasses.replace(base, steps=8)


def test_a_fraction_of_warm_up_is_the_steps_that_it_means(base: Recipe, tmp_path: Path, watcher) -> None:
    """The same command as before the default was a fraction continues its comparison."""
    asked = ComparisonSettings(base=base, methods=["cola"], only=True)
    share = dataclasses.replace(asked, base=dataclasses.replace(base, warmup_steps=1 / 3))
    Comparison.plan(asked, tmp_path, watcher)
    assert Comparison.plan(share, tmp_path, watcher).settings.base.warmup_steps == 2
    with pytest.raises(ValueError, match="warmup_steps was 2, is 0.1"):
        Comparison.plan(dataclasses.replace(asked, base=dataclasses.replace(base, warmup_steps=0.1)), tmp_path, watcher)


def test_a_seed_changes_the_order_but_not_the_text(
    base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.Tensor]] = []
    collate = data.collate

    def remember(rows: Any, **settings: Any) -> Any:
        batch = collate(rows, **settings)
        seen[-1].append(batch["input_ids"])
        return batch

    monkeypatch.setattr(data, "collate", remember)
    for seed in (1, 2):
        seen.append([])
        changes = {"method": "dense", "rank": None, "seed": seed, "data_seed": 1, "eval_every": 0, "save_every": 0}
        recipe = dataclasses.replace(base, **changes)
        pretrain(recipe, tmp_path / str(seed))
    first, second = ([row.tolist() for batch in one for row in batch] for one in seen)
    train = base.steps * base.batch_size
    held_out = data.load_corpus(base.data, vocab_size=300, sequence_length=32, seed=1).validation["input_ids"]
    assert first[:train] != second[:train]
    assert first[-len(held_out) :] == second[-len(held_out) :] == [list(row) for row in held_out]


def test_all_methods_see_the_same_tokens_in_the_same_order(
    base: Recipe, costs: Costs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    collate = data.collate
    settings = ComparisonSettings(
        base=dataclasses.replace(base, steps=8, eval_every=0, save_every=0), methods=["cola", "dense"], match="flops"
    )  # dense rows take fewer steps; fewest with Muon, whose products cost much for so few tokens
    for one in plan_rows(settings, costs, tmp_path / "models")[0]:
        batches: list[torch.Tensor] = []

        def remember(rows: Any, batches: list[torch.Tensor] = batches, **settings: Any) -> Any:
            batch = collate(rows, **settings)
            batches.append(batch["input_ids"])
            return batch

        monkeypatch.setattr(data, "collate", remember)
        recipe = one.candidates[0].recipe
        pretrain(recipe, tmp_path / one.name)
        seen[one.name] = batches[: recipe.steps]
    shortest = min(map(len, seen.values()))
    assert shortest >= 3 and len(seen) == 5
    for batches in seen.values():
        assert all(torch.equal(a, b) for a, b in zip(batches[:shortest], seen["cola"], strict=False))


def test_stopped_then_killed_and_nothing_is_lost(
    base: Recipe, watcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process
) -> None:
    """SIGTERM: the run in progress saves and stops. SIGKILL: it goes on alone and is found again. In real processes."""
    long = dataclasses.replace(base, steps=60, warmup_steps=4, eval_every=0, save_every=20)
    comparison = Comparison.plan(ComparisonSettings(base=long, methods=["dense"]), tmp_path / "out", watcher)
    first, second = comparison.runs()
    folder, records = comparison.folder(first), []

    def impatient(found: Any) -> None:
        records.append(dict(found))
        if found.get("step", 0) >= 10:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(watcher, "update", impatient)
    with pytest.raises(KeyboardInterrupt):
        comparison.run(watcher, after_each=lambda comparison: None)
    assert list(folder.glob("checkpoint-*")) and comparison.summary(first) is None
    assert records[-1]["tokens_per_second"] > 0 and PretrainProcess.find(folder) is None

    child = PretrainProcess.start(first.recipe, folder)  # started by a comparison that was killed
    started: list[Path] = []
    start = PretrainProcess.start

    def counted(recipe: Recipe, folder: Path) -> PretrainProcess:
        started.append(folder)
        return start(recipe, folder)

    monkeypatch.setattr(module.PretrainProcess, "start", counted)
    code, out, err = in_this_process("compare", "--resume", comparison.out)
    child.process.poll()  # it is a child of this process
    assert code == 0, out + err
    assert started == [comparison.folder(second)]  # the first was left to the process that had it already
    assert "[1/2] dense seed 42 validation perplexity" in " ".join(out.split())
    for run in (first, second):
        assert [one["step"] for one in history(comparison.folder(run)) if "lr" in one] == list(range(1, 61))


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_plan_that_is_ended_leaves_nothing_behind(
    base: Recipe, flags: list[str], watcher, tmp_path: Path, end: int
) -> None:
    """While it measures how fast a row is: no folder that is refused, no process that continues."""
    long, out = dataclasses.replace(base, batch_size=64, sequence_length=64), tmp_path / "out"
    more = ["--batch-size", "64", "--sequence-length", "64", "--match", "time", "--out", str(out)]
    command = [sys.executable, "-m", "lorank", "compare", "--method", "dense", *flags, *more]
    planner = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=-1)
    probe = None
    while probe is None:
        assert planner.poll() is None, planner.stderr.read()
        probe = PretrainProcess.find(out / "probes/dense")
        time.sleep(0.05)
    with pytest.raises(ValueError, match="is in use by another process"):
        Comparison.plan(ComparisonSettings(base=long, methods=["dense"]), out, watcher)
    planner.send_signal(end)
    assert planner.wait() == (130 if end == signal.SIGTERM else -end)
    planner.stderr.close()
    if end == signal.SIGTERM:
        assert not out.exists()
    else:
        Comparison.plan(ComparisonSettings(base=long, methods=["dense"]), out, watcher)
        assert sorted(path.name for path in out.iterdir()) == [LOCK, "comparison.json"]
    assert not probe.process.is_running() or probe.process.status() == psutil.STATUS_ZOMBIE


def test_a_folder_with_other_models_is_refused(base: Recipe, watcher, tmp_path: Path) -> None:
    (tmp_path / "out/models").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not an empty folder"):
        Comparison.plan(ComparisonSettings(base=base, methods=["dense"]), tmp_path / "out", watcher)
    assert (tmp_path / "out/models").exists()
