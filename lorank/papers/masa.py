"""Costs as the MASA paper prints them."""

import functools
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lorank.accounting import measure_flops
from lorank.conversion import convert
from lorank.methods.masa import MASA
from lorank.papers.formulas import VOCABULARY, coefficients
from lorank.papers.table import Paper, PaperTable

SHAPES = {"s": (768, 12), "m": (1024, 24), "l": (1536, 24)}
"""(d, L), inferred from the published totals: tied embeddings, MLPs of width 4 d without a gate."""
KV_HEADS = {"s": 1 / 6, "m": 1 / 8, "l": 1 / 6}
"""Key-value heads per query head in the paper's GQA rows, inferred from its compression."""


def compression(blocks: int, atoms: int, shared: int) -> float:
    """Fraction of attention's parameters saved when `shared` of its four projections have atoms; C is not counted.

    >>> compression(12, 4, 3)
    0.5
    """
    return shared / 4 * (1 - atoms / blocks)


def parameters(row: str, name: str) -> float:
    d, blocks = SHAPES[name]
    attention = 4 * d * d * blocks
    return {
        "model": VOCABULARY * d + 12 * d * d * blocks,
        "attention, dense": attention,
        "attention, MASA-QKVO": attention * (1 - compression(blocks, blocks // 3, 4)),
    }[row] / 1e6


def attention_percent(row: str, name: str) -> float:
    _, blocks = SHAPES[name]
    if row == "GQA":
        return 100 * (1 - KV_HEADS[name]) / 2
    return 100 * compression(blocks, blocks // 3, {"MASA-QKV": 3, "MASA-QKVO": 4}[row])


def by_atoms(row: str, atoms: str) -> float:
    return 100 * compression(12, int(atoms.removeprefix("S = ")), {"MASA-QKV": 3, "MASA-QKVO": 4}[row])


def vision(row: str, column: str) -> float:
    d, blocks = (int(part) for part in column.split(" x "))
    attention = 4 * d * d * blocks
    return {
        "fewer parameters, M": attention * compression(blocks, 4, 4) / 1e6,
        "parameters, vanilla, M": 12 * d * d * blocks / 1e6,
    }[row]


BLOCKS = 3
FORWARD: dict[str, Callable[..., float]] = {  # of d, d_ff, k, n; the last two belong to MLP and head
    "n² d": lambda d, f, k, n: n * n * d,
    "n d²": lambda d, f, k, n: n * d * d,
    "k d²": lambda d, f, k, n: k * d * d,
    "n d d_ff": lambda d, f, k, n: n * d * f,
    "n d": lambda d, f, k, n: n * d,
}


@functools.cache
def _forward(row: str) -> list[float]:
    """Coefficients of a block, counted on models."""

    def block(d: int, f: int, k: int, n: int) -> float:
        config = LlamaConfig(
            vocab_size=8, hidden_size=d, intermediate_size=f, num_attention_heads=2, num_hidden_layers=BLOCKS
        )
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        if row.startswith("MASA"):
            model = convert(model, MASA(atoms=k, variant=row.removeprefix("MASA-").lower(), coefficients="table"))  # type: ignore[arg-type]
        return measure_flops(model, sequence_length=n).forward / BLOCKS

    points = [(8, 16, 1, 8), (16, 16, 1, 8), (8, 24, 1, 8), (8, 16, 2, 8), (8, 16, 1, 16)]
    return coefficients(block, [*FORWARD.values()], points)


def attention_flops(row: str, column: str) -> float:
    return _forward(row)[list(FORWARD).index(column)]


WIDE_MLP = "blocks of 12 d² hold more; half of that, 6 d², would fit: MLPs as wide as the model"
PAPER = Paper(
    name="masa",
    title="Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning",
    arxiv="2508.04581",
    tables=(
        PaperTable(
            title="Parameters, M",
            columns=("s", "m", "l"),
            rows={
                "model": ("110", "335", "729"),
                "attention, dense": (None, None, "226.5"),
                "attention, MASA-QKVO": (None, None, "75"),
            },
            ours=parameters,
            formula="32,000 d + 12 d² L; attention 4 d² L, of which a third remains",
            source="the paper's text; the shapes are our inference from these figures",
        ),
        PaperTable(
            title="Compression of attention, %",
            columns=("s", "m", "l"),
            rows={
                "GQA": ("41.7", "43.8", "41.7"),
                "MASA-QKV": ("50", "50", "50"),
                "MASA-QKVO": ("66.7", "66.7", "66.7"),
            },
            ours=attention_percent,
            formula="shared / 4 (1 - S / L), S = L / 3; GQA (1 - g / H) / 2",
            source="the paper's main table, read in its text",
        ),
        PaperTable(
            title="The same by number of atoms, model s, %",
            columns=("S = 2", "S = 4", "S = 6", "S = 8"),
            rows={"MASA-QKV": ("62.5", "50", "37.5", "25"), "MASA-QKVO": ("83.3", "66.7", "50", "33.3")},
            ours=by_atoms,
            formula="shared / 4 (1 - S / L), L = 12",
            source="the paper's ablation, read in its text",
        ),
        PaperTable(
            title="Forward FLOPs of a block's attention, coefficients, k atoms",
            columns=("n² d", "n d²", "k d²"),
            rows={"dense": ("4", "8", None), "MASA-QKVO": ("4", "8", "8")},
            ours=attention_flops,
            formula="counted on our models: 2 FLOPs for each of 4 d² weights and token, of 2 n² d scores and values, and of k d² per "
            "weight, which is built once per call",
            source="the paper's text",
        ),
        PaperTable(
            title="Vision transformers by width x blocks, S = 4",
            columns=("64 x 12", "256 x 12", "256 x 24"),
            rows={
                "parameters, vanilla, M": ("0.600", "4.770", "9.520"),
                "fewer parameters, M": ("0.272", "0.466", "2.044"),
            },
            ours=vision,
            formula="blocks of 12 d², without patches and head; 4 d² (L - S) of them are saved",
            source="read off the paper's chart, the difference of two bars; patches and head are not known",
            strays={
                (
                    "parameters, vanilla, M",
                    "64 x 12",
                ): "patches, positions and head, some 0.01 M, are not in the formula",
                ("parameters, vanilla, M", "256 x 12"): WIDE_MLP,
                ("parameters, vanilla, M", "256 x 24"): WIDE_MLP,
                ("fewer parameters, M", "64 x 12"): "attention has only 0.197 M in all",
                (
                    "fewer parameters, M",
                    "256 x 12",
                ): "less than what four atoms for twelve blocks save",
                ("fewer parameters, M", "256 x 24"): "less than what four atoms for 24 blocks save",
            },
        ),
    ),
    left_out="tokens/s",
)
