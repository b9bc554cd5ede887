"""Costs as the SwitchLoRA paper prints them."""

from lorank.accounting import cola_parameters, dense_parameters
from lorank.papers import Paper, PaperTable, shape_of


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
            title="Part of full-rank training, %",
            columns=("350m, r 256", "1.3b, r 512"),
            rows={
                "trainable, at least": ("50", "50"),
                "less communication": (None, "54"),
                "less memory": (None, "13"),
            },
            ours=percent,
            formula="gradients of embeddings, norms and factors over all; candidates are neither trained nor sent",
            source='the abstract; "50 to 60 %" trainable as a summary quotes it',
            strays={
                (
                    "trainable, at least",
                    "1.3b, r 512",
                ): "46 % by count, which is what the 54 % less communication say too",
                ("less memory", "1.3b, r 512"): "measured; its batch is not known",
            },
        ),
    ),
)
