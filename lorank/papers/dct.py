"""Costs as the paper on DCT-AdamW and Trion prints them."""

from lorank.optim import trion
from lorank.papers.formulas import shape_of
from lorank.papers.table import Paper, PaperTable

RANK = 256
SHAPES = {"350m": shape_of("350m"), "1.3b": shape_of("1b")}
"""We do not know the shape of the paper's 800M."""


def above_muon(row: str, column: str) -> float | None:
    """10^9 bytes in fp32."""
    if row != "Trion" or column not in SHAPES:
        return None
    momentum = SHAPES[column].over_projections(lambda m, n: m * n)
    return 4 * (SHAPES[column].over_projections(lambda m, n: trion.state_elements(m, n, RANK)) - momentum) / 1e9


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
                ("Trion", "1.3b"): "measured on 8 devices; an allocator varies by more than 0.02 of 63.6",
                (
                    "Trion",
                    "800m",
                ): "the shape of its 800M is not known; at any shape Trion and Muon keep m n numbers for a matrix",
                ("Dion", "*"): "we have no Dion to count",
            },
        ),
    ),
    left_out="times; measured memory below AdamW's at 800M, whose shape and rank are not known",
)
