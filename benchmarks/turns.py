"""Times of several ways that take turns in one process, and how many times as long one takes as another."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def in_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = clock()
            way()
            times[name].append(clock() - began)
    return times


def ratios(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Times of one over those of the other: between medians, and between the shortest as a check."""
    return {
        "of medians": round(statistics.median(one) / statistics.median(other), 2),
        "of shortest": round(min(one) / min(other), 2),
    }
