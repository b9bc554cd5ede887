"""The demonstration: CoLA and its dense twin on the embedded corpus.

Each twin runs at its own best learning rate of one grid, which benchmarks/demo_sweep.py runs again; its print is
benchmarks/results/demo_sweep.txt.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorank.train.folder import history
from lorank.train.recipe import Recipe

LEARNING_RATES = {"dense": 1.3e-3, "cola": 5e-3}


def demo_recipe(method: str, steps: int | None = None) -> Recipe:
    """The recipe of a method of `LEARNING_RATES`: that rate, and the defaults of `Recipe` for everything else."""
    changes: dict[str, Any] = {} if steps is None else {"steps": steps, "warmup_steps": max(1, steps // 5)}
    return Recipe(method=method, lr=LEARNING_RATES[method], **changes)


def run_demo(out: Path, steps: int | None = None, *, say: Callable[[str], None] = print) -> dict[str, dict[str, Any]]:
    """Train each twin in a process of its own, as a user would, and return their summaries by method.

    `out` gets one run folder per method and loss.png. Processes of their own make the peaks of memory comparable.

    Raises:
        ValueError: `out` is a file, or already holds a demo.
        OSError: a run failed; its own message is on stderr.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file; give --out a folder")
    taken = [out / method for method in LEARNING_RATES if (out / method / "recipe.yaml").exists()]
    if taken:
        raise ValueError(f"{taken[0]} already holds a run; choose another --out or remove it")
    summaries = {}
    for method in LEARNING_RATES:
        recipe = demo_recipe(method, steps)
        command = ["pretrain", "--method", method, "--lr", f"{recipe.lr:g}"]
        if steps is not None:
            command += ["--steps", str(recipe.steps), "--warmup-steps", str(recipe.warmup_steps)]
        command += ["--out", str(out / method)]
        say(f"$ lorank {shlex.join(command)}")
        code = subprocess.run([sys.executable, "-m", "lorank", *command], check=False).returncode
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise OSError(f"the demo's {method} run failed with exit code {code}")
        summaries[method] = {**json.loads((out / method / "summary.json").read_text()), "lr": recipe.lr}
    from lorank.report.curves import draw_curves

    curves = {method: list(history(out / method)) for method in summaries}
    draw_curves(curves, out / "loss.png", title="CoLA and its dense twin on Python's standard library")
    return summaries
