"""EGG, an int8 recurrent language model, learns bytes without a gradient: how far, against counts of single bytes and pairs.

    python benchmarks/egg_demo.py > benchmarks/results/egg_demo.txt
    python benchmarks/egg_demo.py --embedded >> benchmarks/results/egg_demo.txt

Two corpora: calendars of the years 1000 to 2999 as Python's own `calendar` prints them, and with --embedded the default corpus
of `lorank pretrain`, Python's sources. The entropies of bytes and of byte pairs are those of the very validation bytes that
the model is measured on, so a table of pairs that had seen them beforehand could do no better than the second.
"""

import argparse
import calendar
import json
import math
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from lorank.train import run
from lorank.train.data import load_corpus
from lorank.train.recipe import Recipe

SETTINGS = {
    "calendar": {"options": {"hidden_size": 32, "population": 1024}, "steps": 800, "lr": 2.0},
    "embedded": {"options": {"hidden_size": 32, "population": 1024}, "steps": 300, "lr": 2.0},
}
COMMON = {
    "model": "egg",
    "batch_size": 512,
    "sequence_length": 16,
    "log_every": 20,
    "eval_tokens": 30_000,
    "save_every": 0,
}


def entropies(rows: torch.Tensor) -> tuple[float, float]:
    """Bits of a byte, and of a byte after the one before it, over the predicted bytes of rows [n, T]."""
    pairs = torch.bincount((rows[:, :-1] * 256 + rows[:, 1:]).flatten(), minlength=65_536).double()
    pairs /= pairs.sum()
    first, second = pairs.view(256, 256).sum(1), pairs.view(256, 256).sum(0)
    bits = lambda p: -(p[p > 0] * p[p > 0].log2()).sum().item()  # noqa: E731
    return bits(second), bits(pairs) - bits(first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    name = "embedded" if arguments.embedded else "calendar"
    with tempfile.TemporaryDirectory() as folder:
        data = "embedded"
        if name == "calendar":
            data = f"{folder}/calendar.jsonl"
            years = map(partial(calendar.TextCalendar().formatyear), range(1000, 3000))
            Path(data).write_text("".join(json.dumps({"text": year}) + "\n" for year in years))
        steps = arguments.steps or SETTINGS[name]["steps"]
        recipe = Recipe.from_dict(
            {**COMMON, **SETTINGS[name], "data": data, "steps": steps, "eval_every": max(1, steps // 8)}
        )
        corpus = load_corpus(data, tokenizer="bytes", sequence_length=recipe.sequence_length, seed=recipe.seed)
        single, pair = entropies(torch.tensor(corpus.validation["input_ids"]))
        start = time.perf_counter()
        summary = run.pretrain(recipe, f"{folder}/run")
        seconds = time.perf_counter() - start
        assert summary is not None
        print(
            f"{corpus.description.replace(folder + '/', '')}; {recipe.options}, {steps} steps of {recipe.batch_size} x"
        )
        print(f"{recipe.sequence_length} bytes, flag {recipe.lr}; {summary.parameters:,} parameters, all int8")
        for record in run.history(f"{folder}/run"):
            if "eval_bits_per_byte" in record:
                print(
                    f"  step {record['step']:5}  {record['eval_loss_nats_per_token'] / math.log(2):.3f} bits per byte"
                )
        bits = summary.validation_loss_nats_per_token / math.log(2)
        print(f"all of the validation text: {bits:.3f} bits per byte; one byte {single:.3f}, pairs {pair:.3f}")
        print(
            f"{'below' if bits < pair else 'NOT below'} the pairs; {seconds:.0f} s, {torch.get_num_threads()} threads"
        )
        print(f"it writes: {summary.sample!r}\n")


if __name__ == "__main__":
    main()
