"""What a federated rule is: which factors are trained and sent, and how a server makes one state of many."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lorank.factors import Pair

Factors = Mapping[str, Pair]
"""Name of a layer -> s B [m, r] and A [r, n]. A client folds its scale s = α/r into B, because ranks and so scales may differ."""


class Reduced(NamedTuple):
    """What a server makes of a round."""

    factors: dict[str, Pair] | None
    """Those with which all clients begin the next round; None: they draw new ones (`begin`)."""
    merged: dict[str, Pair] | None = None
    """Pairs whose products everybody adds to the frozen weights; None: the weights stay."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A row of the table of rules."""

    name: str
    reduce: Callable[[Factors, Sequence[Factors], Sequence[float]], Reduced]
    """(factors before the round, factors of each client after it, weights of the clients) -> the next state."""
    trains: str = "BA"
    """Factors that a client trains and sends up."""
    sends: str = "BA"
    """Factors that the server sends down each round. Others are drawn from the seed, everywhere alike."""
    any_ranks: bool = False
    """Whether clients may have different ranks."""


def shares(weights: Sequence[float]) -> list[float]:
    """p_i = w_i / Σ w.

    Raises:
        ValueError: a weight is below 0, or their sum is not positive.
    """
    total = sum(weights)
    if not total > 0 or min(weights) < 0:
        raise ValueError(f"weights must be at least 0 and have a positive sum, got {list(weights)}")
    return [weight / total for weight in weights]


def begin(shapes: Mapping[str, tuple[int, int]], rank: int, generator: torch.Generator) -> dict[str, Pair]:
    """Factors of layers [m, n] as LoRA begins: B zero, and A Kaiming-uniform. The first r rows of A are the A of rank r."""
    drawn = {}
    for name, (m, n) in sorted(shapes.items()):
        A = torch.empty(rank, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)
        drawn[name] = (torch.zeros(m, rank), A)
    return drawn


def shortened(factors: Factors, rank: int) -> dict[str, Pair]:
    """The first ranks of each pair."""
    return {name: (B[:, :rank], A[:rank]) for name, (B, A) in factors.items()}
