"""Costs as the SLTrain paper prints them."""

from lorank.methods.sltrain import model_values
from lorank.optim import galore
from lorank.papers.formulas import cola_parameters, dense_parameters, shape_of
from lorank.papers.table import Paper, PaperTable
from lorank.sizes import SIZES

SIZES_SHOWN = ("60m", "130m", "350m", "1b")


def parameters(row: str, size: str) -> float:
    shape, rank = shape_of(size), SIZES[size].rank
    factors = cola_parameters(*shape, rank)  # as many as CoLA's
    return {
        "full-rank": dense_parameters(*shape),
        "low-rank BA": factors,
        "ReLoRA": dense_parameters(*shape),
        "GaLore": dense_parameters(*shape),
        "SLTrain": factors + model_values(shape.d, shape.d_ff, shape.layers, 0.03),
    }[row] / 1e6


def memory_gb(row: str, size: str) -> float:
    shape, rank = shape_of(size), SIZES[size].rank
    dense, low = dense_parameters(*shape), cola_parameters(*shape, rank)
    factors = shape.over_projections(lambda m, n: rank * (m + n))
    values = model_values(shape.d, shape.d_ff, shape.layers, 0.03)
    state = shape.over_projections(lambda m, n: galore.state_elements(m, n, rank)) + 2 * (low - factors)
    return {
        "full-rank": 6 * dense,
        "low-rank BA": 6 * low,
        "ReLoRA": 2 * (dense + factors) + 4 * low,
        "GaLore": 2 * dense + 2 * state,
        "SLTrain": 6 * (low + values) + 8 * values,
    }[row] / 1e9


PAPER = Paper(
    name="sltrain",
    title="SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
    arxiv="2406.02214",
    tables=(
        PaperTable(
            title="Parameters, M",
            columns=SIZES_SHOWN,
            rows={
                "full-rank": ("58", "134", "368", "1339"),
                "low-rank BA": ("43", "94", "185", "609"),
                "ReLoRA": ("58", "134", "368", "1339"),
                "GaLore": ("58", "134", "368", "1339"),
                "SLTrain": ("44", "97", "194", "646"),
            },
            ours=parameters,
            formula="factors of rank r and ⌊0.03 d_in d_out⌋ entries per matrix; ReLoRA after its merge",
            source="the paper's main table (unconfirmed; the formula gives every figure)",
        ),
        PaperTable(
            title="Memory of weights and Adam's moments in bf16, GB",
            columns=SIZES_SHOWN,
            rows={
                "full-rank": ("0.35", "0.81", "2.21", "8.04"),
                "low-rank BA": ("0.24", "0.57", "1.11", "3.66"),
                "ReLoRA": ("0.36", "0.84", "1.85", "6.34"),
                "GaLore": ("0.28", "0.61", "1.59", "4.76"),
                "SLTrain": ("0.26", "0.60", "1.24", "4.16"),
            },
            ours=memory_gb,
            formula="6 bytes a parameter, in 10^9 bytes, 8 more for each index of SLTrain; GaLore's basis counted",
            source="1b: a figure of the authors' repository, with SLTrain near 4.08 instead of 4.16; the rest: the paper's "
            "main table (unconfirmed)",
            strays={
                ("low-rank BA", "60m"): "6 bytes for each of 42.8 M parameters are 0.257",
                (
                    "ReLoRA",
                    "*",
                ): "two bytes for each frozen weight and six for each trained one are less; what else was counted is not known",
                ("GaLore", "350m"): "the same formula gives the other three sizes; misprint or another rank",
            },
        ),
    ),
    left_out="tokens/s; memory measured on an A100, where the batch is not known and 8-bit methods update layer by layer",
)
