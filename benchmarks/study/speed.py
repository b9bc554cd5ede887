"""How long is a step of each row of a size? Forward, backward, clipping and optimizer, of all rows in turns in one process.

    OMP_NUM_THREADS=1 python benchmarks/study/speed.py tiny [--rounds 9]

Writes results/speed-SIZE.json: row -> median seconds of a step on this machine, from which report.py compares rows at equal time.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from grid import SIZES, settings_of
from run import RESULTS

from lorank.comparison.matching import Costs
from lorank.comparison.rows import plan_rows
from lorank.loss import next_token_loss
from lorank.speed.allocator import keep_freed_memory
from lorank.train.data import load_corpus
from lorank.train.folder import write_whole
from lorank.train.methods import build_optimizer
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe


def ready(recipe: Recipe, tokenizer: Any) -> Any:
    """A function that takes one step of a recipe and returns its seconds."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, build_config(recipe, tokenizer)).train()
    optimizer: Any = build_optimizer(recipe, model)
    ids = torch.randint(model.config.vocab_size, (recipe.batch_size, recipe.sequence_length))

    def step() -> float:
        start = time.perf_counter()
        next_token_loss(model, {"input_ids": ids, "labels": ids}).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    keep_freed_memory()
    tokenizer = load_corpus("embedded", vocab_size=4096, sequence_length=256, seed=42).tokenizer
    steps: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("core", "cola"):
            settings = settings_of(asked.size, "embedded", stage, Path())
            rows, _ = plan_rows(settings, Costs(tokenizer), Path(folder))
            steps |= {row.name: ready(row.candidates[0].recipe, tokenizer) for row in rows if row.name not in steps}
    for step in steps.values():
        step()  # warm
    rounds = [{name: step() for name, step in steps.items()} for _ in range(asked.rounds)]
    found = {name: statistics.median(each[name] for each in rounds) for name in steps}
    about = {"threads": torch.get_num_threads(), "rounds": asked.rounds, "torch": torch.__version__, "seconds": found}
    write_whole(RESULTS / f"speed-{asked.size}.json", json.dumps(about, indent=1) + "\n")
    for name, seconds in sorted(found.items(), key=lambda item: item[1]):
        print(f"{name:20} {seconds:7.3f} s   {found['dense-muon'] / seconds:5.2f} times as fast as dense-muon")


if __name__ == "__main__":
    main()
