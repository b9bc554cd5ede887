"""Which family of models wins, dense or low rank, and with which optimizer? Trains what is missing of the study.

    python benchmarks/study/run.py tiny embedded core --texts FOLDER [--out runs/study]

Sizes, texts and stages are in grid.py. Every finished run is a line of results/SIZE-TEXT.jsonl: started again, here or in
another checkout, the study goes on where it was. Ctrl-C stops it; the run in progress continues the next time if OUT is kept.
report.py makes the page. One run of the smallest size takes about five minutes on one thread (OMP_NUM_THREADS=1).
"""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

from grid import SIZES, STAGES, TEXTS, settings_of
from rich.console import Console

from lorank.comparison.runner import Comparison, Run
from lorank.report.progress import ComparisonProgress
from lorank.train.folder import history, write_whole

RESULTS = Path(__file__).parent / "results"
KEPT = ("parameters", "block_parameters", "flops_per_token", "steps", "tokens", "validation_loss_nats_per_token")


def lines_of(path: Path) -> dict[str, dict[str, Any]]:
    """Key of a run -> what is known of it."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["run"]: line for line in map(json.loads, lines)}


def restore(comparison: Comparison, path: Path) -> None:
    """Let the comparison find the runs that are in the results as finished ones."""
    for key, line in lines_of(path).items():
        folder = comparison.out / "runs" / key
        if not (folder / "summary.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "summary.json", json.dumps({name: line[name] for name in KEPT}))


def collect(comparison: Comparison, path: Path) -> None:
    """Add to the results what has finished, and remove its weights."""
    here = [run for run in comparison.runs() if (comparison.folder(run) / "metrics.jsonl").exists()]
    done = [run for run in here if comparison.summary(run) is not None]
    found = {**lines_of(path), **{run.key: line_of(comparison, run) for run in done}}
    write_whole(path, "".join(json.dumps(found[key]) + "\n" for key in sorted(found)))
    for run in done:
        for kept in comparison.folder(run).glob("*.safetensors"):
            kept.unlink()


def line_of(comparison: Comparison, run: Run) -> dict[str, Any]:
    """A finished run: what it is, its totals, and validation loss (nats a token) by step."""
    folder, about = comparison.folder(run), json.loads((comparison.folder(run) / "run.json").read_text())
    summary = comparison.summary(run)
    assert summary is not None
    losses = {one["step"]: one.get("eval_loss_nats_per_token") for one in history(folder) if "eval_perplexity" in one}
    return {
        "run": run.key,
        "row": run.row.name,
        "shape": run.row.chosen,
        "settings": run.candidate.settings,
        "seed": run.seed,
        **{name: summary[name] for name in KEPT},
        "training_flops": run.candidate.flops,
        "curve": {step: None if loss is None else round(loss, 6) for step, loss in losses.items()},
        "data": about["data_hash"],
        "packages": about["packages"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=[*SIZES, "nano"])
    parser.add_argument("text", choices=TEXTS)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--texts", type=Path, default=Path("texts"), help="folder of the texts that are not committed")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    asked = parser.parse_args()
    watcher = ComparisonProgress(Console())
    out, path = asked.out / f"{asked.size}-{asked.text}-{asked.stage}", RESULTS / f"{asked.size}-{asked.text}.jsonl"
    comparison = Comparison.plan(settings_of(asked.size, asked.text, asked.stage, asked.texts), out, watcher)
    restore(comparison, path)
    muon = [row for row in comparison.rows if "muon" in row.name]
    with contextlib.suppress(KeyboardInterrupt):
        for rows in (muon, comparison.rows):  # what is compared first, with all seeds
            comparison.rows = rows
            comparison.run(watcher, after_each=lambda one: collect(one, path))


if __name__ == "__main__":
    main()
