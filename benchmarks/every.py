"""How fast is every method, next to dense layers and to what the machine can do? Whole models at 60M, 130M and 350M, two blocks of 1B and of 7B.

    OMP_NUM_THREADS=1 python benchmarks/every.py [60m 130m 350m 1b-blocks 7b-blocks] [--methods cola,crnet]

A step is forward and backward of 512 tokens, fp32, at the papers' ranks where they have some. Each method takes turns with the dense model, in one
process; speeds are ratios between medians. Utilisation is the FLOPs of a step, recomputation included, over what products of large matrices
reach here in the same time. Peak memory is of a step with the optimizer that the method trains with (`lorank.accounting.memory_estimate`), activations what a
forward pass keeps. Kept in results/every.json; a speed that is more than 10 % below the one there is pointed out.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorank.accounting import achievable_flops, memory_estimate
from lorank.loss import next_token_loss
from lorank.plan.bench import Work, measure
from lorank.plan.forecast import with_method
from lorank.table import find, method_names
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe

FILE = Path(__file__).with_name("results") / "every.json"
SIZES = ("60m", "130m", "350m", "1b-blocks", "7b-blocks")
METHODS = [name for name in method_names("method") if name != "dense" and not find(name).adapts]
BATCH, LENGTH = 2, 256


def work_of(size: str) -> Work:
    block = size.endswith("-blocks")
    recipe = Recipe(
        size=size.removesuffix("-blocks"), vocab_size=64 if block else 32_000, sequence_length=LENGTH, batch_size=BATCH
    )
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, LENGTH, build_config(recipe).hidden_size, generator=draw)
    ids = torch.randint(recipe.vocab_size or 0, (BATCH, LENGTH), generator=draw)

    def step(model: Any) -> Tensor:
        if block:
            return model.base_model(inputs_embeds=x).last_hidden_state.square().mean()  # type: ignore[no-any-return]
        return next_token_loss(model, {"input_ids": ids, "labels": ids}).total

    return Work(size, recipe, 2 if block else None, BATCH * LENGTH, step)


def peak_of(work: Work, method: str) -> float | None:
    """MiB of a step; None for blocks."""
    if work.layers is not None:
        return None
    recipe = with_method(work.recipe, method)
    with torch.device("meta"):
        model = build_model(recipe, build_config(recipe)).train()
    return round(memory_estimate(model, batch=BATCH, sequence_length=LENGTH).peak_bytes / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help=", ".join(SIZES))
    parser.add_argument("--methods", default=",".join(METHODS))
    asked = parser.parse_args()
    ceiling, source = achievable_flops()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {ceiling / 1e9:.0f} GFLOP/s ({source})")
    print(
        f"{'':10}{'':14}{'dense / it':>11}{'before':>8}{'its FLOPs':>10}{'tokens/s':>10}{'utilised':>9}{'keeps MiB':>10}{'peak MiB':>9}"
    )
    for size in asked.sizes:
        work = work_of(size)
        kept = json.loads(FILE.read_text()) if FILE.exists() else {}
        rows: dict[str, Any] = kept.setdefault(size, {})
        for method in asked.methods.split(","):
            dense, one = measure(work, ["dense", method], time.perf_counter(), lambda line: None)
            speed = one.speed_up(dense)[0]
            before = rows.get(method, {}).get("times as fast as dense")
            for row in (dense, one):
                rows[row.name] = {
                    "times as fast as dense": round(row.speed_up(dense)[0], 3),
                    "FLOPs of dense": round(row.flops / dense.flops, 3),
                    "tokens a second": round(work.tokens / row.median, 1),
                    "utilisation": round(row.flops / row.median / ceiling, 3),
                    "activations, MiB": round(row.kept_bytes / 2**20, 1),
                    "peak of a step, MiB": peak_of(work, row.name),
                }
            its = rows[method]
            print(
                f"{size:10}{method:14}{speed:11.2f}{'' if before is None else f'{before:.2f}':>8}{its['FLOPs of dense']:10.2f}"
                f"{its['tokens a second']:10.0f}{its['utilisation']:9.0%}{its['activations, MiB']:10.0f}{its['peak of a step, MiB'] or '':>9}",
                flush=True,
            )
            if before is not None and speed < 0.9 * before:
                print(f"    NOTICE: {method} was {before} times as fast as dense and is {speed:.2f}", file=sys.stderr)
            FILE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
