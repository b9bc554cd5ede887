"""What fits in a given memory: the largest micro-batch, the largest named size, and the most layers."""

import bisect
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NamedTuple

from lorank import accounting
from lorank.accelerators import check_memory
from lorank.plan.counts import check_searchable, memory, optimizer_step, standing_bytes
from lorank.plan.forecast import Forecast, built
from lorank.sizes import SIZES
from lorank.train.methods import title_of
from lorank.train.recipe import Recipe

DEEPEST = 4
"""Times a shape's own number of layers: deeper ones are not tried, because each layer takes time to count."""


class Depth(NamedTuple):
    """The most layers with which a shape, its widths unchanged, trains in a given memory."""

    layers: int
    """0 if not even one fits."""
    parameters: int
    """Of that model."""
    is_bound: bool
    """Whether more were not tried: it is `DEEPEST` times the shape's own number."""


class Fit(NamedTuple):
    """What of one forecast fits in a given memory."""

    micro_batch: int
    """The most sequences at a time that divide a device's part of the batch; 0 if not even one fits."""
    is_whole: bool
    """Whether that is a device's whole part, so that a larger batch might fit."""
    size: str | None
    """The largest Llama of `SIZES` that trains, otherwise as its recipe says, with one sequence at a time."""
    depth: Depth | None
    """How deep the asked shape may be, with one sequence at a time; None if its depth cannot be set."""


@dataclasses.dataclass(frozen=True)
class Fits:
    """What fits in `gib`, for each forecast in order."""

    gib: float
    rows: list[Fit]
    largest: ClassVar[str] = list(SIZES)[-1]
    """Larger sizes are not tried."""
    deepest: ClassVar[int] = DEEPEST


def check_budget(recipes: Iterable[Recipe], gib: float) -> None:
    """Before anything is counted: `gib` is a budget in which at least one recipe could train at its own or the smallest size.

    Raises:
        ValueError: it is not positive and finite; what exists in any step (weights, gradients, optimizer state) is already
            more; or a recipe's memory cannot be searched.
    """
    check_memory(gib)
    least, name = math.inf, ""
    for recipe in recipes:
        check_searchable(recipe)
        smallest = dataclasses.replace(recipe, size=next(iter(SIZES)), model=None)
        for trial in (smallest, recipe):
            size = standing_bytes(trial, built(trial))
            if size <= gib * 2**30:
                return
            if size < least:
                least, name = size, f"{title_of(trial)} {trial.model or trial.size}"
    raise ValueError(
        f"No requested model fits in {gib:g} GiB. The smallest, {name}, needs {least / 2**30:.3g} GiB for weights, gradients "
        "and optimizer state alone"
    )


def fit_all(found: Sequence[Forecast], gib: float, *, say: Callable[[str], object] = lambda line: None) -> Fits:
    """For each forecast what fits in `gib`, with its batch and on its devices.

    Raises:
        ValueError: nothing does.
    """
    check_budget((one.recipe for one in found), gib)
    limit, fits, least, known = gib * 2**30, [], (math.inf, ""), dict[str, _Peaks]()

    def peaks_of(recipe: Recipe, devices: int, step: accounting.Step | None = None) -> _Peaks:
        if (key := repr((recipe, devices))) not in known:
            known[key] = _Peaks(recipe, devices, step)
        return known[key]

    for one in found:
        name = one.file or f"{one.title} {one.shape}"
        say(f"the largest micro-batch of {name}")
        devices = one.fleet.devices
        peaks, share = peaks_of(one.recipe, devices, one.counts.step), one.recipe.batch_size // devices
        batch = peaks.largest_micro_batch(share, limit)
        least = min(least, (peaks.at(1), name))
        say(f"the largest size of {name}")
        sizes = (dataclasses.replace(one.recipe, size=size, model=None) for size in reversed(SIZES))
        size = next((trial.size for trial in sizes if peaks_of(trial, devices).fits(limit)), None)
        say(f"the most layers of {name}")
        fits.append(Fit(batch, batch == share, size, deepest(one.recipe, devices, limit)))
    if not any(fit.size or fit.micro_batch for fit in fits):
        raise ValueError(
            f"No requested model fits in {gib:g} GiB. The smallest, {least[1]}, needs {least[0] / 2**30:.3g} GiB for one sequence"
        )
    return Fits(gib, fits)


class _Peaks:
    """Peaks of a recipe's model in bytes by micro-batch, each measured once."""

    def __init__(self, recipe: Recipe, devices: int, step: accounting.Step | None = None, *, layers: int | None = None):
        self.recipe, self.devices, self.step = recipe, devices, step
        with warnings.catch_warnings(action="ignore"):  # of a shape that is only tried
            self.model, self.known = built(recipe, layers), dict[int, float]()

    def at(self, batch: int) -> float:
        if batch not in self.known:
            self.step = self.step or optimizer_step(self.recipe, self.model)
            found = memory(self.recipe, self.model, batch, devices=self.devices, step=self.step)
            self.known[batch] = found.peak_bytes
        return self.known[batch]

    def fits(self, limit: float) -> bool:
        """Whether one sequence does."""
        return standing_bytes(self.recipe, self.model) <= limit and self.at(1) <= limit  # the former is known at once

    def largest_micro_batch(self, share: int, limit: float) -> int:
        """Of those that divide a device's `share` of the batch; 0 if none fits."""
        if self.at(share) <= limit:  # which may need less than a part of it: then nothing is accumulated
            return share
        parts = [0, *(b for b in range(1, share) if share % b == 0)]
        return parts[bisect.bisect_right(parts, limit, lo=1, key=self.at) - 1]


def deepest(recipe: Recipe, devices: int, limit: float) -> Depth | None:
    """With how many layers the recipe's shape trains in `limit` bytes, one sequence at a time; None if that cannot be set."""

    @functools.cache
    def peaks(layers: int) -> _Peaks:
        return _Peaks(recipe, devices, layers=layers)

    def parameters(layers: int) -> int:
        return accounting.count_parameters(peaks(layers).model).total

    own = getattr(built(recipe).config, "num_hidden_layers", None)
    start = (own or 0) // 2 or 1
    try:
        if own is None or not parameters(start) < parameters(start + 1):
            return None
        layers = largest_below(lambda layers: peaks(layers).at(1), limit, start=start, most=DEEPEST * own)
    except ValueError:  # the shape's configuration, or a rank for each block, leaves no choice
        return None
    return Depth(layers, parameters(layers) if layers else 0, layers == DEEPEST * own)


def largest_below(f: Callable[[int], float], limit: float, *, start: int = 1, most: int) -> int:
    """The largest b from 1 to `most` with f(b) <= limit, for a growing f (if almost linear, four calls are enough); else 0.
    The first calls are of `start` and its neighbour.

    >>> line = lambda b: 10 + 3 * b
    >>> largest_below(line, 100, most=50), largest_below(line, 12, most=50), largest_below(line, 100, most=20)
    (30, 0, 20)
    """
    low, high = start, min(start + 1, most)
    if f(start) > limit:
        low, high = 1, start
        if f(1) > limit:
            return 0
    while f(high) <= limit:
        if high == most:
            return most
        slope = (f(high) - f(low)) / (high - low)
        low, high = high, min(most, max(high + 1, int(high + (limit - f(high)) / slope) + 1))
    while high - low > 1:
        guess = int(low + (limit - f(low)) * (high - low) / (f(high) - f(low)))
        guess = min(max(guess, low + 1), high - 1)
        low, high = (guess, high) if f(guess) <= limit else (low, guess)
    return low
