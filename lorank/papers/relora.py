"""Costs as the ReLoRA paper prints them."""

from lorank.papers.formulas import cola_parameters, shape_of
from lorank.papers.table import Paper, PaperTable

SHAPES = {
    **{size: shape_of(size) for size in ("60m", "130m", "250m", "350m")},
    "1.3b": shape_of("1b"),
}


def trainable(row: str, size: str) -> float:
    return cola_parameters(*SHAPES[size], 128) / 1e6  # as many factors next to W as CoLA has in its place


PAPER = Paper(
    name="relora",
    title="ReLoRA: High-Rank Training Through Low-Rank Updates",
    arxiv="2307.05695",
    tables=(
        PaperTable(
            title="Trainable parameters, M",
            columns=tuple(SHAPES),
            rows={"ReLoRA": ("43", "72", "99", "125", "250")},
            ours=trainable,
            formula="2 V d + L (8 d r + 3 r (d + d_ff) + 2 d) + d, r = 128",
            source="the paper's table of models (unconfirmed; the formula gives every figure)",
        ),
    ),
    left_out="up to 5.5 GB less memory per GPU (abstract): measured in a setting that is not known",
)
