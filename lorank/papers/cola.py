"""Costs as the CoLA paper prints them."""

from lorank.accounting import (
    block_training_flops,
    break_even_ratio,
    cola_parameters,
    dense_parameters,
    recompute_flops,
    training_state_bytes,
)
from lorank.methods.sltrain import model_values
from lorank.optim import galore
from lorank.papers import Paper, PaperTable, shape_of
from lorank.sizes import SIZES

SIZES_SHOWN = ("60m", "130m", "350m", "1b")


def parameters(row: str, size: str) -> float:
    shape, rank = shape_of(size), SIZES[size].rank
    cola = cola_parameters(*shape, rank)
    return {
        "full-rank": dense_parameters(*shape),
        "ReLoRA": dense_parameters(*shape),
        "GaLore": dense_parameters(*shape),
        "SLTrain": cola + model_values(shape.d, shape.d_ff, shape.layers, 0.03),
        "CoLA": cola,
    }[row] / 1e6


def state_gib(row: str, size: str) -> float:
    shape, rank = shape_of(size), SIZES[size].rank
    dense, cola = dense_parameters(*shape), cola_parameters(*shape, rank)
    factors = shape.over_projections(lambda m, n: rank * (m + n))
    outside = cola - factors
    # the basis, which GaLore keeps beside its moments, is not in the paper's column
    moments = shape.over_projections(lambda m, n: galore.state_elements(m, n, rank) - rank * min(m, n))
    return {
        "full-rank": training_state_bytes(dense),
        "ReLoRA": 2 * (dense + factors) + 6 * cola,
        "GaLore": 4 * dense + 2 * (moments + 2 * outside),
        "SLTrain": training_state_bytes(cola + model_values(shape.d, shape.d_ff, shape.layers, 0.03)),
        "CoLA": training_state_bytes(cola),
    }[row] / 2**30


def compute_ratio(row: str, size: str) -> float:
    shape, rank = shape_of(size), SIZES[size].rank
    blocks = (block_training_flops(method, shape.d, shape.d_ff, rank, 256) for method in ("cola", "dense"))  # type: ignore[arg-type]
    cola, dense = blocks
    return cola / dense


def recomputation(row: str, column: str) -> float:
    if row.startswith("break-even"):
        return break_even_ratio(1024, 2560)
    scheme = "cola-m" if "formula" in row else "cola-m authors"
    return recompute_flops("blocks", 2048, 512, 256) / recompute_flops(scheme, 2048, 512, 256)  # type: ignore[arg-type]


PAPER = Paper(
    name="cola",
    title="CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation",
    arxiv="2502.10940",
    tables=(
        PaperTable(
            title="Parameters, M",
            columns=SIZES_SHOWN,
            rows={
                "full-rank": ("58", "134", "368", "1339"),
                "ReLoRA": ("58", "134", "368", "1339"),
                "GaLore": ("58", "134", "368", "1339"),
                "SLTrain": ("44", "97", "194", "646"),
                "CoLA": ("43", "94", "185", "609"),
            },
            ours=parameters,
            formula="2 V d + L (...) + d with V = 32,000; ReLoRA after its merge",
            source="the paper's main table",
        ),
        PaperTable(
            title="Memory of weights, gradients and Adam's moments in bf16, GB",
            columns=SIZES_SHOWN,
            rows={
                "full-rank": ("0.43", "1.00", "2.74", "9.98"),
                "ReLoRA": ("0.37", "0.86", "1.94", "6.79"),
                "GaLore": ("0.36", "0.79", "1.90", "6.60"),
                "SLTrain": ("0.32", "0.72", "1.45", "4.81"),
                "CoLA": ("0.32", "0.70", "1.38", "4.54"),
            },
            ours=state_gib,
            formula="8 bytes a parameter, in GiB; neither GaLore's basis nor SLTrain's indices counted",
            source="the paper's main table, from memory",
        ),
        PaperTable(
            title="Training compute of CoLA, part of the dense model's",
            columns=("60m", "130m", "350m"),
            rows={"CoLA": ("0.4", "0.5", "0.4")},
            ours=compute_ratio,
            formula="(48 n d r + 12 n² d + 18 n r (d + d_ff)) / (24 n d² + 12 n² d + 18 n d d_ff), n = 256, a block",
            source="the paper's ablation of compute, from memory",
        ),
        PaperTable(
            title="Recomputation of CoLA-M, and the rank at which CoLA costs what dense does",
            columns=("n = 256",),
            rows={
                "less recomputation, times (formula)": ("4.6",),
                "less recomputation, times (authors' code)": ("4.6",),
                "break-even r/d at d_ff = 2.5 d": ("0.62",),
            },
            ours=recomputation,
            formula="(23 n d² + 4 n² d) / (18.5 n d r + 4 n² d) of the 1B shape, d = 2048, r = 512; r/d = (24 d + 18 d_ff) / "
            "(66 d + 18 d_ff)",
            source="the paper's sections on compute and on CoLA-M, from memory",
            strays={
                (
                    "less recomputation, times (authors' code)",
                    "n = 256",
                ): "the authors' code runs whole segments again, A's included: 37 n d r instead of 18.5 n d r"
            },
        ),
    ),
    left_out="memory and tokens/s measured on a 94 GB H100, the 7B column and inference: measured, not counted",
)
