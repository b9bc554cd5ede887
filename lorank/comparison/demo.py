"""The demonstration: CoLA with Muon against its dense twin with AdamW and with Muon, on the embedded corpus.

Each has the learning rate and the start that ended lowest in the study (benchmarks/study), as `lorank pretrain` chooses them.
"""

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from lorank.comparison.matching import Costs, flops_of
from lorank.comparison.process import PretrainProcess, begun, stop_on_signal
from lorank.comparison.runner import Watcher
from lorank.train.best import with_best
from lorank.train.data import load_tokenizer
from lorank.train.folder import history
from lorank.train.recipe import Recipe

ROWS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense", "optimizer": "adamw"},
    "dense-muon": {"method": "dense", "optimizer": "muon"},
    "cola-muon": {"method": "cola", "optimizer": "muon"},
}


def demo_recipe(row: str, steps: int | None = None) -> Recipe:
    """The recipe of one of `ROWS`: what is best for it, and the defaults of `Recipe` for everything else."""
    changes: dict[str, Any] = {} if steps is None else {"steps": steps}
    return with_best(Recipe(**ROWS[row], **changes), ROWS[row])[0]


def run_demo(out: Path, steps: int | None, watcher: Watcher) -> dict[str, Any]:
    """Train all rows in processes like those of a user, so that their peaks of memory can be compared.

    `out` gets one run folder per row.

    Returns:
        summaries: {row: summary, with the learning rate and the training FLOPs, those of the optimizer included}, and
        curves: {row: records of metrics.jsonl}.

    Raises:
        ValueError: `out` is a file, or already holds a demo.
        OSError: a run failed.
        KeyboardInterrupt: a signal came; the run in progress has saved a checkpoint.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file; give --out a folder")
    taken = [out / row for row in ROWS if (out / row / "recipe.yaml").exists()]
    if taken:
        raise ValueError(f"{taken[0]} already holds a run; choose another --out or remove it")
    recipes = {row: demo_recipe(row, steps) for row in ROWS}
    summaries, left = {}, float(sum(recipe.steps for recipe in recipes.values()))
    with stop_on_signal():
        try:
            for number, (row, recipe) in enumerate(recipes.items(), start=1):
                watcher.say(f"$ {command(recipe, out / row, steps is not None)}")
                watcher.start(row, recipe.steps, float(recipe.steps), number, len(recipes), left)
                with begun(partial(PretrainProcess.start, recipe, out / row)) as process:
                    process.wait(watcher.update)
                path = out / row / "summary.json"
                if not path.exists():
                    raise OSError(f"the demo's {row} run failed: {process.last_words()}")
                summaries[row] = {**json.loads(path.read_text()), "lr": recipe.lr}
                watcher.end(f"validation perplexity {summaries[row]['validation_perplexity']:.2f}")
                left -= recipe.steps
        finally:
            watcher.close()
    costs = Costs(load_tokenizer(str(out / "dense")))
    for row, summary in summaries.items():
        summary["training_flops"] = flops_of(recipes[row], costs)
    return {"summaries": summaries, "curves": {row: list(history(out / row)) for row in summaries}}


def command(recipe: Recipe, out: Path, shortened: bool) -> str:
    """What a user would type for the same run."""
    parts = ["lorank", "pretrain", "--method", str(recipe.method), "--optimizer", str(recipe.optimizer)]
    if shortened:
        parts += ["--steps", str(recipe.steps)]
    return shlex.join([*parts, "--out", str(out)])
