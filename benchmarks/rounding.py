"""How far does a 16-bit model move at learning rate 0 under methods that edit frozen weights in place?

    python benchmarks/rounding.py [--size tiny] [--steps 100 300 1000 3000]

One block of a Llama in bfloat16, everything else by default. Moved is the norm of the change of each layer's matrix, W + s B A (SST: U S Vᵀ), beside its
norm; the largest of the block's seven. "Kept" is lorank, which keeps what rounding takes (lorank/rounding.py); "lost" rounds W at each edit and
forgets it. ReLoRA merges B A = 0 at this rate, so it cannot move; it is here to show that.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lorank import SST, Method, ReLoRA, SwitchLoRA, convert, step_hook
from lorank.architectures import llama_config
from lorank.layers import FrozenPlusLowRank, SpectralLinear
from lorank.optim.adamw import VectorAdamW

METHODS = {"switchlora": SwitchLoRA(), "sst": SST(interval=20), "relora": ReLoRA(cycle=50)}


def matrices(model: torch.nn.Module) -> Iterator[Tensor]:
    for layer in model.modules():
        if isinstance(layer, FrozenPlusLowRank):
            yield (layer.W.weight + layer.product()).detach().double()
        elif isinstance(layer, SpectralLinear):
            yield layer.weight().detach().double()


def moved(size: str, method: Method, steps: list[int], *, kept: bool) -> Iterator[float]:
    """After so many steps each."""
    torch.manual_seed(0)
    config = llama_config(size, vocab_size=128)
    config.num_hidden_layers = 1
    model = convert(LlamaForCausalLM(config).to(torch.bfloat16), method)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = VectorAdamW(trained, lr=0.0, weight_decay=0.0)
    hook: Any = step_hook(model, optimizer, steps=40_000)
    start = list(matrices(model))
    for step in range(1, max(steps) + 1):
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        if not kept:
            hook.rests.tensors.clear()
        if step in steps:
            yield max(float((w - w0).norm() / w0.norm()) for w, w0 in zip(matrices(model), start, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300, 1000, 3000])
    asked = parser.parse_args()
    print(f"{asked.size}, one block, bfloat16, learning rate 0, torch {torch.__version__}")
    print(f"{'steps':16s}" + "".join(f"{steps:>10d}" for steps in asked.steps))
    for name, method in METHODS.items():
        for kept in (True, False):
            print(f"{name + (', kept' if kept else ', lost'):16s}", end="", flush=True)
            for found in moved(asked.size, method, asked.steps, kept=kept):
                print(f"{found:10.1e}", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
