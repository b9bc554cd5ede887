"""What do methods for trained models learn and forget, on a stream of real text?

    python benchmarks/continual.py [--out runs/continual-benchmark] [--steps 60] [--seeds 3]

The base is a dense Llama of 0.4 M parameters, trained on Python's standard library (the embedded corpus). Three kinds of text follow, all
from an installation of Python and torch: C++ headers of torch, the language reference in `pydoc_data`, and names of Unicode characters.
Each method begins from the base and sees the same batches. Its learning rate is the best of some, each three times the one before, by the
loss on all tasks at the end, with seed 0; all seeds use it. That loss is on the second half of what each task holds out, and all figures
are on the first. "base" is the change of the loss on held-out standard library, which no task has: what the model knew before.

All figures are nats per held-out token, mean ± standard deviation over seeds; for the others see docs/continual.md.
"""

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from kinds import base_in, three_kinds, written
from torch.utils.data import DataLoader

from lorank.table import find
from lorank.train.continual import FULL, Settings, Stream, run_stream
from lorank.train.data import collate
from lorank.train.data.corpus import Corpus, load_corpus
from lorank.train.evaluation import evaluate
from lorank.train.saved import load_model

STARTS = {FULL: 9e-4, "osft": 2.7e-3, "lora": 3.3e-4, "smora": 1e-3, "moram": 9e-3, "codyra": 3e-3, "comp-lora": 1e-3}
"""Learning rates with which the search begins."""
METHODS: dict[str, dict[str, Any]] = {
    FULL: {},
    "osft": {},
    "lora": {"rank": 16},
    "smora": {"rank": 16, "top_k": 4},
    "moram": {"rank": 16},
    "codyra": {"rank": 16},
    "comp-lora": {"rank": 16},
}
MOST = 400_000
"""Characters of each task."""


def held_out(model: Any, corpus: Corpus, settings: Settings) -> float:
    rows: Any = DataLoader(corpus.validation, batch_size=settings.batch_size, collate_fn=collate)  # type: ignore[arg-type]
    return evaluate(model, rows, max_tokens=settings.eval_tokens).loss


def parts(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """The corpus with the first half of its held-out rows, for figures, and with the second, for choices; they may share one document."""
    rows, middle = corpus.validation, len(corpus.validation) // 2
    halves = (rows.select(range(middle)), rows.select(range(middle, len(rows))))
    first, second = (dataclasses.replace(corpus, validation=half) for half in halves)
    return first, second


def figure(values: list[float]) -> str:
    return f"{mean(values):+.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:+.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/continual-benchmark"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    folder, settings = (
        base_in(asked.out, blocks=3),
        Settings(steps=asked.steps, batch_size=8, sequence_length=64, eval_tokens=5000),
    )
    base, _ = load_model(str(folder))
    tasks = {
        name: parts(load_corpus(str(file), tokenizer=str(folder), sequence_length=64))
        for name, file in written(three_kinds(), asked.out, MOST).items()
    }
    reported, chosen_by = zip(*tasks.values(), strict=True)
    known = load_corpus("embedded", tokenizer=str(folder), sequence_length=64)
    before = held_out(base, known, settings)
    print(f"base: {base.num_parameters():,} parameters, loss {before:.3f} on held-out standard library")
    print(f"tasks: {', '.join(tasks)}; {asked.steps} steps of 8 x 64 tokens each; torch {torch.__version__}\n")

    def run(name: str, lr: float, seed: int, corpora: Sequence[Corpus]) -> tuple[Stream, float]:
        model = copy.deepcopy(base)
        method = None if name == FULL else find(name)(**METHODS[name])
        stream = run_stream(model, name, method, corpora, lr, seed, settings)
        return stream, held_out(model, known, settings) - before

    columns = ("loss", "learned", "forgotten", "forward_transfer")
    print(
        f"{'':10s}{'lr':>9s}{'trained':>9s}" + "".join(f"{name.replace('_', ' '):>18s}" for name in (*columns, "base"))
    )
    for name in METHODS:
        tried = {lr: run(name, lr, 0, chosen_by)[0].loss for lr in (STARTS[name] / 3, STARTS[name], STARTS[name] * 3)}
        while (best := min(tried, key=lambda lr: tried[lr])) in (min(tried), max(tried)) and len(tried) < 6:
            lr = best / 3 if best == min(tried) else best * 3
            tried[lr] = run(name, lr, 0, chosen_by)[0].loss
        found = [run(name, best, seed, reported) for seed in range(asked.seeds)]
        cells = [figure([getattr(stream, column) for stream, _ in found]) for column in columns]
        shown = f"{name:10s}{best:9.1e}{found[0][0].trained:9,d}"
        print(shown + "".join(f"{one:>18s}" for one in (*cells, figure([change for _, change in found]))), flush=True)


if __name__ == "__main__":
    main()
