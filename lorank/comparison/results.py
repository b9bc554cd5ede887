"""What came out of a comparison, as one dictionary (results.json)."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lorank
from lorank.comparison.rows import Candidate, Row
from lorank.comparison.runner import PROBE_STEPS, Comparison, Run
from lorank.comparison.settings import STRUCTURAL
from lorank.comparison.spectra import learned_spectra
from lorank.comparison.statistics import LEVEL, mean_interval
from lorank.train.data.sources import first_line
from lorank.train.folder import history, read_json, write_whole
from lorank.train.tasks import run_tasks
from lorank.train.text import limits_of

CLOSE_ENOUGH = 0.03
"""How far from 1 the ratio of what was matched may be without a note."""
FORMAT = 2
"""Of results.json; raised when a key changes its name or meaning."""


def gather(comparison: Comparison) -> dict[str, Any]:
    """All results so far. Losses in nats per token, times in seconds of training without evaluations."""
    seeds = comparison.settings.seeds
    failures = comparison.failures()
    rows = [_row(comparison, row, failures) for row in comparison.rows]
    baseline = min(rows, key=_baseline_rank)
    targets = {run["seed"]: run["curve"]["loss"][-1] for run in baseline["runs"] if run.get("curve", {}).get("loss")}
    for row in rows:
        row["difference"] = _difference(row, baseline)
        row["reach"] = compute_to_reach(row, targets)
    finished = sum(run["status"] == "finished" for row in rows for run in _all_runs(row))
    results = {
        "format": FORMAT,
        "lorank": lorank.__version__,
        "settings": comparison.settings.to_dict(),
        "corpus": comparison.facts["corpus"],
        "seeds": list(seeds),
        "confidence": LEVEL,
        "baseline": baseline["name"],
        "winner": _winner(rows),
        "finished_runs": finished,
        "planned_runs": comparison.count(),
        "failures": failures,
        "match": _match(comparison, rows),
        "rows": rows,
        "environment": _environment(comparison),
    }
    results["notes"] = _notes(comparison, results)
    return results


def _baseline_rank(row: Mapping[str, Any]) -> tuple[bool, int]:
    """The full dense model, else another dense row, else dense-small; rows with a result come first."""
    return row["loss"] is None, 0 if row["name"] == "dense" else {"dense": 1, "control": 2}.get(row["kind"], 3)


def _row(comparison: Comparison, row: Row, failures: Mapping[str, str]) -> dict[str, Any]:
    first, best = comparison.settings.seeds[0], comparison.best(row)
    tried = []
    for candidate in comparison.candidates(row):
        run = Run(row, candidate, first)
        summary = comparison.summary(run)
        tried.append(
            {
                "settings": candidate.settings,
                "status": _status(comparison, run, failures),
                "loss": summary["validation_loss_nats_per_token"] if summary else None,
            }
        )
    seeds = comparison.settings.seeds if best else [first]
    runs = [_run(comparison, Run(row, best or row.candidates[0], seed), failures) for seed in seeds]
    done = [run for run in runs if run["status"] == "finished"]
    shown: dict[str, Any] = {
        "name": row.name,
        "method": row.method,
        "kind": row.kind,
        "chosen": row.chosen,
        "like": row.like,
        "rate": row.rate,
        "lr": (best or row.candidates[0]).recipe.lr,
        "settings": best.settings if best else None,
        "edge": _edges(comparison.candidates(row), best),
        "extended": len(tried) - len(row.candidates),
        "tried": tried,
        "runs": runs,
        "loss": None,
        "perplexity": None,
    }
    if best and done:
        loss = mean_interval([run["loss"] for run in done])
        shown["loss"] = _numbers(loss._asdict())
        shown["perplexity"] = _numbers(
            {"mean": math.exp(loss.mean), "low": math.exp(loss.low), "high": math.exp(loss.high)}
        )
        shown["training_flops"] = best.flops
        shown["memory_estimate_bytes"] = _number(best.memory_bytes)
        for name in ("tokens", "seconds", "parameters", "block_parameters", "tokens_per_second", "peak_memory_gib"):
            known = [run[name] for run in done if run[name] is not None]
            shown[name] = statistics.fmean(known) if known else None
        shown["flops_per_token"] = best.flops / shown["tokens"]
        shown["sample"] = done[0]["sample"]
    return shown


def _run(comparison: Comparison, run: Run, failures: Mapping[str, str]) -> dict[str, Any]:
    folder, summary = comparison.folder(run), comparison.summary(run)
    found: dict[str, Any] = {
        "seed": run.seed,
        "folder": str(folder.relative_to(comparison.out)),
        "status": _status(comparison, run, failures),
    }
    if summary is not None:
        found["loss"] = summary.pop("validation_loss_nats_per_token")
        found |= {name: _number(value) for name, value in summary.items()}
        rate = found["tokens_per_second"]
        found["seconds"] = found["tokens"] / rate if rate else None
        records = list(history(folder))
        clock = _clock(records, found["tokens"], rate)
        found["curve"], found["training"] = _curves(records, run.candidate, clock)
        if found["curve"]["step"][-1:] != [found["steps"]] and _of_whole_text(records, run.candidate):
            end = {"step": found["steps"], "tokens": found["tokens"], "loss": found["loss"]}
            end |= {"flops": run.candidate.flops, "seconds": clock(found["tokens"])}
            for name, value in end.items():
                found["curve"][name].append(value)
        about = read_json(folder / "run.json", data_hash=str)
        found["data_hash"], found["environment"] = about["data_hash"], about
    return found


def _status(comparison: Comparison, run: Run, failures: Mapping[str, str]) -> str:
    if comparison.summary(run) is not None:
        return "finished"
    if run.key in failures:
        return "failed"
    return "unfinished" if (comparison.folder(run) / "recipe.yaml").exists() else "not started"


def _clock(records: Sequence[Mapping[str, Any]], tokens: int, rate: float | None) -> Callable[[float], float]:
    """Seconds of training, slow steps included, as a function of tokens seen: at the rate of the log line that covers them,
    after the last line at the typical `rate`."""
    marks = [(0.0, 0.0)]
    for seen, speed in [(one["tokens"], one.get("tokens_per_second")) for one in records] + [(tokens, rate)]:
        if speed and seen > marks[-1][0]:
            marks.append((seen, marks[-1][1] + (seen - marks[-1][0]) / speed))
    at, seconds = zip(*marks, strict=True)
    return lambda seen: float(np.interp(seen, at, seconds))


def _curves(
    records: Sequence[Mapping[str, Any]], candidate: Candidate, clock: Callable[[float], float]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(validation, training) loss against steps, tokens, FLOPs and seconds of training."""
    found: list[dict[str, list[float]]] = [
        {name: [] for name in ("step", "tokens", "flops", "seconds", "loss")} for _ in range(2)
    ]
    for record in records:
        curve = found[0] if "eval_perplexity" in record else found[1]
        loss = record.get("eval_loss_nats_per_token", record.get("loss_nats_per_token"))
        if loss is not None and math.isfinite(loss):
            flops = candidate.flops * record["step"] / candidate.recipe.steps
            values = (record["step"], record["tokens"], flops, clock(record["tokens"]), loss)
            for name, value in zip(curve, values, strict=True):
                curve[name].append(value)
    return found[0], found[1]


def _of_whole_text(records: Sequence[Mapping[str, Any]], candidate: Candidate) -> bool:
    """Whether evaluations in training are on the same text as the final one. On less text the loss is another."""
    limit, last = limits_of(candidate.recipe)
    return limit == last or all(record["eval_tokens"] < limit for record in records if "eval_perplexity" in record)


def _edges(candidates: Sequence[Candidate], best: Candidate | None) -> list[str]:
    """Swept numbers whose best value is the smallest or largest one tried: a better one may lie beyond."""
    edges = []
    for name in best.settings if best else ():
        values = {candidate.settings[name] for candidate in candidates}
        if len(values) > 1 and all(isinstance(value, int | float) for value in values):
            edges += [name] if best and best.settings[name] in (min(values), max(values)) else []
    return edges


def _difference(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any] | None:
    """Loss minus the baseline's, paired by seed, because a seed fixes the order of the data for all rows."""
    ours, theirs = ({run["seed"]: run["loss"] for run in one["runs"] if "loss" in run} for one in (row, baseline))
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return _numbers(mean_interval(pairs)._asdict()) if pairs and row is not baseline else None


def _winner(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The row with the lowest mean loss, the next one, and their difference paired by seed."""
    done = sorted((row for row in rows if row["loss"]), key=lambda row: row["loss"]["mean"])
    if len(done) < 2:
        return None
    return {"name": done[0]["name"], "next": done[1]["name"], "difference": _difference(done[0], done[1])}


def compute_to_reach(row: Mapping[str, Any], targets: Mapping[int, float]) -> dict[str, float] | None:
    """Tokens, FLOPs and seconds until a run has its seed's target for the first time, between two evaluations on a straight
    line; means over the seeds, None if one of them never gets there.

    Args:
        targets: seed -> the baseline's last loss in training, which like the curves may be on less text than the final one.
    """
    found: dict[str, list[float]] = {name: [] for name in ("tokens", "flops", "seconds")}
    for run in row["runs"]:
        if "curve" not in run or run["seed"] not in targets:
            continue
        losses, target = run["curve"]["loss"], targets[run["seed"]]
        last = next((place for place, loss in enumerate(losses) if loss <= target), None)
        if last is None:
            return None
        for name, values in found.items():
            x = run["curve"][name]
            if last == 0:
                values.append(x[0])
            else:
                part = (losses[last - 1] - target) / (losses[last - 1] - losses[last])
                values.append(x[last - 1] + part * (x[last] - x[last - 1]))
    return {name: statistics.fmean(values) for name, values in found.items()} if found["flops"] else None


def _match(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was made equal, and how equal it came out: each row's figure over the first one's."""
    by = comparison.settings.match
    figure = {
        "tokens": "tokens",
        "flops": "training_flops",
        "time": "seconds",
        "params": "parameters",
        "memory": "memory_estimate_bytes",
    }[by]
    first = rows[0].get(figure) or next((row[figure] for row in rows if row.get(figure)), None)
    ratios = {row["name"]: row[figure] / first for row in rows if first and row.get(figure)}
    return {"by": by, "figure": figure, "ratios": ratios}


def _notes(comparison: Comparison, results: Mapping[str, Any]) -> list[str]:
    """What a reader must know to judge the table."""
    notes, rows, seeds = [], results["rows"], results["seeds"]
    if results["finished_runs"] < results["planned_runs"]:
        notes.append(f"{results['finished_runs']} of {results['planned_runs']} runs are finished.")
    for key, reason in results["failures"].items():
        notes.append(f"{key} failed: {reason}.")
    if len(seeds) == 1:
        notes.append("One seed: there are no intervals, and small differences may be chance.")
    swept = sorted(
        {name for row in rows for tried in row["tried"] for name in tried["settings"] if len(row["tried"]) > 1}
    )
    if swept:
        notes.append(
            f"Each row uses the {', '.join(swept)} with the lowest validation loss of the first seed, so that seed's figure is "
            "slightly too good."
        )
    for name in swept:
        edge = [row["name"] for row in rows if name in row["edge"]]
        if edge:
            notes.append(
                f"The best {name} of {', '.join(edge)} is at the edge of the sweep; a better one may lie beyond."
            )
    for rate in dict.fromkeys(row["rate"] for row in rows):
        here = [f"{row['name']} {row['lr']:g}" for row in rows if row["rate"] == rate]
        if "not tuned" in rate:
            notes.append(f"Learning rate {rate}, so it may suit some rows better than others: {', '.join(here)}.")
    if len({run["data_hash"] for row in rows for run in row["runs"] if "data_hash" in run}) > 1:
        notes.append("The runs did not see the same data (their hashes differ), so this comparison is not valid.")
    for name, why in (comparison.facts.get("no_control") or {}).items():
        notes.append(f"There is no {name}: {why}.")
    extended = [row["name"] for row in rows if row["extended"]]
    if extended:
        notes.append(f"The sweep of {', '.join(extended)} was extended, because its best value was at an edge.")
    for row in rows:
        if row["kind"] == "control" and comparison.settings.match in STRUCTURAL:
            notes.append(f"{row['name']} has the {row['like']}; it is not matched by {comparison.settings.match}.")
    return notes + _mismatches(results)


def _mismatches(results: Mapping[str, Any]) -> list[str]:
    """What should be equal and did not come out so."""
    by, notes = results["match"]["by"], []
    if by == "time":
        notes.append(
            f"Times are matched by the speed of {PROBE_STEPS} steps before the runs. The ratios are those of the finished runs; on "
            "a machine that does other work they differ."
        )
    controls = [row["name"] for row in results["rows"] if row["kind"] == "control" and by in STRUCTURAL]
    for name, ratio in results["match"]["ratios"].items():
        if abs(ratio - 1) > CLOSE_ENOUGH and name not in controls:
            notes.append(
                f"{name} is not matched: its {results['match']['figure'].replace('_', ' ')} came out as {ratio:.3g} times those of "
                f"{results['rows'][0]['name']}."
            )
    return notes


def _environment(comparison: Comparison) -> dict[str, Any]:
    for run in comparison.runs():
        path = comparison.folder(run) / "run.json"
        if path.exists():
            return read_json(path)
    return {}


def _all_runs(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*row["tried"], *row["runs"][1:]]


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in values.items()}


def write_results(comparison: Comparison, *, whole: bool = True) -> dict[str, Any]:
    """All results so far, also written to results.json.

    Args:
        whole: also examine the saved models: singular values, and tasks if there are any. What was computed once is kept
            next to the model.
    """
    results = gather(comparison)
    for shown, row in zip(results["rows"], comparison.rows, strict=True):
        best = comparison.best(row)
        if whole and best is not None:
            folder = comparison.folder(Run(row, best, comparison.settings.seeds[0]))
            _examine(shown, folder, comparison.settings.tasks, results["notes"])
    write_whole(comparison.out / "results.json", json.dumps(results, indent=1, allow_nan=False))
    return results


def _examine(row: dict[str, Any], folder: Path, tasks: Sequence[str], notes: list[str]) -> None:
    """Add what the saved model shows; an error here is a note and does not cost the rest of the results."""
    try:
        row["spectra"] = learned_spectra(folder)
    except Exception as error:
        notes.append(f"The singular values of {row['name']} could not be computed: {first_line(error)}.")
    if tasks:
        kept = folder / "tasks.json"
        try:
            if not kept.exists():
                write_whole(kept, json.dumps(run_tasks(folder, tasks)))
            row["tasks"] = json.loads(kept.read_text())
        except Exception as error:
            notes.append(f"The tasks of {row['name']} failed: {first_line(error)}.")
