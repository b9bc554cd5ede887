"""How much faster is a CoLA block than transformers' own dense Llama block? Forward and backward, fp32, CPU or CUDA.

    python benchmarks/block_stack.py [--shapes 1x128 4x128 1x256 4x256] [--rounds 15]

Two blocks of the 1B shape (d 2048, d_ff 5461, r 512) run in turns in one process on the same input; the ratios are
between medians. Beside each stands the ratio of FLOPs that PyTorch's counter measured for the very same call: the
ceiling. Attention has no factors, so longer sequences lower it.
"""

import argparse
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

import lorank
from lorank.accounting import MORE_FLOPS

SHAPES = ("1x128", "4x128", "1x256", "4x256")


def build(method: str | None) -> LlamaModel:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8,
        hidden_size=2048,
        intermediate_size=5461,
        num_hidden_layers=2,
        num_attention_heads=32,
        use_cache=False,
    )
    model = LlamaModel(shape).train()
    if method is not None:
        method_class = {"CoLA": lorank.CoLA, "CoLA-M": lorank.CoLAM}[method]
        lorank.convert(model, method_class(rank=512, nonlinearity="low-rank"))
    return model


def step(model: LlamaModel, x: torch.Tensor) -> float:
    """Seconds of one forward and backward pass, the loss being the sum of the outputs' squares."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    model(inputs_embeds=x).last_hidden_state.square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flops_of(model: LlamaModel, x: torch.Tensor) -> int:
    """FLOPs of one step, recomputation included."""
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
        step(model, x)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="sequences x tokens per sequence")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {"dense": build(None).to(device), "CoLA": build("CoLA").to(device), "CoLA-M": build("CoLA-M").to(device)}
    print(
        f"2 blocks, d 2048, d_ff 5461, r 512, fp32, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'':18} {'s/step':>8} {'GFLOP':>8} {'GFLOP/s':>8} {'speed-up':>9} {'FLOP ratio':>11} {'of ceiling':>11}")
    for shape in options.shapes:
        x = torch.randn(*map(int, shape.split("x")), 2048, device=device)
        flops = {name: flops_of(model, x) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for round_ in range(options.rounds + 2):
            for name, model in models.items():
                elapsed = step(model, x)
                if round_ >= 2:  # warm
                    seconds[name].append(elapsed)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        for name in models:
            speedup, ceiling = median["dense"] / median[name], flops["dense"] / flops[name]
            print(f"{shape:10} {name:7} {median[name]:8.3f} {flops[name] / 1e9:8.1f} "
                  f"{flops[name] / median[name] / 1e9:8.1f} {speedup:8.2f}x {ceiling:10.2f}x {speedup / ceiling:11.0%}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
