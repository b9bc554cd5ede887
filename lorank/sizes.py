"""Model shapes by name: the Llama family on which CoLA and the methods next to it publish their tables."""

from typing import NamedTuple

from lorank.fields import unknown


class Size(NamedTuple):
    """Shape of a Llama and the rank that CoLA, or a plain factorisation, uses in it."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    rank: int


SIZES = {
    "tiny": Size(256, 688, 2, 4, 88),  # ours: the demo's, 1.6 M parameters in its dense blocks
    "20m": Size(256, 688, 4, 4, 64),  # ours: 19.5 M with a vocabulary of 32,000
    "60m": Size(512, 1376, 8, 8, 128),
    "130m": Size(768, 2048, 12, 12, 256),
    "250m": Size(768, 2560, 24, 16, 192),  # arXiv 2307.05695 (ReLoRA); the rank is ours, a quarter of the width
    "350m": Size(1024, 2736, 24, 16, 256),
    "1b": Size(2048, 5461, 24, 32, 512),
    "7b": Size(4096, 11008, 32, 32, 1024),
}
"""If nothing else is said, those of arXiv 2502.10940, with the shapes of the GaLore and SLTrain papers."""


def find_size(name: str) -> Size:
    """The shape of that name; ValueError that lists the known ones if there is none."""
    if name in SIZES:
        return SIZES[name]
    raise ValueError(unknown("size", name, list(SIZES)))
