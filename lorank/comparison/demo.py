"""The demonstration: a small comparison of CoLA with its dense twin on the embedded corpus.

Both run at their best learning rate of one grid, which benchmarks/demo_sweep.py tries again; its output is
benchmarks/results/demo_sweep.txt.
"""

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from lorank.comparison.process import PretrainProcess, begun, stop_on_signal
from lorank.comparison.runner import Watcher
from lorank.train.folder import history
from lorank.train.recipe import Recipe

LEARNING_RATES = {"dense": 1.3e-3, "cola": 5e-3}


def demo_recipe(method: str, steps: int | None = None) -> Recipe:
    """The recipe of a method of `LEARNING_RATES`: that rate, and the defaults of `Recipe` for everything else."""
    changes: dict[str, Any] = {} if steps is None else {"steps": steps, "warmup_steps": max(1, steps // 5)}
    return Recipe(method=method, lr=LEARNING_RATES[method], **changes)


def run_demo(out: Path, steps: int | None, watcher: Watcher) -> dict[str, Any]:
    """Train both in processes like those of a user, so that their peaks of memory can be compared.

    `out` gets one run folder per method.

    Returns:
        summaries: {method: summary, with the learning rate}, and curves: {method: records of metrics.jsonl}.

    Raises:
        ValueError: `out` is a file, or already holds a demo.
        OSError: a run failed.
        KeyboardInterrupt: a signal came; the run in progress has saved a checkpoint.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file; give --out a folder")
    taken = [out / method for method in LEARNING_RATES if (out / method / "recipe.yaml").exists()]
    if taken:
        raise ValueError(f"{taken[0]} already holds a run; choose another --out or remove it")
    recipes = {method: demo_recipe(method, steps) for method in LEARNING_RATES}
    summaries, left = {}, float(sum(recipe.steps for recipe in recipes.values()))
    with stop_on_signal():
        try:
            for number, (method, recipe) in enumerate(recipes.items(), start=1):
                watcher.say(f"$ {command(recipe, out / method, steps is not None)}")
                watcher.start(method, recipe.steps, float(recipe.steps), number, len(recipes), left)
                with begun(partial(PretrainProcess.start, recipe, out / method)) as process:
                    process.wait(watcher.update)
                path = out / method / "summary.json"
                if not path.exists():
                    raise OSError(f"the demo's {method} run failed: {process.last_words()}")
                summaries[method] = {**json.loads(path.read_text()), "lr": recipe.lr}
                watcher.end(f"validation perplexity {summaries[method]['validation_perplexity']:.2f}")
                left -= recipe.steps
        finally:
            watcher.close()
    return {"summaries": summaries, "curves": {method: list(history(out / method)) for method in summaries}}


def command(recipe: Recipe, out: Path, shortened: bool) -> str:
    """What a user would type for the same run."""
    parts = ["lorank", "pretrain", "--method", str(recipe.method), "--lr", f"{recipe.lr:g}"]
    if shortened:
        parts += ["--steps", str(recipe.steps), "--warmup-steps", str(recipe.warmup_steps)]
    return shlex.join([*parts, "--out", str(out)])
