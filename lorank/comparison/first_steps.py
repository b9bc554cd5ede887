"""The first steps of a reproduction in miniature, compared with a recorded curve: these are lorank's golden curves.

A recipe on a model and a text that are small enough for any CPU and the same everywhere, with everything that a method
does between steps. What the miniature changes is listed by `differences`; all else is the recipe's. The curves are next to
the recipes, and `benchmarks/first_steps.py` records them.
"""

import calendar
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorank.comparison.repro import Reproduction
from lorank.method import Method
from lorank.sizes import SIZES
from lorank.train import run
from lorank.train.data import cache_folder
from lorank.train.folder import history
from lorank.train.methods import KEYS, methods_of, title_of, written_out
from lorank.train.recipe import Recipe

STEPS = 24
WIDTH, MLP_WIDTH, BLOCKS, HEADS = 64, 172, 2, 4
TOLERANCE = 0.003
"""Relative, of each loss: four times the largest deviation that another CPU's instructions cause, except for methods whose
basis is a singular value decomposition. benchmarks/results/first_steps.txt has the measurements, and what faults do."""
WIDER = {"galore": 0.01, "fira": 0.02, "apollo": 0.04, "low-rank+loro": 0.01}
"""The same by method, where it is not `TOLERANCE`. A CPU without AVX-512 moves apollo by 2 % and loro by 0.4 %, and a loss whose
sums have another order moves fira by 1.1 %."""
RECORDED: dict[str, dict[str, Any]] = {"galore": {"update_gap": 6}, "fira": {"update_gap": 6}, "dct-adamw": {}}
"""Settings with which a curve was recorded, where they are not the method's `soon`. Within `STEPS` GaLore and Fira change
their basis three times, ReLoRA merges eleven times, SwitchLoRA exchanges vectors in the first few steps, SST draws eleven
times and decomposes once on the way."""


class Curve(NamedTuple):
    """Losses in nats per token: of each step before its update, then of the validation text after the last update."""

    losses: list[float]
    text: str
    """Hash of the text."""
    versions: dict[str, str]


@functools.cache
def months() -> list[str]:
    """The text of the first steps, one document per month: forty years as Python's `calendar` prints them.

    The embedded corpus does not suit: it is the interpreter's library, which changes with each version of Python.
    """
    return [calendar.TextCalendar().formatmonth(year, month) for year in range(1980, 2020) for month in range(1, 13)]


def text_hash() -> str:
    return hashlib.blake2b("\0".join(months()).encode(), digest_size=8).hexdigest()


def miniature(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe at a size of seconds; its text and its model's shape are written to `folder`.

    Ranks keep their part of the width, warm-up its part of the steps, and alpha its ratio to the rank.
    """
    full, width = written_out(recipe), SIZES[recipe.size].hidden_size
    keys: dict[str, Any] = {method.key: {method.name: _scaled(method, given, width)} for method, given in _given(full)}
    shape = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": month}) + "\n" for month in months())
    for name, text in (("config.json", json.dumps(shape)), ("months.jsonl", data)):
        if not (folder / name).exists() or (folder / name).read_text() != text:
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as part:  # several processes may write it
                part.write(text)
            os.replace(part.name, folder / name)
    return dataclasses.replace(
        full,
        **keys,
        model=str(folder / "config.json"),
        data=str(folder / "months.jsonl"),
        tokenizer="bytes",
        vocab_size=None,
        sequence_length=64,
        batch_size=8,
        micro_batch_size=8,
        steps=STEPS,
        warmup_steps=max(1, round(full.warmup * STEPS / full.steps)),
        log_every=1,
        eval_every=0,
        save_every=0,
    )


def _given(full: Recipe) -> list[tuple[Method, dict[str, Any]]]:
    """Each method of a recipe that is written out, with the settings that are given there."""
    values = {key: getattr(full, key) for key in KEYS}
    return [
        (method, dict(values[method.key][method.name]) if isinstance(values[method.key], dict) else {})
        for method in methods_of(full)
    ]


def _scaled(method: Method, given: dict[str, Any], width: int) -> dict[str, Any]:
    """A method's settings for the miniature of a model that is `width` wide."""
    settings = {**given, **RECORDED.get(method.name, method.soon)}
    if isinstance(settings.get("rank"), int):
        settings["rank"] = settings["rank"] / width
    if (alpha := getattr(method, "alpha", 1.0)) != 1.0:  # 1 is SwitchLoRA's, which draws its factors for it
        settings["alpha"] = alpha * WIDTH / width
    return settings


def differences(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Each setting in which the miniature is not its recipe, settings of methods by their own names: (recipe's,
    miniature's)."""
    full, shape = written_out(recipe), SIZES[recipe.size]
    before, after = _flat(full), _flat(miniature(recipe, text_folder()))
    changed = {name: (before.get(name), value) for name, value in after.items() if before.get(name) != value}
    del changed["model"], changed["data"]
    return {
        "width, MLP, blocks, heads": (shape[:4], (WIDTH, MLP_WIDTH, BLOCKS, HEADS)),
        "data": (recipe.data, f"{len(months())} months of the calendar"),
        **changed,
    }


def _flat(full: Recipe) -> dict[str, Any]:
    settings = {name: value for name, value in full.to_dict().items() if name not in (*KEYS, "rank", "options")}
    for method in methods_of(full):
        settings |= dataclasses.asdict(method)
    return settings


def text_folder() -> Path:
    """Where the text and the shape of miniatures are kept."""
    return cache_folder() / "first-steps"


def first_steps(recipe: Recipe, threads: int = 1) -> Curve:
    """Run the miniature of a recipe, always on the CPU; at that size a second thread would only wait.

    Raises:
        KeyboardInterrupt: a signal stopped it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="lorank-") as folder:
            summary = run.pretrain(miniature(recipe, text_folder()), folder, on_cpu=True)
            if summary is None:
                raise KeyboardInterrupt
            losses = [r["loss_nats_per_token"] for r in history(folder) if "loss_nats_per_token" in r]
    finally:
        torch.set_num_threads(before)
    return Curve([*losses, summary.validation_loss_nats_per_token], text_hash(), versions())


def versions() -> dict[str, str]:
    """Of the packages whose releases may change numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}


def recorded(reproduction: Reproduction) -> Curve:
    """The curve next to the recipe; ValueError if it is missing or was recorded on another text than `months` gives here."""
    file = reproduction.curve_file
    try:
        known = json.loads(file.read_text())
        curve = Curve(*(known[name] for name in Curve._fields))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{reproduction.name} has no curve of first steps: {file} cannot be read ({error})") from None
    if curve.text != text_hash():
        raise ValueError(
            f"this Python's calendar module prints another text than that of {file.name}, so first steps cannot be compared; use "
            f"Python {curve.versions['python']}"
        )
    return curve


def tolerance_of(recipe: Recipe) -> float:
    """Relative, of each loss."""
    return WIDER.get(title_of(recipe), TOLERANCE)


def deviation(found: Curve, expected: Curve) -> tuple[float, int]:
    """The largest relative difference of a loss, and its step (`STEPS` + 1: the validation text); infinite if a loss is NaN
    or if the curves have different lengths."""
    if len(found.losses) != len(expected.losses):
        return math.inf, min(len(found.losses), len(expected.losses)) + 1
    apart = [abs(ours / theirs - 1) for ours, theirs in zip(found.losses, expected.losses, strict=True)]
    worst = max(range(len(apart)), key=lambda i: math.inf if math.isnan(apart[i]) else apart[i])
    return math.inf if math.isnan(apart[worst]) else apart[worst], worst + 1


def check(reproduction: Reproduction) -> dict[str, Any]:
    """Run the first steps of a reproduction and compare them with its curve.

    Returns:
        losses and recorded (nats per token), deviation (relative, the largest) and the step where it is (`STEPS` + 1: the
        validation text), tolerance, within, changes (`differences`), and versions of packages: {name: (recorded, here)}
        where they differ.

    Raises:
        ValueError: there is no curve, or it is not for this text; nothing has been run then.
        KeyboardInterrupt: a signal stopped the run.
    """
    expected = recorded(reproduction)
    found = first_steps(reproduction.recipe)
    (worst, step), tolerance = deviation(found, expected), tolerance_of(reproduction.recipe)
    here = found.versions
    return {
        "name": reproduction.name,
        "losses": found.losses,
        "recorded": expected.losses,
        "steps": STEPS,
        "deviation": worst,
        "step": step,
        "tolerance": tolerance,
        "within": worst <= tolerance,
        "changes": differences(reproduction.recipe),
        "versions": {name: (was, here.get(name)) for name, was in expected.versions.items() if here.get(name) != was},
    }
