"""The curves of first steps that `lorank repro --first-steps` compares with, and what its tolerance is chosen by.

    python benchmarks/first_steps.py record [NAME ...]   # writes recipes/METHOD-SIZE.json; make curves
    python benchmarks/first_steps.py spread              # what changes a curve: other instructions, two threads, and faults

Record again after a change that is meant to change numbers, and say in the commit why. The print of `spread` is
benchmarks/results/first_steps.txt; "other CPU" is this one without AVX-512, "idle" a method that does nothing between steps
(GaLore, Fira: that keeps its first basis), "plain" dense AdamW with the rest of the recipe.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any
from unittest import mock

from transformers.utils import logging

from lorank.comparison import first_steps, repro
from lorank.comparison.matching import is_dense
from lorank.comparison.rows import dense_twin
from lorank.methods.relora import ReLoRAHook
from lorank.methods.sst import SSTHook
from lorank.methods.switchlora import SwitchLoRAHook
from lorank.train.folder import write_whole
from lorank.train.methods import title_of
from lorank.train.recipe import Recipe

OLD_CPU = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
COLUMNS = ("2 threads", "lr x 1.25", "lr / 2", "seed + 1", "idle", "plain")


def record(names: Iterable[str]) -> None:
    for name in names:
        reproduction = repro.find(name)
        if name == "cola-m-60m":
            continue  # it has CoLA's
        curve = first_steps.first_steps(reproduction.recipe)
        file = reproduction.curve_file
        known = json.loads(file.read_text(encoding="utf-8"))  # what is published stays
        write_whole(file, json.dumps({**known, **curve._asdict()}, indent=1, ensure_ascii=False) + "\n")
        print(f"{name:16} {curve.losses[0]:.4f} -> {curve.losses[-1]:.4f}")


def faulty(name: str, fault: str) -> first_steps.Curve | None:
    """The curve of a reproduction with a fault; None if the fault means nothing for it."""
    recipe = repro.find(name).recipe
    if fault == "other CPU":
        return first_steps.first_steps(recipe)
    if fault == "2 threads":
        return first_steps.first_steps(recipe, threads=2)
    if fault == "idle":  # without what a method does between steps
        return idle(recipe)
    if fault == "plain":  # without the structure or the projection
        return None if is_dense(recipe) else first_steps.first_steps(dense_twin(recipe))
    changes: dict[str, dict[str, Any]] = {
        "lr x 1.25": {"lr": recipe.lr * 1.25},
        "lr / 2": {"lr": recipe.lr / 2},
        "seed + 1": {"seed": recipe.seed + 1},
    }
    return first_steps.first_steps(dataclasses.replace(recipe, **changes[fault]))


def idle(recipe: Recipe) -> first_steps.Curve | None:
    name = title_of(recipe)
    if name in ("galore", "fira"):
        with mock.patch.dict(first_steps.RECORDED, {name: {"update_gap": 1000}}):
            return first_steps.first_steps(recipe)
    hooks = {"relora": ReLoRAHook, "switchlora": SwitchLoRAHook, "sst": SSTHook}
    if name not in hooks:
        return None
    with mock.patch.multiple(hooks[name], before_step=lambda self: None, after_step=lambda self: None):
        return first_steps.first_steps(recipe)


def spread(names: list[str]) -> None:
    environment = {**os.environ, **OLD_CPU}
    command = [sys.executable, __file__, "old", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    other = dict(zip(names, done.stdout.split()[-len(names) :], strict=True))
    print("largest relative difference of a loss from the recorded curve, in %; - means nothing there")
    print(f"{'':15}" + "".join(f"{column:>11}" for column in ("other CPU", *COLUMNS)))
    for name in names:
        cells = [other[name], *(cell(name, column) for column in COLUMNS)]
        print(f"{name:15}" + "".join(f"{value:>11}" for value in cells), flush=True)


def cell(name: str, fault: str) -> str:
    curve = faulty(name, fault)
    return (
        "-" if curve is None else f"{100 * first_steps.deviation(curve, first_steps.recorded(repro.find(name)))[0]:.2g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "spread", "old"])
    parser.add_argument("names", nargs="*", help="reproductions; default: all")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = options.names or repro.names()
    if options.what == "old":  # for spread, in a process that takes this CPU for one without AVX-512
        return print(*(cell(name, "other CPU") for name in names))
    {"record": record, "spread": spread}[options.what](names)


if __name__ == "__main__":
    main()
