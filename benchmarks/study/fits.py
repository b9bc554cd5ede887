"""Loss against compute over the sizes of a text: log L = a - b log C for each row, and where two rows would cross.

L validation loss, nats per token     C training FLOPs of a run, those of the optimizer included

Each seed has a fit of its own, by least squares over the sizes, so that intervals are over seeds as everywhere in the study. All
sizes see the same tokens; it is a line through few points, and says nothing far from them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lorank.comparison.statistics import Interval, mean_interval

Points = Mapping[int, Sequence[tuple[float, float]]]
"""Seed -> (FLOPs, loss) of each size."""


class Line(NamedTuple):
    """log L = a - b log C."""

    a: float
    b: float


def line(points: Sequence[tuple[float, float]]) -> Line:
    """By least squares.

    >>> fitted = line([(c, 8 * c**-0.1) for c in (1e13, 2e13, 5e13)])
    >>> round(math.exp(fitted.a), 6), round(fitted.b, 6)
    (8.0, 0.1)
    """
    x, y = [math.log(c) for c, _ in points], [math.log(loss) for _, loss in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    b = -sum((u - mean_x) * (v - mean_y) for u, v in zip(x, y, strict=True)) / sum((u - mean_x) ** 2 for u in x)
    return Line(mean_y + b * mean_x, b)


def exponent(row: Points) -> Interval:
    """b with its interval over seeds."""
    return mean_interval([line(points).b for points in row.values()])


def crossing(row: Points, other: Points) -> Interval | None:
    """log C at which two rows would have the same loss, with its interval over the seeds of both.

    None where the seeds do not tell the slopes apart, that is where the interval of the difference of b has zero in it: then any C may be.
    """
    lines = [(line(row[seed]), line(other[seed])) for seed in row if seed in other]
    apart = mean_interval([one.b - two.b for one, two in lines])
    if not (apart.low > 0 or apart.high < 0):
        return None
    return mean_interval([(one.a - two.a) / (one.b - two.b) for one, two in lines])
