"""What should a block of CoLA keep for its backward pass? Memory against time for every choice among four kinds of results.

    OMP_NUM_THREADS=1 python benchmarks/kept.py [--rounds 10]      writes benchmarks/results/kept.json and docs/kept.svg

One model, four blocks of the 60m shape without embeddings and head, whose policy is switched from turn to turn. Numbers are those
that stay from the forward to the backward pass, per token and block, beyond the block's input, which a checkpoint always keeps.
FLOPs are of both passes, seconds of processor time, each over that of keeping everything.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaModel
from turns import in_turns

import lorank
from lorank.accounting import MORE_FLOPS, saved_by
from lorank.architectures import llama_config
from lorank.checkpointing import _ATTENTION, Policy, keep_bottlenecks
from lorank.report.charts import Series, scatter_chart
from lorank.report.curves import SIZE, framed

FILE = Path(__file__).with_name("results") / "kept.json"
PICTURE = Path(__file__).parents[1] / "docs" / "kept.svg"
BLOCKS, BATCH, LENGTH = 4, 2, 256
_aten = torch.ops.aten
KINDS: dict[str, Callable[..., bool]] = {
    "bottlenecks": lambda op, *given: keep_bottlenecks(None, op, *given) == CheckpointPolicy.MUST_SAVE,
    "attention": lambda op, *given: op in _ATTENTION,
    "residual": lambda op, *given: (
        op is _aten.add.Tensor and isinstance(given[1], torch.Tensor) and given[0].ndim == 3 == given[1].ndim
    ),
    "norms": lambda op, *given: op is _aten.mul.Tensor and given[0].ndim == 1 and given[1].ndim == 3,
}
"""Kind -> whether an operation's result is of it: A x; softmax(Q K^T) V; x + f(x); g x / rms(x)."""
EVERYTHING, INPUTS, COLA_M = "everything", "block inputs alone", "bottlenecks (cola-m)"


def policy(kinds: tuple[str, ...]) -> Policy:
    """Keeps the results of these kinds."""

    def kept(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        chosen = any(KINDS[kind](op, *args) for kind in kinds)
        return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE

    return kept


def choices() -> dict[str, Policy | None]:
    """Name -> policy: all sixteen sets of kinds, and no checkpoint at all."""
    found: dict[str, Policy | None] = {}
    for count in range(len(KINDS) + 1):
        for kinds in itertools.combinations(KINDS, count):
            found[{(): INPUTS, ("bottlenecks",): COLA_M}.get(kinds, " + ".join(kinds))] = policy(kinds)
    return {**found, EVERYTHING: None}


def measure(rounds: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    config = llama_config("60m")
    config.num_hidden_layers, config.vocab_size, config.use_cache = BLOCKS, 8, False
    model = LlamaModel(config).train()
    lorank.convert(model, lorank.CoLA(**lorank.CoLA.published["60m"]))
    given = torch.randn(BATCH, LENGTH, config.hidden_size, requires_grad=True)

    def forward() -> torch.Tensor:
        return model(inputs_embeds=given).last_hidden_state.square().mean()

    def way(chosen: Policy | None) -> None:
        lorank.checkpoint(model, chosen)
        model.zero_grad(set_to_none=True)
        forward().backward()

    chosen_by = choices()
    ways = {name: partial(way, chosen) for name, chosen in chosen_by.items()}
    kept, flops = {}, {}
    for name, chosen in chosen_by.items():
        lorank.checkpoint(model, chosen)
        kept[name] = saved_by(model, forward, [given]).bytes / (4 * BATCH * LENGTH * BLOCKS)
        with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
            ways[name]()
        flops[name] = counter.get_total_flops()
    times = in_turns(ways, rounds)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    return {
        name: {
            "numbers": round(kept[name] - kept[INPUTS]),
            "FLOPs": round(flops[name] / flops[EVERYTHING], 3),
            "time": round(seconds[name] / seconds[EVERYTHING], 3),
            "shortest": round(min(times[name]) / min(times[EVERYTHING]), 3),
        }
        for name in ways
    }


def picture(found: Mapping[str, Mapping[str, float]], rounds: int) -> str:
    chart = scatter_chart(
        [
            Series(name, "s0" if name == COLA_M else "s1", [(one["numbers"], one["time"])])
            for name, one in found.items()
            if name != EVERYTHING
        ],
        size=SIZE,
        x_title="numbers kept per token and block, beyond the block's input",
        y_title="time, everything kept = 1",
        x_format=lambda x: f"{x:,.0f}",
        y_format=lambda y: f"{y:.2f}",
        what="what a block of CoLA keeps",
    )
    note = f"Four blocks of the 60m shape, {rounds} rounds; keeping everything takes {found[EVERYTHING]['numbers']:,} numbers."
    return framed(chart, title="What a block of CoLA keeps for its backward pass", note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    found = measure(options.rounds)
    for name, one in sorted(found.items(), key=lambda pair: pair[1]["numbers"]):
        print(f"{name:46}" + "".join(f"{key} {value:<10,}" for key, value in one.items()))
    about = {"rounds": options.rounds, "threads": torch.get_num_threads(), "torch": torch.__version__}
    FILE.write_text(json.dumps({**found, "measured": about}, indent=2) + "\n")
    PICTURE.write_text(picture(found, options.rounds))


if __name__ == "__main__":
    main()
