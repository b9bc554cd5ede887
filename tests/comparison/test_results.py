"""Results are fair, complete, and say what went wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lorank.comparison.results import _baseline_rank, _clock, _mismatches, compute_to_reach, write_results
from lorank.comparison.runner import Comparison
from lorank.comparison.settings import ComparisonSettings
from lorank.report.comparison import comparison_page, comparison_table
from lorank.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("forked_processes")


@pytest.fixture
def rows(finished) -> list[dict[str, Any]]:
    return finished.results["rows"]


def test_results_are_whole_and_kept_as_json(finished, rows: list[dict[str, Any]]) -> None:
    results, out = finished.results, finished.comparison.out
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["format"] == 2 and results["failures"] == {}
    assert results["finished_runs"] == results["planned_runs"] == 13
    assert [row["name"] for row in rows] == ["cola", "dense", "dense-muon", "dense-small", "dense-small-muon"]
    assert [row["kind"] for row in rows] == ["method", "dense", "dense", "control", "control"]
    for row in rows:
        assert row["loss"]["low"] < row["loss"]["mean"] < row["loss"]["high"] and row["loss"]["number"] == 2
        assert [run["seed"] for run in row["runs"]] == [1, 2]
        assert results["match"]["ratios"][row["name"]] == pytest.approx(1, abs=0.25)  # six steps are coarse
        assert set(row["spectra"]) >= {"q_proj", "down_proj"} and row["sample"]


def test_curves_are_in_order_and_end_with_the_run(finished, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for run in row["runs"]:
            assert (finished.comparison.out / run["folder"] / "model.safetensors").exists()
            for curve in (run["curve"], run["training"]):
                assert len({len(values) for values in curve.values()}) == 1
                assert curve["tokens"] == sorted(curve["tokens"])
                assert curve["seconds"][0] > 0 and curve["seconds"] == sorted(set(curve["seconds"]))
            assert run["curve"]["flops"][-1] == pytest.approx(row["training_flops"])


def test_the_baseline_reaches_its_loss_at_its_last_evaluation(finished, rows: list[dict[str, Any]]) -> None:
    """Evaluations in training stop after 60 tokens, so their losses are not those of the whole text."""
    base = next(row for row in rows if row["name"] == finished.results["baseline"])
    curves = [run["curve"] for run in base["runs"]]
    assert all(curve["loss"][-1] != run["loss"] for curve, run in zip(curves, base["runs"], strict=True))
    assert base["reach"]["flops"] <= base["training_flops"] * (1 + 1e-12)


def test_all_seeds_share_text_and_tokenizer(finished, rows: list[dict[str, Any]]) -> None:
    hashes, texts, words = set(), set(), set()
    for run in [run for row in rows for run in row["runs"]]:
        folder = finished.comparison.out / run["folder"]
        hashes.add(run["data_hash"])
        texts.add(json.loads((folder / "run.json").read_text())["recipe"]["data_seed"])
        words.add((folder / "tokenizer.json").read_bytes())
    assert len(hashes) == len(words) == 1 and texts == {1}


def test_the_best_candidate_is_the_one_shown(rows: list[dict[str, Any]]) -> None:
    cola = rows[0]
    losses = {tried["settings"]["lr"]: tried["loss"] for tried in cola["tried"]}
    assert cola["settings"]["lr"] == min(losses, key=lambda lr: losses[lr])
    assert cola["extended"] == len(losses) - 2 > 0  # lr 1e-2 was better than 1e-3
    assert all(rank <= 0.26 for rank in (one["effective_rank"] for one in cola["spectra"].values()))  # 8 of 32


def test_differences_are_paired_by_seed(finished, rows: list[dict[str, Any]]) -> None:
    cola, dense = rows[:2]
    gaps = [ours["loss"] - theirs["loss"] for ours, theirs in zip(cola["runs"], dense["runs"], strict=True)]
    assert cola["difference"]["mean"] == pytest.approx(sum(gaps) / 2) and finished.results["baseline"] == "dense"
    half = cola["difference"]["high"] - cola["difference"]["mean"]
    assert half == pytest.approx(12.7062 * abs(gaps[0] - gaps[1]) / 2, rel=1e-4)


def test_what_failed_has_its_row_and_a_note(finished) -> None:
    muon = next(row for row in finished.failed["rows"] if row["name"] == "dense-muon")
    assert muon["loss"] is None and muon["tried"][0]["status"] == "failed"
    assert any("dense-muon" in note and "became nan" in note for note in finished.failed["notes"])
    assert "failed" in comparison_page(finished.failed)


def test_a_note_says_what_is_not_equal() -> None:
    rows = [
        {"name": name, "kind": kind} for name, kind in (("cola", "method"), ("d", "dense"), ("dense-small", "control"))
    ]
    match = {"by": "time", "figure": "seconds", "ratios": {"cola": 1.0, "d": 1.02, "dense-small": 1.44}}
    probed, told = _mismatches({"match": match, "rows": rows})
    assert (
        "speed of 12 steps" in probed
        and told == "dense-small is not matched: its seconds came out as 1.44 times those of cola."
    )
    match = {"by": "params", "figure": "parameters", "ratios": {"cola": 1.0, "d": 0.78, "dense-small": 0.9}}
    [told] = _mismatches({"match": match, "rows": rows})
    assert told.startswith("d is not matched: its parameters came out as 0.78 times")


def test_seconds_between_log_lines_include_slow_steps() -> None:
    """400 steps of one token in 0.1 s, logged every 100, and 60 s for a basis in one of the first and third hundred."""
    rates = {100: 100 / 70, 200: 10.0, 300: 100 / 70}
    records = [{"tokens": n, **({"tokens_per_second": rates[n]} if n in rates else {})} for n in range(50, 401, 50)]
    clock = _clock(records, 400, 10.0)
    assert [clock(n) for n in range(0, 401, 50)] == pytest.approx([0, 35, 70, 75, 80, 115, 150, 155, 160])
    assert _clock(records[:1], 400, None)(400) == 0 and _clock([], 400, 10.0)(200) == pytest.approx(20)


def test_what_was_not_timed_is_not_shown(base: Recipe, quick, watcher, tmp_path: Path) -> None:
    """The first step is not, and here is no other."""
    one = dataclasses.replace(base, steps=1, warmup_steps=0, eval_every=0, save_every=0)
    comparison = Comparison.plan(ComparisonSettings(base=one, methods=["dense"]), tmp_path / "out", watcher)
    comparison.run(watcher, after_each=lambda comparison: None)
    results = write_results(comparison, whole=False)
    assert all(row["loss"] and row["tokens_per_second"] is row["seconds"] is None for row in results["rows"])
    speeds = next(column for column in comparison_table(results).columns if "tokens" in str(column.header))
    assert list(speeds.cells) == ["-", "-"]
    page = comparison_page(results)
    assert "tokens/s" not in page and "time of training" not in page


def test_the_baseline_is_the_first_dense_row_with_a_result() -> None:
    rows = [{"name": name, "kind": kind, "loss": {}} for name, kind in
            (("cola", "method"), ("dense-muon", "dense"), ("dense", "dense"), ("dense-small", "control"))]  # fmt: skip
    assert min(rows, key=_baseline_rank)["name"] == "dense"
    for failed, then in ((2, "dense-muon"), (1, "dense-small"), (3, "cola")):
        rows[failed]["loss"] = None  # type: ignore[assignment]
        assert min(rows, key=_baseline_rank)["name"] == then


def test_reach_is_where_the_curve_first_has_the_baselines_loss() -> None:
    def run(losses: list[float], seed: int = 1) -> dict[str, Any]:
        tokens = [10.0, 20.0, 40.0]
        return {
            "seed": seed,
            "curve": {"tokens": tokens, "flops": [3 * x for x in tokens], "seconds": tokens, "loss": losses},
        }

    assert compute_to_reach({"runs": [run([4.0, 3.0, 2.0])]}, {1: 2.5}) == {
        "tokens": 30.0,
        "flops": 90.0,
        "seconds": 30.0,
    }
    several = {"runs": [run([4.0, 3.0, 2.0]), run([2.5, 3.0, 2.0], seed=2)]}
    assert compute_to_reach(several, {1: 2.5, 2: 2.5}) == {"tokens": 20.0, "flops": 60.0, "seconds": 20.0}
    assert compute_to_reach(several, {1: 3.0, 2: 2.5}) == {"tokens": 15.0, "flops": 45.0, "seconds": 15.0}
    assert compute_to_reach(several, {2: 2.5}) == {"tokens": 10.0, "flops": 30.0, "seconds": 10.0}
    assert compute_to_reach(several, {1: 2.5, 2: 1.9}) is None
    assert compute_to_reach({"runs": [{"status": "failed", "seed": 1}]}, {1: 2.5}) is None


def test_the_winner_is_compared_with_the_next_by_seed(finished) -> None:
    first, second = sorted(finished.results["rows"], key=lambda row: row["loss"]["mean"])[:2]
    found = finished.results["winner"]
    assert (found["name"], found["next"]) == (first["name"], second["name"])
    gaps = [ours["loss"] - theirs["loss"] for ours, theirs in zip(first["runs"], second["runs"], strict=True)]
    assert found["difference"]["mean"] == pytest.approx(sum(gaps) / 2) and found["difference"]["number"] == 2
