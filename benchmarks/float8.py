"""Which projections torchao's float8 recipes take, of dense models and of CoLA, and whether they train; no speed is measured.

    pip install --no-deps torchao==0.18.0
    python benchmarks/float8.py

torchao leaves out layers that are too small to be faster on an H100. The first table has the share of the blocks' multiplications in the layers
that its automatic filter takes; "grouped" counts q, k and v as one product with A, and gate and up as another. The second trains a small model
in which every layer of the blocks is float8, by torchao's emulation on a CPU, next to the same model in single precision.
"""

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchao import __version__
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear_utils import _auto_filter_for_recipe
from transformers import LlamaForCausalLM

import lorank
from lorank.architectures import llama_config
from lorank.sizes import SIZES

RECIPES = ("tensorwise", "rowwise")
GROUPS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
STEPS, LAST = 200, 20


def model_of(size: str, method: str, device: str, layers: int | None = None) -> Any:
    config = llama_config(size)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device(device):
        model = LlamaForCausalLM(config)
        return model if method == "dense" else lorank.convert(model, lorank.CoLA(**lorank.CoLA.published[size]))


def layers_of(block: nn.Module, grouped: bool) -> Iterator[tuple[str, nn.Linear]]:
    """The products of a block."""
    for name, layer in block.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        group = next((g for g in GROUPS if name.split(".")[-2] in g and name.endswith(".A")), None) if grouped else None
        if group is None:
            yield name, layer
        elif f"{min(group)}.A" in name:  # one for all
            with torch.device("meta"):
                yield name, nn.Linear(layer.in_features, len(group) * layer.out_features, bias=False)


def share(block: nn.Module, recipe: str, grouped: bool) -> float:
    takes, found = _auto_filter_for_recipe(recipe, []), [0, 0]
    for name, layer in layers_of(block, grouped):
        found[takes(layer, name)] += layer.weight.numel()
    return found[1] / sum(found)


def main() -> None:
    print(
        f"torchao {__version__}, torch {torch.__version__}\n\nPercent of a block's multiplications that the automatic filter takes"
    )
    kinds = {"dense": ("dense", False), "CoLA": ("cola", False), "CoLA, grouped": ("cola", True)}
    print(f"{'size':8}" + "".join(f"{f'{name}, {recipe}':>26}" for recipe in RECIPES for name in kinds))
    for size in SIZES:
        if size not in lorank.CoLA.published:
            continue
        cells = []
        for recipe in RECIPES:
            for method, grouped in kinds.values():
                block = model_of(size, method, "meta", layers=1).model.layers[0]
                cells.append(f"{100 * share(block, recipe, grouped):26.0f}")
        print(f"{size:8}" + "".join(cells))

    print(f"\nLoss of a CoLA of the size tiny on random bytes that repeat, {STEPS} steps of Adam")
    for kind in ("single precision", "float8"):
        torch.manual_seed(0)
        config = llama_config("tiny")
        config.vocab_size = 256
        model: Any = lorank.convert(LlamaForCausalLM(config), lorank.CoLA(rank=96))
        if kind == "float8":
            convert_to_float8_training(
                model,
                module_filter_fn=lambda layer, name: isinstance(layer, nn.Linear) and name.startswith("model.layers."),
                config=Float8LinearConfig(emulate=True),
            )
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses = []
        for step in range(STEPS):
            ids = torch.randint(256, (8, 16), generator=torch.Generator().manual_seed(step)).repeat(1, 4)
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"{kind:18} at first {losses[0]:.3f}, mean of the last {LAST} {statistics.fmean(losses[-LAST:]):.3f}")


if __name__ == "__main__":
    main()
