"""Costs as the SwitchLoRA paper prints them."""

from lorank.papers.formulas import cola_parameters, dense_parameters, shape_of
from lorank.papers.table import Paper, PaperTable


def percent(row: str, column: str) -> float | None:
    size, rank = {"350m, r 256": ("350m", 256), "1.3b, r 512": ("1b", 512)}[column]
    shape = shape_of(size)
    trained = 100 * cola_parameters(*shape, rank) / dense_parameters(*shape)
    return {"trainable, at least": trained, "less communication": 100 - trained, "less memory": None}[row]


PAPER = Paper(
    name="switchlora",
    title="SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information",
    arxiv="2406.06564",
    tables=(
        PaperTable(
            title="Fraction of full-rank training, %",
            columns=("350m, r 256", "1.3b, r 512"),
            rows={
                "trainable, at least": ("50", "50"),
                "less communication": (None, "54"),
                "less memory": (None, "13"),
            },
            ours=percent,
            formula="gradients of embeddings, norms and factors over those of all weights; candidates are neither trained nor sent",
            source='the abstract; "50 to 60 %" trainable as a summary quotes it',
            strays={
                (
                    "trainable, at least",
                    "1.3b, r 512",
                ): "46 % by count, which agrees with the 54 % less communication",
                ("less memory", "1.3b, r 512"): "measured; its batch is not known",
            },
        ),
    ),
)
