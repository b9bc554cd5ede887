"""How certain a mean over a few seeds is: Student's t interval, without SciPy."""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and its two-sided confidence interval, which is NaN if there is only one value."""

    mean: float
    low: float
    high: float
    number: int


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """mean ± t · s / sqrt(n), with t of n - 1 degrees of freedom.

    >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484, 3]
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan, len(values))
    half = t_quantile(len(values) - 1, level) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def t_inside(t: float, freedom: int) -> float:
    """P(|T| < t): the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@functools.cache
def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t with P(|T| < t) = level.

    >>> [round(t_quantile(n), 3) for n in (1, 2, 3, 4, 30)]
    [12.706, 4.303, 3.182, 2.776, 2.042]
    """
    low, high = 0.0, 1.0
    while t_inside(high, freedom) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < level else (low, middle)
    return (low + high) / 2
