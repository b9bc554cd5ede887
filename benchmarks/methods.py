"""What does a step of each method cost? Time, memory and parameters at the block shape of the 130M model, fp32.

    python benchmarks/methods.py [--blocks 4] [--batch 2] [--rounds 9]

Blocks (d 768, d_ff 2048) without embeddings and head, which no method touches. A step is forward, backward and AdamW; all
methods take turns in one process on the same input, and times are medians. What a method does every so many steps (ReLoRA's
merge, SST's swap and decomposition) is timed apart, over one whole round of it, and its mean per step is added: "between".
SwitchLoRA exchanges vectors at every step, here at the highest frequency, that of a run's beginning. Memory: the largest growth
of a process of its own during three steps.
"""

import argparse
import multiprocessing
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel

import lorank
from lorank.conversion import method_of
from lorank.method import StepHook
from lorank.table import find
from lorank.train.memory import PeakMemory

SETTINGS: dict[str, dict[str, Any]] = {
    "cola": {"rank": 256},
    "cola-m": {"rank": 256},
    "low-rank": {"rank": 256},
    "sltrain": {"rank": 256, "alpha": 16.0},
    "crnet": {"rank": 208},  # our choice: CoLA's parameters at this depth
    "relora": {"rank": 128, "cycle": 1000},
    "switchlora": {"rank": 192},  # a quarter of the width, as the paper's 350M
    "sst": {"rank": 64},
    "masa": {},
}
"""Ranks of the papers' own 130M rows where they have one."""


def build(method: str, blocks: int) -> tuple[LlamaModel, torch.optim.Optimizer, StepHook | None]:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=blocks,
        num_attention_heads=12,
        use_cache=False,
    )
    model = LlamaModel(shape)
    if method != "dense":
        lorank.convert(model, find(method)(**SETTINGS[method]))
    made_by = method_of(model)
    adamw = (made_by.adamw if made_by else None) or torch.optim.AdamW
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return model.train(), optimizer, lorank.step_hook(model, optimizer, steps=20_000)


def between(method: str, hook: StepHook | None, blocks: int) -> float:
    """Seconds per step that a method's rare events take on average: one round of them, over the round's steps."""
    if hook is None or method not in ("relora", "sst"):
        return 0.0
    made = find(method)(**SETTINGS[method])
    if method == "relora":
        period, events = made.cycle, [2 * made.cycle]
    else:
        iterations = 768 // made.rank
        period, events = made.interval * iterations, [made.interval * i - 1 for i in range(1, iterations + 1)]
    spent = 0.0
    for step in events:
        hook.step = step
        start = time.perf_counter()
        hook._after_step()
        spent += time.perf_counter() - start
    return spent / period


def step(model: LlamaModel, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    """Seconds of one step, the loss being the mean of the outputs' squares."""
    start = time.perf_counter()
    model(inputs_embeds=x).last_hidden_state.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def peak_memory(method: str, blocks: int, batch: int) -> float:
    """MiB that building and training a model adds to a process."""
    x = torch.randn(batch, 256, 768)
    with PeakMemory() as memory:
        model, optimizer, _ = build(method, blocks)
        for _ in range(3):
            step(model, optimizer, x)
    return memory.gib * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2, help="sequences of 256 tokens")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()

    methods = ["dense", *SETTINGS]
    models = {method: build(method, options.blocks) for method in methods}
    x = torch.randn(options.batch, 256, 768)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for round_ in range(options.rounds + 2):
        for method, (model, optimizer, _) in models.items():
            elapsed = step(model, optimizer, x)
            if round_ >= 2:  # warm
                seconds[method].append(elapsed)
    rare = {method: between(method, hook, options.blocks) for method, (_, _, hook) in models.items()}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {method: pool.apply(peak_memory, (method, options.blocks, options.batch)) for method in methods}

    print(
        f"{options.blocks} blocks, d 768, d_ff 2048, {options.batch} x 256 tokens, fp32, {torch.get_num_threads()} threads"
    )
    print(
        f"{'':12} {'settings':26} {'parameters':>11} {'trained':>11} {'between':>8} {'s/step':>8} {'/ dense':>8} {'/ CoLA':>8} {'MiB':>7}"
    )
    median = {method: statistics.median(times) + rare[method] for method, times in seconds.items()}
    for method, (model, _, _) in models.items():
        settings = ", ".join(f"{name}={value}" for name, value in SETTINGS.get(method, {}).items())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(
            f"{method:12} {settings:26} {model.num_parameters():11,} {trained:11,} {rare[method]:8.4f} {median[method]:8.3f} "
            f"{median[method] / median['dense']:8.2f} {median[method] / median['cola']:8.2f} {memory[method]:7.0f}"
        )


if __name__ == "__main__":
    main()
