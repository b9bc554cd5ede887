"""A rank for every projection of every block, so that all together cost a given number of parameters.

Two factors of rank r hold r (d_in + d_out) weights. The ranks follow the effective ranks e of the projections' outputs,

    r_i = min(⌊c e_i⌋, cap_i)        c such that  Σ r_i (d_in + d_out)_i  is the budget

cap_i being the largest rank at which the factors are smaller than the dense matrix. What rounding leaves over goes, one
rank at a time, to the projections that lost most by it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Suggestion(NamedTuple):
    """Ranks that fit a budget."""

    ranks: dict[str, int]
    """By projection and depth, in the model's order."""
    table: dict[str, int]
    """The same as a recipe's rank: pattern -> rank, depths of equal rank together."""
    parameters: int
    """In the factors of all projections."""
    dense_parameters: int
    """In the dense matrices that they replace."""


def read_budget(text: str, dense_parameters: int) -> int:
    """A number of parameters, from one such as 10M or from a fraction of the dense ones such as 0.5.

    >>> read_budget("10M", 0), read_budget("0.5", 1000), read_budget("750_000", 0)
    (10000000, 500, 750000)
    """
    found = re.fullmatch(r"(\d[\d_]*\.?\d*|\.\d+)\s*([kMBG]?)", text.strip())
    if not found:
        raise ValueError(
            f"budget={text!r} is neither a number of parameters such as 10M nor a fraction of the dense ones such as 0.5"
        )
    number = float(found[1].replace("_", "")) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}[found[2]]
    return round(number * dense_parameters if number <= 1 and "." in found[1] and not found[2] else number)


def suggest_ranks(projections: Sequence[Mapping[str, Any]], budget: str) -> Suggestion:
    """Ranks in proportion to the effective ranks of the outputs.

    Args:
        projections: as in `Analysis.to_dict`.
        budget: see `read_budget`; of the weights in the factors, without embeddings, head, norms and biases.

    Raises:
        ValueError: a budget that is none, or that no ranks meet.
    """
    price = [one["d_in"] + one["d_out"] for one in projections]

    def cost(ranks: Sequence[float]) -> float:
        return sum(rank * each for rank, each in zip(ranks, price, strict=True))

    dense = sum(one["d_in"] * one["d_out"] for one in projections)
    cap = [
        max(1, math.ceil(one["d_in"] * one["d_out"] / cost) - 1) for one, cost in zip(projections, price, strict=True)
    ]
    most, least = int(cost(cap)), sum(price)
    wanted = read_budget(budget, dense)
    if not least <= wanted <= most:
        raise ValueError(
            f"budget={budget} is {wanted:,} parameters, and factors in place of the dense {dense:,} hold {least:,} (rank 1) to "
            f"{most:,} (break-even); choose between"
        )
    effective = [max(1, one["output"]["rank"]) for one in projections]

    def shares(scale: float) -> list[float]:
        return [min(max(1.0, scale * rank), top) for rank, top in zip(effective, cap, strict=True)]

    low, high = 0.0, float(max(cap))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(shares(middle)) <= wanted else (low, middle)
    exact = shares(low)
    ranks = [math.floor(rank) for rank in exact]
    left = wanted - int(cost(ranks))
    while True:
        fitting = [i for i in range(len(ranks)) if ranks[i] < cap[i] and price[i] <= left]
        if not fitting:
            break
        one = max(fitting, key=lambda i: exact[i] - ranks[i])
        ranks[one], left = ranks[one] + 1, left - price[one]
    names = {one["name"]: rank for one, rank in zip(projections, ranks, strict=True)}
    return Suggestion(names, _table(projections, ranks), wanted - left, dense)


def _table(projections: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> dict[str, int]:
    """Patterns that match these projections and no others, one for all depths of a projection that have the same rank."""
    depths: dict[tuple[str, int], list[int]] = {}
    for one, rank in zip(projections, ranks, strict=True):
        depths.setdefault((one["role"], rank), []).append(one["depth"])
    table = {}
    for (role, rank), those in depths.items():
        stack, _, inner = role.partition(".*.")
        listed = str(those[0]) if len(those) == 1 else f"({'|'.join(map(str, those))})"
        table[rf"^{re.escape(stack)}\.{listed}\.{re.escape(inner)}$"] = rank
    return table
