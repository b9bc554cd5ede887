"""Costs as the GaLore paper prints them."""

from lorank.optim.galore import state_elements
from lorank.papers.formulas import cola_parameters, dense_parameters, shape_of
from lorank.papers.table import Paper, PaperTable
from lorank.sizes import SIZES

SIZES_SHOWN = ("60m", "130m", "350m", "1b")


def elements(size: str) -> dict[str, tuple[int, int]]:
    """(weights, numbers of optimizer state) by method."""
    shape, rank = shape_of(size), SIZES[size].rank
    dense, low = dense_parameters(*shape), cola_parameters(*shape, rank)
    factors = shape.over_projections(lambda m, n: rank * (m + n))
    projected = shape.over_projections(lambda m, n: state_elements(m, n, rank))
    return {
        "full-rank": (dense, 2 * dense),
        "GaLore": (dense, projected + 2 * (low - factors)),
        "low-rank": (low, 2 * low),
        "LoRA": (dense + factors, 2 * low),
        "ReLoRA": (dense + factors, 2 * low),
    }


def weights_gib(row: str, size: str) -> float:
    return 2 * elements(size)[row][0] / 2**30


def states_gib(row: str, size: str) -> float:
    return 2 * elements(size)[row][1] / 2**30


def both_gib(row: str, size: str) -> float:
    return 2 * sum(elements(size)[row]) / 2**30


def one_sequence(row: str, column: str) -> float | None:
    """10^9 bytes of weights, gradients and states in bf16, with moments of a byte where 8-bit; the step needs nothing else."""
    weights, states = elements("1b")["full-rank"]
    galore = elements("1b")["GaLore"][1]
    shape = shape_of("1b")
    bases = shape.over_projections(lambda m, n: SIZES["1b"].rank * min(m, n))
    kept = {
        "AdamW": 2 * states,
        "Adafactor": 0,  # a row and a column for each matrix
        "8-bit Adam": states,
        "8-bit GaLore": galore - bases + 2 * bases,
    }[row]
    return (4 * weights + kept) / 1e9 if column == "all at once" else None


def seven_billion(row: str, column: str) -> float:
    shape, rank = shape_of("7b"), SIZES["7b"].rank
    dense, low = dense_parameters(*shape), cola_parameters(*shape, rank)
    bases = shape.over_projections(lambda m, n: rank * min(m, n))
    moments = shape.over_projections(lambda m, n: 2 * rank * max(m, n)) + 2 * (
        low - shape.over_projections(lambda m, n: rank * (m + n))
    )
    return {
        "8-bit Adam": 2 * dense + 2 * dense,
        "8-bit GaLore": 2 * dense + moments + 2 * bases,
        "gradients saved": 2 * dense,
        "states saved": 2 * dense - moments - 2 * bases,
        "states saved, %": 100 * (1 - (moments + 2 * bases) / (2 * dense)),
    }[row] / {"gradients saved": 1e9, "states saved": 1e9, "states saved, %": 1}.get(row, 2**30)


ADDED = "the sum of the table's own full-rank and low-rank weights, which counts embeddings, head and norms twice"
NEITHER = "between the counts in GiB and in 10^9 bytes"
DOUBLED = "twice the table's own low-rank weights"
SUM = "the sum of the two tables above as printed, within 0.01"
LAYERS = "we have no optimizer that updates layer by layer; with in_backward, galore keeps projected gradients until its step"
ADAPTED = ("LoRA", "ReLoRA")
PAPER = Paper(
    name="galore",
    title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    arxiv="2403.03507",
    tables=(
        PaperTable(
            title="Weights in bf16, G",
            columns=SIZES_SHOWN,
            rows={
                "full-rank": ("0.12", "0.25", "0.68", "2.60"),
                "low-rank": ("0.08", "0.18", "0.36", "1.19"),
                "LoRA": ("0.20", "0.44", "1.04", "3.79"),
                "ReLoRA": ("0.20", "0.44", "1.04", "3.79"),
            },
            ours=weights_gib,
            formula="2 bytes a weight, in GiB",
            source="the paper's table of memory, read in its text",
            strays={
                ("full-rank", "60m"): "0.116 in 10^9 bytes would round to it, where 130m and 350m are in GiB",
                (
                    "full-rank",
                    "1b",
                ): "1.3 B, the size's name, x 2 bytes in 10^9; by count 2.49 GiB or 2.68 x 10^9 bytes",
                ("low-rank", "350m"): NEITHER,
                ("low-rank", "1b"): NEITHER,
                **{(row, size): ADDED for row in ADAPTED for size in SIZES_SHOWN},
            },
        ),
        PaperTable(
            title="Optimizer states in bf16, G",
            columns=SIZES_SHOWN,
            rows={
                "full-rank": ("0.23", "0.51", "1.37", "5.20"),
                "GaLore": ("0.13", "0.28", "0.54", "1.78"),
                "low-rank": ("0.17", "0.37", "0.72", "2.38"),
                "LoRA": ("0.17", "0.37", "0.72", "2.38"),
                "ReLoRA": ("0.17", "0.37", "0.72", "2.38"),
            },
            ours=states_gib,
            formula="2 bytes for each of 2 N numbers; GaLore 2 r max(m, n) + r min(m, n) per matrix, in GiB",
            source="the paper's table of memory, read in its text",
            strays={
                ("full-rank", "60m"): "0.232 in 10^9 bytes would round to it, where 350m is in GiB",
                ("full-rank", "130m"): NEITHER,
                ("full-rank", "1b"): "twice the table's own weights",
                **{
                    ("GaLore", size): "neither with the basis nor without it (0.146, 0.288, 0.526, 1.61)"
                    for size in SIZES_SHOWN
                },
                **{(row, size): DOUBLED for row in ("low-rank", *ADAPTED) for size in ("130m", "350m", "1b")},
                **{(row, "60m"): "0.171 in 10^9 bytes would round to it" for row in ("low-rank", *ADAPTED)},
            },
        ),
        PaperTable(
            title="Weights and optimizer states in bf16, G",
            columns=SIZES_SHOWN,
            rows={
                "full-rank": ("0.36", "0.76", "2.06", "7.80"),
                "GaLore": ("0.24", "0.52", "1.22", "4.38"),
                "low-rank": ("0.26", "0.54", "1.08", "3.57"),
                "LoRA": ("0.36", "0.80", "1.76", "6.17"),
                "ReLoRA": ("0.36", "0.80", "1.76", "6.17"),
            },
            ours=both_gib,
            formula="the sum of the two tables above",
            source="the paper's table of perplexity, read in its text",
            strays={
                **{("full-rank", size): SUM for size in ("60m", "130m", "1b")},
                **{(row, size): SUM for row in ("GaLore", "low-rank", *ADAPTED) for size in SIZES_SHOWN},
            },
        ),
        PaperTable(
            title="Measured memory, 1B, one sequence of 256 tokens, GB",
            columns=("all at once", "by layer"),
            rows={
                "AdamW": ("13.60", "9.63"),
                "Adafactor": ("13.15", "10.32"),
                "8-bit Adam": ("9.54", "6.93"),
                "8-bit GaLore": ("7.95", "5.63"),
            },
            ours=one_sequence,
            formula="4 bytes for each weight and its gradient, 4, 0, 2 for its moments; GaLore's at r = 512, in 10^9 bytes",
            source="the paper's ablation, read in its text",
            strays={
                (
                    "AdamW",
                    "all at once",
                ): "an AdamW that computes all denominators at once holds 2.7 GB more, 13.4 in all",
                (
                    "Adafactor",
                    "all at once",
                ): "a first moment, which ours does not have, would be 2.7 GB more; the cause of the rest is not known",
                (
                    "8-bit Adam",
                    "all at once",
                ): "1.5 GB more than weights, gradients and moments; the cause is not known",
                (
                    "8-bit GaLore",
                    "all at once",
                ): "1.4 GB more than these, as above; with the temporary tensors of its step, lorank plan gives 8.0",
                **{(row, "by layer"): LAYERS for row in ("AdamW", "Adafactor", "8-bit Adam", "8-bit GaLore")},
            },
        ),
        PaperTable(
            title="7B, G",
            columns=("7b",),
            rows={
                "8-bit Adam": ("26",),
                "8-bit GaLore": ("18",),
                "gradients saved": ("13.5",),
                "states saved": ("9.6",),
                "states saved, %": ("65.5",),
            },
            ours=seven_billion,
            formula="weights in bf16 and 8-bit states in GiB, savings in 10^9 bytes; GaLore's basis in bf16, r = 1024",
            source="the paper's table of the 7B run, and its text on per-layer updates",
            strays={
                (
                    "states saved",
                    "7b",
                ): "9.7 without the bases; if 9.6 are 65.5 %, the whole is 14.7, more than two moments of a byte",
                ("states saved, %", "7b"): "65.1 with bases of a byte, 72.1 without them",
            },
        ),
    ),
    left_out="tokens/s; measured memory of the 7B run, whose updates are layer by layer",
)
