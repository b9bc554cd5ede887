"""How much faster is a low-rank step than a dense one, next to its FLOPs? Forward and backward of whole models on a CPU, fp32.

    OMP_NUM_THREADS=1 python benchmarks/step.py [60m 130m ...] [--rounds 5] [--give-back] [--shares]

All models of a size compute the loss without logits, as `lorank pretrain` does, and take turns in one process. A name such as
1b-blocks stands for one block of that size without embeddings and head. Seconds are of processor time, so that with one thread
other programs on the machine count little; the figures are ratios between medians, and between the shortest times as a check.
With --shares PyTorch's profiler says which part of the CoLA model's time is in which operations, and nothing is compared.
The process keeps the memory that it frees, as pretrain's does; with --give-back it does not. Results are kept in
benchmarks/results/step.json; a ratio that is more than 10 % below the one there is pointed out.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, LlamaModel
from turns import ratios

import lorank
from lorank.accounting import measure_flops
from lorank.architectures import llama_config
from lorank.checkpointing import POLICIES
from lorank.loss import next_token_loss
from lorank.sizes import SIZES
from lorank.speed.allocator import keep_freed_memory

FILE = Path(__file__).with_name("results") / "step.json"
KINDS = {"dense": "none", "cola": "none", "cola-m": "bottlenecks", "cola, blocks again": "blocks"}
"""What is kept for the backward pass."""
BATCH, LENGTH = 2, 256
OPERATIONS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "log-softmax of the loss": ("_log_softmax", "exp_", "gather", "scatter_add_"),
    "SiLU": ("silu", "silu_backward"),
    "sums of gradients, residuals": ("add", "add_"),
    "other products": ("mul", "mul_"),
}


def build(kind: str, size: str) -> Any:
    torch.manual_seed(0)
    config = llama_config(size.removesuffix("-blocks"))
    if size == "tiny":
        config.vocab_size = 4096  # pretrain's default
    if size.endswith("-blocks"):
        config.num_hidden_layers, config.vocab_size = 1, 8
    model: Any = (LlamaModel if size.endswith("-blocks") else LlamaForCausalLM)(config).train()
    if kind != "dense":
        published = lorank.CoLA.published[size.removesuffix("-blocks")]
        lorank.convert(model, lorank.CoLA(**published))
    model.config.use_cache = False
    lorank.checkpoint(model, POLICIES[KINDS[kind]])
    return lorank.loss_without_logits(model)


def seconds(model: Any, size: str) -> float:
    """Of processor time, for one forward and backward pass."""
    draw = torch.Generator().manual_seed(0)
    config = model.config
    if size.endswith("-blocks"):
        given = torch.randn(BATCH, LENGTH, config.hidden_size, generator=draw).requires_grad_()
    else:
        given = torch.randint(config.vocab_size, (BATCH, LENGTH), generator=draw)
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    if size.endswith("-blocks"):
        model(inputs_embeds=given).last_hidden_state.square().mean().backward()
    else:
        next_token_loss(model, {"input_ids": given, "labels": given}).total.backward()
    return time.process_time() - start


def shares(size: str) -> dict[str, float]:
    """In percent of the time of two passes of the CoLA model."""
    model = build("cola", size)
    seconds(model, size)  # warm
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(2):
            seconds(model, size)
    own = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in seen.key_averages()}
    found = {name: sum(own.pop(op, 0.0) for op in ops) for name, ops in OPERATIONS.items()}
    found["all else"] = sum(own.values())
    return {name: round(100 * each / sum(found.values()), 1) for name, each in found.items()}


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Ratios of speed, and the seconds from which they are."""
    models = {kind: build(kind, size) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_ in range(rounds + 1):
        for kind, model in models.items():
            elapsed = seconds(model, size)
            if round_:  # warm
                times[kind].append(elapsed)
    found: dict[str, Any] = {"seconds": {kind: round(statistics.median(each), 3) for kind, each in times.items()}}
    if not size.endswith("-blocks"):
        flops = {kind: measure_flops(models[kind], batch=BATCH, sequence_length=LENGTH) for kind in ("dense", "cola")}
        sums = {kind: each.forward + each.backward for kind, each in flops.items()}
        found["FLOPs, dense / cola"] = round(sums["dense"] / sums["cola"], 2)
    pairs = [("dense", "cola"), ("dense", "cola-m"), ("cola", "cola-m"), ("cola, blocks again", "cola-m")]
    for one, other in pairs:
        found[f"{one} / {other}"] = ratios(times[one], times[other])
    return {**found, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["tiny", "60m", "130m", "1b-blocks"], help=", ".join(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--give-back", action="store_true", help="leave freed memory to the C library")
    parser.add_argument("--shares", action="store_true", help="where the time of the CoLA model goes")
    options = parser.parse_args()
    if not options.give_back:
        keep_freed_memory()
    for size in options.sizes:
        name = f"{size}, given back" if options.give_back else size
        found = {"shares of cola": shares(size)} if options.shares else measure(size, options.rounds)
        kept = json.loads(FILE.read_text()) if FILE.exists() else {}
        before = kept.get(name, {})
        print(f"{name}, {BATCH} x {LENGTH} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for key, value in found.items():
            print(f"    {key:32} {json.dumps(value):48} before: {json.dumps(before.get(key))}")
            last = before.get(key, {}).get("of medians") if isinstance(value, dict) and "of medians" in value else None
            if last is not None and value["of medians"] < 0.9 * last:
                print(f"    NOTICE: {key} was {last} and is {value['of medians']}", file=sys.stderr)
        kept[name] = {**before, **found, "threads": torch.get_num_threads(), "torch": torch.__version__}
        FILE.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
