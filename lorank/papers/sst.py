"""Costs as the SST paper prints them."""

from lorank.methods.sst import trained_numbers
from lorank.papers.formulas import dense_parameters, shape_of
from lorank.papers.table import Paper, PaperTable


def llama(row: str, column: str) -> float:
    shape = shape_of("1b")
    outside = 2 * shape.vocab_size * shape.d + shape.layers * 2 * shape.d + shape.d
    trained = outside + shape.over_projections(lambda m, n: trained_numbers(n, m, 128))
    return 100 * trained / dense_parameters(*shape)


PAPER = Paper(
    name="sst",
    title="Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks",
    arxiv="2405.15481",
    tables=(
        PaperTable(
            title="Trained numbers, % of the dense parameters",
            columns=("llama 1.3b, r 128",),
            rows={"SST": ("18.7",)},
            ours=llama,
            formula="r (d_in + d_out) + min(d_in, d_out) per matrix, and embeddings, head and norms",
            source="a summary of the paper",
        ),
    ),
    left_out="measured memory, whose batch and precision are not known",
)
