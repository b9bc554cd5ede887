"""What torch.compile gains: forward and backward of a whole model on a CPU, fp32, dense and CoLA, each as it is and compiled by Inductor.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py [60m] [--rounds 7]

It needs a C++ compiler. All take turns in one process, after the compiler has seen the batch twice; a compiled model computes its loss from logits,
so all do. Seconds are of processor time; the ratios are between medians, and between the shortest times as a check.
"""

import argparse
from functools import partial
from typing import Any

import torch
from transformers import LlamaForCausalLM
from turns import in_turns, ratios

import lorank
from lorank.architectures import llama_config

BATCH, LENGTH = 2, 256


def step(model: Any, ids: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="60m")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    ids = torch.randint(4096, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ways: dict[str, Any] = {}
    for kind in ("dense", "cola"):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(llama_config(options.size)).train()
        if kind == "cola":
            lorank.convert(model, lorank.CoLA(**lorank.CoLA.published[options.size]))
        model.config.use_cache = False
        ways[kind] = partial(step, model, ids)
        ways[f"{kind}, compiled"] = partial(step, torch.compile(model), ids)
    for way in ways.values():
        for _ in range(2):
            way()
    times = in_turns(ways, options.rounds)
    print(f"{options.size}, {BATCH} x {LENGTH} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for one, other in (
        ("dense", "dense, compiled"),
        ("cola", "cola, compiled"),
        ("dense", "cola"),
        ("dense, compiled", "cola, compiled"),
    ):
        found = ratios(times[one], times[other])
        print(f"{one:>16} / {other:16} {found['of medians']:5.2f} of medians {found['of shortest']:5.2f} of shortest")


if __name__ == "__main__":
    main()
