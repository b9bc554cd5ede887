"""Costs as the Fira paper prints them."""

from lorank.optim import fira, galore
from lorank.papers.formulas import shape_of, training_state_bytes
from lorank.papers.galore import elements
from lorank.papers.table import Paper, PaperTable
from lorank.sizes import SIZES

SIZES_SHOWN = ("60m", "130m", "350m", "1b")


def memory_gib(row: str, size: str) -> float:
    if row == "full-rank":
        return training_state_bytes(elements(size)["full-rank"][0]) / 2**30
    weights, states = elements(size)["GaLore" if row == "Fira" else row]
    if row == "Fira":
        shape, rank = shape_of(size), SIZES[size].rank
        states += shape.over_projections(
            lambda m, n: fira.state_elements(m, n, rank) - galore.state_elements(m, n, rank)
        )
    trained = states // 2 if row in ("LoRA", "ReLoRA") else weights
    return 2 * (weights + trained + states) / 2**30


SUM = "the GaLore paper's figure plus its weights once more for the gradients, as printed there"
TWICE = "as above; GaLore's weights for this row count embeddings, head and norms twice"
PAPER = Paper(
    name="fira",
    title="Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
    arxiv="2410.01623",
    tables=(
        PaperTable(
            title="Weights, gradients and optimizer states in bf16, G",
            columns=SIZES_SHOWN,
            rows={
                "full-rank": ("0.48", "1.01", "2.74", "10.40"),
                "Fira": ("0.36", "0.77", "1.90", "6.98"),
                "GaLore": ("0.36", "0.77", "1.90", "6.98"),
                "LoRA": ("0.44", "0.99", "2.12", "7.36"),
                "ReLoRA": ("0.44", "0.99", "2.12", "7.36"),
            },
            ours=memory_gib,
            formula="2 bytes a number, in GiB; Fira keeps one number more per matrix than GaLore",
            source="the paper's table of perplexity, read in its text",
            strays={
                **{("full-rank", size): SUM for size in ("60m", "130m", "1b")},
                **{(row, size): SUM for row in ("Fira", "GaLore") for size in ("130m", "350m", "1b")},
                **{(row, size): TWICE for row in ("LoRA", "ReLoRA") for size in SIZES_SHOWN},
            },
        ),
    ),
    left_out="throughput relative to full-rank training; measured memory, whose micro-batch is not known",
)
