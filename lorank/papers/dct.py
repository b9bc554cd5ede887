"""Costs as the paper on DCT-AdamW and Trion prints them."""

from lorank.accounting import training_state_bytes
from lorank.optim import trion
from lorank.papers import Paper, PaperTable, shape_of

RANK = 256
SHAPES = {"350m": shape_of("350m"), "1.3b": shape_of("1b")}
"""The shape of the paper's 800M is not known to us."""


def above_muon(row: str, column: str) -> float | None:
    """In 10^9 bytes of fp32."""
    if row != "Trion" or column not in SHAPES:
        return None
    momentum = SHAPES[column].over_projections(lambda m, n: m * n)
    return 4 * (SHAPES[column].over_projections(lambda m, n: trion.state_elements(m, n, RANK)) - momentum) / 1e9


WHOLE_STATE = training_state_bytes(800_000_000, weights=0, gradients=0, moments=8) / 1e9
PAPER = Paper(
    name="dct",
    title="FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    arxiv="2505.17967",
    tables=(
        PaperTable(
            title="Measured memory above Muon's, GB",
            columns=("350m", "800m", "1.3b"),
            rows={"Trion": ("0.00", "0.00", "-0.02"), "Dion": ("3.17", "4.30", "4.94")},
            ours=above_muon,
            formula="4 bytes for each number of Trion's state beyond Muon's m n of a matrix, r = 256",
            source="a note on the paper: 42.42, 67.45, 63.62 (Trion), 42.42, 67.45, 63.64 (Muon), 45.59, 71.75, 68.58 (Dion)",
            strays={
                ("Trion", "1.3b"): "measured on 8 devices; 0.02 of 63.6 is within what an allocator varies",
                (
                    "Trion",
                    "800m",
                ): "the shape of its 800M is not known; in any Trion and Muon keep m n numbers for a matrix",
                ("Dion", "*"): "we have no Dion to count",
            },
        ),
        PaperTable(
            title="Measured memory below AdamW's, Llama 800M, GB",
            columns=("800m",),
            rows={"DCT-AdamW": ("15.90",), "LDAdamW": ("1.62",)},
            ours=lambda row, column: None,
            formula="none: neither the shape nor the rank is known",
            source="a note on the paper: 73.72 (AdamW), 57.82 (DCT-AdamW), 72.10 (LDAdamW)",
            strays={
                (
                    "DCT-AdamW",
                    "800m",
                ): f"AdamW's whole state is {WHOLE_STATE:.1f} in fp32, so that most of it is no optimizer state",
                ("LDAdamW", "800m"): "we have no LDAdamW to count",
            },
        ),
    ),
    left_out="times",
)
