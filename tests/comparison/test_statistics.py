"""Intervals over a few seeds against printed tables and a hand calculation."""

import math

import pytest

from lorank.comparison.statistics import mean_interval, t_inside, t_quantile


@pytest.mark.parametrize(
    ("freedom", "level", "printed"),  # two-sided, from any textbook's table
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (5, 0.99, 4.032), (9, 0.9, 1.833),
     (30, 0.95, 2.042), (100, 0.95, 1.984), (7, 0.5, 0.711)],
)  # fmt: skip
def test_quantiles_are_those_of_the_tables(freedom: int, level: float, printed: float) -> None:
    assert t_quantile(freedom, level) == pytest.approx(printed, abs=6e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 6, 11])
def test_the_series_is_the_integral_of_the_density(freedom: int) -> None:
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    density = lambda x: scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)  # noqa: E731
    t, pieces = 1.7, 2000
    middles = ((k + 0.5) * t / pieces for k in range(pieces))
    assert t_inside(t, freedom) == pytest.approx(2 * sum(map(density, middles)) * t / pieces, abs=1e-6)


def test_an_interval_by_hand() -> None:
    values = [4.1, 4.4, 4.2]
    found = mean_interval(values)
    half = 4.30265 * math.sqrt(sum((v - 4.2333333) ** 2 for v in values) / 2) / math.sqrt(3)
    assert found.mean == pytest.approx(4.2333333) and found.number == 3
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), rel=1e-6)


def test_one_value_has_no_interval() -> None:
    found = mean_interval([2.5])
    assert found.mean == 2.5 and math.isnan(found.low) and math.isnan(found.high)
