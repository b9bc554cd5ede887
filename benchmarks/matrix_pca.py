"""Does each step of Matrix PCA keep more of a trained model at equal parameters? Held-out perplexity, nothing is trained again.

    python benchmarks/matrix_pca.py [--kept 0.75 0.5] [--out runs/matrix-pca]

First a dense Llama (8 blocks, d 64, four heads, none grouped) learns the embedded corpus for some minutes; a finished one is
kept. Then its attention is written with the named part of its parameters: atoms of all blocks, of two equal groups and of two
groups found by drift; half atoms and half residual, whitened or not, with and without groups; and, without atoms, the SVD
of each whitened weight (SVD-LLM, arXiv 2403.07378), what the paper compares with. Rank fills what parameters are left, so
that no row has more than its part; a group with as many atoms as blocks is exact and takes none of it. Drift and whitening
see 512 sequences of training text, 65,536 tokens.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lorank import fit_masa
from lorank.architectures import projection_type
from lorank.factors import nearest
from lorank.fit.pca import calibrate
from lorank.train.data import load_corpus
from lorank.train.evaluation import evaluate, text_for
from lorank.train.saved import load_model

SHAPE = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8}
CORPUS = {"vocab_size": 1024, "sequence_length": 128}


def train(out: Path, steps: int) -> Path:
    folder = out / f"dense-{steps}"
    if not (folder / "summary.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
        (out / "config.json").write_text(json.dumps({**SHAPE, **heads}))
        flags = {
            "model": out / "config.json",
            "steps": steps,
            "warmup-steps": 80,
            "batch-size": 8,
            "eval-every": 0,
            "save-every": 0,
            "out": folder,
        }
        flags |= {name.replace("_", "-"): value for name, value in CORPUS.items()}
        command = [sys.executable, "-m", "lorank", "pretrain", "--method", "dense"]
        command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ})
    return folder


def attention(model: Any) -> int:
    """Parameters of attention, shared or not; coefficients, less than two hundred, are not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if "attn" in name and "coefficients" not in name)


def compressed(dense: Any, budget: int, data: list[torch.Tensor], atoms: float, groups: Any, residual: str) -> Any:
    """Rewritten with at most `budget` parameters: at most a part `atoms` of the dense ones in atoms, and the largest residual
    that fits."""
    fields: dict[str, Any] = {"atoms": atoms, "groups": groups}
    if groups == "drift":
        fields["groups"] = [0, int(drifts_of(dense, data).argmax()) + 1]
    model = fit_masa(copy.deepcopy(dense), **fields)
    while attention(model) > atoms * attention(dense):  # a group has one atom at least
        fields["atoms"] -= 0.02
        model = fit_masa(copy.deepcopy(dense), **fields)
    if residual == "none":
        return model
    two = sum(
        3 * sum(projections(dense)[name].weight.shape)
        for name, layer in projections(model).items()
        if name.endswith(("q_proj", "o_proj")) and not exact(layer)
    )
    rank = 2 * ((budget - attention(model)) // two)  # rank 2 of query and output, 1 of key and value, costs `two`
    model = fit_masa(copy.deepcopy(dense), data=data, residual_rank=rank, **fields)
    if residual == "plain":
        unwhiten(model, dense)
    return model


def drifts_of(dense: Any, data: list[torch.Tensor]) -> torch.Tensor:
    return calibrate(dense, data, [*projections(dense)], inputs=False).drift


def exact(layer: Any) -> bool:
    """Whether a group has as many atoms as blocks, and so no residual."""
    return len(layer.dictionary.atoms) == len(layer.dictionary.coefficients.values)


def projections(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if projection_type(name)}


@torch.no_grad()
def unwhiten(model: Any, dense: Any) -> None:
    """The residuals of a rewritten model as if all directions of their inputs counted the same."""
    for name, layer in projections(model).items():
        weight = dense.get_submodule(name).weight
        B, A = nearest(weight - layer.dictionary(layer.depth), layer.A.out_features)
        layer.A.weight.copy_(A)
        layer.B.weight.copy_(B)


@torch.no_grad()
def svd(dense: Any, budget: int, data: list[torch.Tensor]) -> tuple[Any, int]:
    """The dense model with each weight replaced by its nearest of low rank on the data, and what its factors would hold."""
    model, used = copy.deepcopy(dense), 0
    R = calibrate(dense, data, [*projections(dense)], drift=False).whitening
    rank = budget // sum(sum(m.weight.shape) for m in projections(dense).values())
    for name, linear in projections(model).items():
        B, A = nearest(linear.weight, rank, R[name])
        linear.weight.copy_(B @ A)
        used += A.numel() + B.numel()
    return model, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", nargs="+", type=float, default=[0.75, 0.5])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=65_536, help="of held-out text")
    parser.add_argument("--out", type=Path, default=Path("runs/matrix-pca"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "there are no fewer")  # of groups of one block

    folder = train(options.out, options.steps)
    form = {"data": "embedded", "sequence_length": CORPUS["sequence_length"], "batch_size": 32}
    dense, tokenizer = load_model(str(folder))
    batches, _ = text_for(dense, tokenizer, max_tokens=options.tokens, **form)
    rows = load_corpus("embedded", **CORPUS).train[:512]["input_ids"]
    data = list(torch.tensor(rows).split(32))
    whole = attention(dense)
    drift = drifts_of(dense, data)

    def perplexity(model: Any) -> float:
        return evaluate(model, batches, max_tokens=options.tokens).perplexity

    tokens = options.steps * 8 * CORPUS["sequence_length"]
    print(f"fit_masa: 8 blocks, d 64, trained on {tokens:,} tokens; perplexity on {options.tokens:,} held-out tokens")
    print(f"drift into blocks 1 to 7, nats: {' '.join(f'{value:.3f}' for value in drift.tolist())}")
    print(f"{'':42} {'groups':>8} {'atoms':>6} {'r of q, k':>9} {'attention':>10} {'perplexity':>11}")
    print(f"{'dense':42} {'':8} {'':6} {'':>9} {whole:10,} {perplexity(dense):11.2f}", flush=True)
    for kept in options.kept:
        budget = round(kept * whole)
        print(f"at most {kept:.0%} of attention's parameters")
        for what, atoms, groups, residual in (
            ("atoms of all blocks", kept, 1, "none"),
            ("atoms of two equal groups", kept, 2, "none"),
            ("atoms of two groups by drift", kept, "drift", "none"),
            ("atoms of all blocks + residual, plain", kept / 2, 1, "plain"),
            ("atoms of all blocks + residual, whitened", kept / 2, 1, "whitened"),
            ("groups by drift + residual, whitened", kept / 2, "drift", "whitened"),
        ):
            chosen = (0, 4) if groups == 2 else groups
            model = compressed(dense, budget, data, atoms, chosen, residual)
            last = model.model.layers[-1].self_attn  # a first group of one block has no residual
            found = model.config.lorank["arguments"]["groups"]
            starts = "all" if found == 1 else ",".join(map(str, found))
            count = sum(len(d.atoms) for key, d in model.model.lorank_atoms.items() if "q_proj" in key)
            ranks = "" if last.q_proj.A is None else f"{last.q_proj.A.out_features}, {last.k_proj.A.out_features}"
            used = attention(model)
            print(f"{what:42} {starts:>8} {count:6} {ranks:>9} {used:10,} {perplexity(model):11.2f}", flush=True)
        model, used = svd(dense, budget, data)
        print(
            f"{'no atoms: whitened SVD of each weight':42} {'':8} {'':6} {'':>9} {used:10,} {perplexity(model):11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
