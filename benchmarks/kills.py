"""Runs that are killed at random moments, resumed, killed again, until they end: none may be lost, and each must end as if it had never
been killed, bit by bit.

    python benchmarks/kills.py                    # 200 kills: benchmarks/results/kills.json
    python benchmarks/kills.py --kills 10 --out /tmp/kills.json

Each try is a forked process that gets SIGKILL after a random time, which may be before the first step, while a checkpoint is written,
or while the finished model is. After a part of the kills a byte of the newest checkpoint is flipped, or a file is cut, if there is an
older one. A run is lost if it cannot be resumed, if it goes back behind a checkpoint that is whole, or if its losses or its
weights differ at the end from those of a run that was not killed.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lorank import accounting
from lorank.train import run
from lorank.train.folder import STAGING, history, read_run, step_of
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain

RECIPES: tuple[dict[str, Any], ...] = (
    {},
    {"method": "galore", "options": {"update_gap": 4}},
    {"method": "relora", "options": {"cycle": 6, "restart_warmup_steps": 2}},
    {"optimizer": "muon", "micro_batch_size": 2},
    {"method": "crnet"},
    {"optimizer": "spectron"},
)
STEPS, SAVE_EVERY = 18, 2


def recipe(folder: Path, changes: dict[str, Any]) -> Recipe:
    """A model that trains in two seconds on a text of 400 lines."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"line {i}: the brown fox counts {i * i} lazy dogs\n" for i in range(400)))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings: dict[str, Any] = {"data": str(text), "model": "llama", "shape": {**shape, "num_key_value_heads": 2}}
    settings |= {"rank": 8, "vocab_size": 300, "sequence_length": 32, "batch_size": 4, "steps": STEPS, "lr": 1e-2}
    settings |= {"warmup_steps": 2, "log_every": 1, "eval_every": 9, "save_every": SAVE_EVERY, "keep": 2}
    return Recipe(**{**settings, **changes})


def go_on(asked: Recipe, out: Path) -> None:
    """In a forked process: begin the run or resume it, as the command line does."""
    os.setsid()
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    began = (out / "recipe.yaml").exists()
    pretrain(read_run(out) if began else asked, out, resume=began, on_cpu=True)


def whole(out: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max(map(step_of, out.glob("checkpoint-*")), default=0)


def result(out: Path) -> tuple[list[tuple[Any, ...]], dict[str, torch.Tensor]]:
    """Losses by step, those of evaluations too, and the weights of a finished run."""
    keys = ("step", "loss_nats_per_token", "gradient_norm", "eval_loss_nats_per_token")
    return [tuple(one.get(key) for key in keys) for one in history(out)], load_file(out / "model.safetensors")


def damage(out: Path, draw: random.Random) -> str | None:
    """Flip a byte of the newest checkpoint or cut one of its files, if an older one is there; which of the two."""
    if len(found := sorted(out.glob("checkpoint-*"), key=step_of)) < 2:
        return None
    file = draw.choice([file for file in sorted(found[-1].iterdir()) if file.stat().st_size])
    content, kind = bytearray(file.read_bytes()), draw.choice(["flipped", "cut"])
    at = draw.randrange(len(content))
    content[at] ^= 1 << draw.randrange(8)
    file.write_bytes(content if kind == "flipped" else content[:at])
    return kind


def killed_run(
    asked: Recipe, out: Path, seconds: float, most: int, draw: random.Random, seen: Counter[str]
) -> tuple[int, str | None]:
    """Begin a run and kill it until it ends, at most `most` times, then let it end. How often, and why it is lost, if it is."""
    context, kills = multiprocessing.get_context("fork"), 0
    while True:
        before = whole(out)
        process = context.Process(target=go_on, args=(asked, out))
        process.start()
        process.join(draw.uniform(0, seconds) if kills < most else None)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join()
            kills += 1
            seen["while a checkpoint was written"] += any((out / STAGING).glob("*"))
            seen["before the run was begun"] += not (out / "recipe.yaml").exists()
            seen["after the last step"] += whole(out) == asked.steps
        elif process.exitcode:
            return kills, f"a try ended with {process.exitcode}"
        if whole(out) < before:
            return kills, f"went back from checkpoint {before} to {whole(out)}"
        if (out / "summary.json").exists():
            return kills, None
        if draw.random() < 0.25 and (kind := damage(out, draw)):
            seen[f"checkpoints {kind} afterwards"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", type=int, default=len(RECIPES), help="use the first ones only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/kills.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    accounting.flops_per_token = lambda *_, **__: 1.0  # type: ignore[assignment]
    accounting.achievable_flops = lambda: (1e12, "assumed")  # type: ignore[assignment]
    run.generate_text = lambda *_, **__: ""  # type: ignore[assignment]
    draw, context = random.Random(options.seed), multiprocessing.get_context("fork")
    seen, lost, runs, kills, began = Counter[str](), list[str](), 0, 0, time.time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        references: dict[int, tuple[Any, float]] = {}
        while kills < options.kills:
            index, out = runs % options.recipes, folder / f"run-{runs}"
            asked = recipe(folder, RECIPES[index])
            if index not in references:
                started, reference = time.time(), context.Process(target=go_on, args=(asked, folder / f"whole-{index}"))
                reference.start()
                reference.join()
                if reference.exitcode:
                    raise SystemExit(f"a run that is not killed fails: {RECIPES[index]}")
                references[index] = result(folder / f"whole-{index}"), time.time() - started
            (losses, weights), seconds = references[index]
            some, reason = killed_run(asked, out, seconds, options.kills - kills, draw, seen)
            runs, kills = runs + 1, kills + some
            if reason is None:
                ours, ends = result(out)
                if ours != losses:
                    reason = "its losses differ"
                elif not all(torch.equal(weights[name], ends[name]) for name in weights):
                    reason = "its weights differ"
            if reason is not None:
                lost.append(f"run {runs} ({RECIPES[index] or 'cola'}): {reason}")
            shutil.rmtree(out, ignore_errors=True)
            print(f"{kills} kills, {runs} runs, {len(lost)} lost", flush=True)
    found = {"kills": kills, "runs": runs, "lost": lost, "kills_by_moment": dict(sorted(seen.items()))}
    found |= {"seed": options.seed, "steps_of_a_run": STEPS, "steps_between_checkpoints": SAVE_EVERY}
    options.out.write_text(json.dumps({**found, "minutes": round((time.time() - began) / 60, 1)}, indent=2) + "\n")
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()
