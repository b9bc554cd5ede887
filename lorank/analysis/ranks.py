"""Ranks for every projection of every block that together fit a budget of parameters and lose little.

Two factors of rank r hold r (d_in + d_out) weights. A linear map of rank r loses at least this fraction of the energy of
a projection's outputs Y, whose singular values are σ_1 ≥ σ_2 ≥ ...:

    e(r) = Σ_{k > r} σ_k² / Σ_k σ_k²

We minimise the mean of e_i(r_i) over all projections at Σ r_i (d_in + d_out)_i ≤ budget and 1 ≤ r_i ≤ cap_i, the largest
rank at which the factors are smaller than the dense matrix. Because every e_i is convex, the greedy choice (one rank at a
time, best saving per parameter) is optimal up to the last rank: the mean is within one rank's gain of the least. If a
uniform rank happens to lose less, which is possible for a few small matrices, we use that.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Suggestion(NamedTuple):
    """Ranks that fit a budget."""

    ranks: dict[str, int]
    """By projection and depth, in the model's order."""
    table: dict[str, int]
    """The same as a recipe's rank: pattern -> rank, with depths of equal rank together."""
    parameters: int
    """In the factors of all projections."""
    dense_parameters: int
    """In the dense matrices that they replace."""
    lost: dict[str, float]
    """Fraction of the outputs' energy that these ranks lose: the "mean" over projections, and the "worst" one."""
    uniform_rank: int
    """The uniform rank at the same cost; some projections have one more."""
    uniform_lost: dict[str, float]
    """What the uniform rank loses."""


def read_budget(text: str, dense_parameters: int) -> int:
    """A number of parameters, from a number such as 10M or a fraction of the dense parameters such as 0.5.

    >>> read_budget("10M", 0), read_budget("0.5", 1000), read_budget("750_000", 0)
    (10000000, 500, 750000)
    """
    found = re.fullmatch(r"(\d[\d_]*\.?\d*|\.\d+)\s*([kMBG]?)", text.strip())
    if not found:
        raise ValueError(
            f"budget must be a number of parameters such as 10M or a fraction of the dense ones such as 0.5, got {text!r}"
        )
    number = float(found[1].replace("_", "")) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}[found[2]]
    return round(number * dense_parameters if number <= 1 and "." in found[1] and not found[2] else number)


def check_budget(budget: str, shapes: Iterable[tuple[int, int]]) -> int:
    """A budget as a number of parameters; ValueError if no ranks of matrices (d_in, d_out) fit it."""
    shapes = list(shapes)
    dense = sum(d_in * d_out for d_in, d_out in shapes)
    least = sum(d_in + d_out for d_in, d_out in shapes)
    most = sum(_cap(*shape) * sum(shape) for shape in shapes)
    wanted = read_budget(budget, dense)
    if not least <= wanted <= most:
        raise ValueError(
            f"budget must be between {least:,} parameters (rank 1) and {most:,} (break-even) to replace the dense {dense:,}, "
            f"got {budget} ({wanted:,})"
        )
    return wanted


def _cap(d_in: int, d_out: int) -> int:
    return max(1, math.ceil(d_in * d_out / (d_in + d_out)) - 1)


def suggest_ranks(
    projections: Sequence[Mapping[str, Any]], budget: str, *, called: Callable[[str], str] = lambda name: name
) -> Suggestion:
    """Ranks that fit a budget, chosen one at a time where they save the most of the outputs' energy per parameter.

    Args:
        projections: as in `Analysis.to_dict`.
        budget: see `read_budget`; weights in the factors, without embeddings, head, norms and biases.
        called: from names in `projections` to those in the model that the table is for.

    Raises:
        ValueError: a budget that cannot be read, or that no ranks fit.
    """
    shapes = [(one["d_in"], one["d_out"]) for one in projections]
    wanted = check_budget(budget, shapes)
    price, cap = [sum(shape) for shape in shapes], [_cap(*shape) for shape in shapes]
    parts = [_parts(one["output"]["singular_values"]) for one in projections]
    by_gain = sorted(
        ((i, k) for i, top in enumerate(cap) for k in range(1, top)),
        key=lambda at: -_at(parts[at[0]], at[1]) / price[at[0]],
    )
    ranks, parameters = _greedy((i for i, _ in by_gain), price, wanted)
    by_turn = sorted(((i, k) for i, top in enumerate(cap) for k in range(1, top)), key=lambda at: at[1])
    uniform, costs = _greedy((i for i, _ in by_turn), price, wanted)
    if _lost(parts, uniform)["mean"] < _lost(parts, ranks)["mean"]:
        ranks, parameters = uniform, costs
    return Suggestion(
        ranks={one["name"]: rank for one, rank in zip(projections, ranks, strict=True)},
        table=table_of([{**one, "role": called(one["role"])} for one in projections], ranks),
        parameters=parameters,
        dense_parameters=sum(d_in * d_out for d_in, d_out in shapes),
        lost=_lost(parts, ranks),
        uniform_rank=min(rank for rank, top in zip(uniform, cap, strict=True) if rank < top or top == max(cap)),
        uniform_lost=_lost(parts, uniform),
    )


def _parts(sigma: Sequence[float]) -> list[float]:
    """Each singular value's fraction of the energy."""
    energy = math.fsum(value**2 for value in sigma)
    return [value**2 / energy if energy else 0.0 for value in sigma]


def _at(parts: Sequence[float], index: int) -> float:
    return parts[index] if index < len(parts) else 0.0


def _greedy(turns: Iterable[int], price: Sequence[int], budget: int) -> tuple[list[int], int]:
    """Ranks that start at 1 and grow by one at each turn that still fits the budget, and what they cost."""
    ranks, left = [1] * len(price), budget - sum(price)
    for one in turns:
        if price[one] <= left:
            ranks[one], left = ranks[one] + 1, left - price[one]
    return ranks, budget - left


def _lost(parts: Sequence[Sequence[float]], ranks: Sequence[int]) -> dict[str, float]:
    lost = [math.fsum(each[rank:]) for each, rank in zip(parts, ranks, strict=True)]
    return {"mean": math.fsum(lost) / len(lost), "worst": max(lost)}


def table_of(projections: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> dict[str, int]:
    """Patterns that match exactly these projections; depths of a projection with the same rank share one."""
    depths: dict[tuple[str, int], list[int]] = {}
    for one, rank in zip(projections, ranks, strict=True):
        depths.setdefault((one["role"], rank), []).append(one["depth"])
    table = {}
    for (role, rank), those in depths.items():
        stack, _, inner = role.partition(".*.")
        listed = str(those[0]) if len(those) == 1 else f"({'|'.join(map(str, those))})"
        table[rf"^{re.escape(stack)}\.{listed}\.{re.escape(inner)}$"] = rank
    return table
