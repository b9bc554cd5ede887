"""Run by test_counts.py as a separate process: train each recipe for two steps, print its peaks of resident bytes."""

import ctypes
import dataclasses
import gc
import json
import sys
from pathlib import Path

import torch

from lorank.loss import next_token_loss
from lorank.train.methods import build_optimizer
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe


def status(field: str) -> int:
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def train(recipe: Recipe, steps: int = 2) -> None:
    model = build_model(recipe, build_config(recipe)).train()
    optimizer = build_optimizer(recipe, model)
    micro = recipe.micro_batch_size or recipe.batch_size
    for _ in range(steps):
        for _ in range(recipe.batch_size // micro):
            ids = torch.randint(recipe.vocab_size or 1, (micro, recipe.sequence_length))
            batch = {"input_ids": ids, "labels": ids}
            if recipe.documents == "padded":
                batch["attention_mask"] = (
                    torch.arange(recipe.sequence_length) < recipe.sequence_length // 2
                ).expand_as(ids)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = next_token_loss(model, batch).total
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def peak(recipe: Recipe) -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    train(recipe)
    return status("VmHWM") - before


def main() -> None:
    gc.freeze()  # what was imported need not be looked through
    recipes = [Recipe.from_dict(settings) for settings in json.loads(sys.argv[1])]
    for recipe in {
        (recipe.method, recipe.optimizer, recipe.model, recipe.precision): recipe for recipe in recipes
    }.values():  # what is loaded at first use belongs to no run
        train(dataclasses.replace(recipe, size="tiny", vocab_size=64, sequence_length=16))
    print(json.dumps([peak(recipe) for recipe in recipes]))


if __name__ == "__main__":
    main()
