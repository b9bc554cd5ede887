"""What do int8 and int4 cost a trained model? Perplexity on the text that a run held out, dense against CoLA, by torchao on a CPU.

    pip install torchao==0.18.0
    lorank demo --out runs/demo
    python benchmarks/quantised.py runs/demo/dense-muon runs/demo/cola-muon

Weights only, rounded by torchao to 8 bits, a scale for each row, or to 4 bits, a scale for 32 entries of a row (16 or 8 where 32 do not
divide it). All linear layers but the head are rounded. Embeddings and the head stay fp32, so bytes are those of the blocks.
Kept in results/quantised.json.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorank.train.evaluation import evaluate, text_for, with_length
from lorank.train.saved import load_model
from lorank.train.text import text_of

FILE = Path(__file__).with_name("results") / "quantised.json"
GROUPS = (32, 16, 8)


def in_group(size: int | None, layer: nn.Module, name: str) -> bool:
    """Whether this many entries, and no more, share a scale in a layer of the blocks; None: any layer of them."""
    if not isinstance(layer, nn.Linear) or "lm_head" in name:
        return False
    return size is None or next((g for g in GROUPS if layer.in_features % g == 0), None) == size


def rounded(model: Any, bits: int | None) -> int:
    """Round the blocks of a model, in place. Returns their bytes: packed numbers, and scales in fp32."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    layers = [layer for name, layer in model.named_modules() if in_group(None, layer, name)]
    many = sum(layer.weight.numel() for layer in layers)
    if bits is None:
        return 4 * many
    if bits == 8:
        quantize_(model, Int8WeightOnlyConfig(), partial(in_group, None))
        return many + 4 * sum(layer.out_features for layer in layers)
    scales = 0
    for size in GROUPS:
        scales += sum(one.weight.numel() // size for one in layers if in_group(size, one, ""))
        quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(size)), partial(in_group, size))
    return many // 2 + 4 * scales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--tokens", type=int, default=100_000)
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    for run in asked.runs:
        for bits in (None, 8, 4):
            model, tokenizer = load_model(run)
            size = rounded(model, bits)
            batches, _ = text_for(model, tokenizer, with_length(text_of(run), model), max_tokens=asked.tokens)
            perplexity = evaluate(model, batches, max_tokens=asked.tokens).perplexity
            one = {"perplexity": round(perplexity, 2), "bytes of the blocks": size}
            found.setdefault(Path(run).name, {})["fp32" if bits is None else f"int{bits}"] = one
            print(Path(run).name, bits or "fp32", one, flush=True)
    FILE.write_text(json.dumps({"tokens": asked.tokens, "torch": torch.__version__, "runs": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
