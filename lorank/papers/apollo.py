"""Costs as the APOLLO paper prints them. Its columns follow two conventions, and a third is the mean of both."""

from lorank.optim.apollo import state_elements
from lorank.papers.formulas import dense_parameters, shape_of
from lorank.papers.table import Paper, PaperTable

SIZES_SHOWN = ("60m", "130m", "350m", "1b")


def numbers(size: str, rank: int, *, all_moments: bool) -> int:
    """Weights and states with sketches of `rank` rows; with `all_moments` also Adam's two of embeddings, head and norms."""
    shape = shape_of(size)
    weights = dense_parameters(*shape)
    outside = weights - shape.over_projections(lambda m, n: m * n)
    sketches = shape.over_projections(lambda m, n: state_elements(m, n, rank))
    return weights + sketches + (2 * outside if all_moments else 0)


def memory_gib(row: str, size: str) -> float:
    found = {
        "AdamW": 3.0 * dense_parameters(*shape_of(size)),
        "APOLLO, r = d/4": numbers(size, shape_of(size).d // 4, all_moments=True),
        "APOLLO-Mini": numbers(size, 1, all_moments=False),
    }
    found["APOLLO, half rank"] = (found["APOLLO, r = d/4"] + found["APOLLO-Mini"]) / 2
    return 2 * found[row] / 2**30


WEIGHTS = "the GaLore paper's figure for the full-rank weights, from which this one starts, does not follow either"
GALORE = "the GaLore paper's figure for GaLore"
PAPER = Paper(
    name="apollo",
    title="APOLLO: SGD-like Memory, AdamW-level Performance",
    arxiv="2412.05270",
    tables=(
        PaperTable(
            title="Weights and optimizer states in bf16, G",
            columns=SIZES_SHOWN,
            rows={
                "AdamW": ("0.36", "0.76", "2.06", "7.80"),
                "APOLLO, r = d/4": ("0.24", "0.52", "1.22", "4.38"),
                "APOLLO, half rank": ("0.18", "0.39", "0.95", "3.49"),
                "APOLLO-Mini": ("0.12", "0.25", "0.69", "2.60"),
            },
            ours=memory_gib,
            formula="2 bytes a number, in GiB; Mini without Adam's moments of embeddings, head and norms, r = d/4 with them, "
            "half rank the mean of the two",
            source="the paper's table of perplexity, read in its text",
            strays={
                **{("AdamW", size): WEIGHTS for size in ("60m", "130m", "1b")},
                **{("APOLLO, r = d/4", size): GALORE for size in ("60m", "1b")},
                ("APOLLO, half rank", "1b"): "the mean of the figures above and below",
                **{("APOLLO-Mini", size): WEIGHTS for size in ("60m", "1b")},
            },
        ),
    ),
    left_out="times of a step; memory at 7B",
)
