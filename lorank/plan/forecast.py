"""What training would take, for any shapes and methods side by side: counted on models without data, priced by a fleet.

Nothing here is measured on an accelerator. Counts are exact (operations of matrix products and attention, bytes of
tensors); time, energy and price follow from them by the fleet's assumptions.
"""

import bisect
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from lorank import accounting
from lorank.accelerators import Fleet, Run, check_memory
from lorank.method import Method
from lorank.optim import ESTIMATORS, find_optimizer, options_of
from lorank.plan.run import Counts, count, empty_model, memory, optimizer_step, standing_bytes
from lorank.sizes import SIZES
from lorank.table import find
from lorank.train.estimators import settings_of
from lorank.train.model import check_name, rank_of, schedule_of
from lorank.train.recipe import Recipe

METHODS = ("dense", "low-rank", "cola", "cola-m", "crnet", "sltrain", "relora", "masa")
"""Planned for unless the user names others."""
TOKENS_PER_PARAMETER = 20
"""Of the dense model: the budget unless the user names one (arXiv 2203.15556)."""
DEEPEST = 4
"""Times a shape's own number of layers: deeper ones are not tried, as each layer takes time to count."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One recipe: a method at a shape, or what a file says."""

    shape: str
    """A named size, or the model whose configuration it is."""
    recipe: Recipe
    counts: Counts
    fleet: Fleet
    tokens: int
    """Of the whole run."""
    budget_is_default: bool = False
    file: str | None = None
    """Where the recipe was read."""

    @property
    def rank(self) -> Any:
        """What was asked, else what the method's paper takes at the size, else its default; None: the method has none."""
        return rank_of(self.recipe)

    @property
    def checkpoint(self) -> str:
        """Name of the policy under which blocks are trained."""
        dense = self.recipe.method in ("dense", "eggroll") or find_optimizer(self.recipe.method) is not None
        own = None if dense else find(self.recipe.method).policy
        return self.recipe.checkpoint or own or "none"

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch_size * self.recipe.sequence_length

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def optimizer_flops(self) -> float:
        """Of the optimizer's matrix products in a step, on all devices: each does the same."""
        return self.fleet.devices * self.counts.step_flops

    @property
    def flops_per_step(self) -> float:
        """Of forward and backward passes, recomputation, and the optimizer."""
        return self.counts.flops_per_token * self.tokens_per_step + self.optimizer_flops

    @property
    def moves_between_steps(self) -> bool:
        """Whether the method does something between steps, which no figure here has."""
        if self.recipe.method == "dense" or find_optimizer(self.recipe.method) is not None:
            return False
        return find(self.recipe.method).hook is not Method.hook

    @property
    def all_reduce_bytes(self) -> float:
        """Sent by each device in a step of data-parallel training."""
        return accounting.all_reduce_bytes(self.counts.memory.gradients_bytes, self.fleet.devices)

    @property
    def run(self) -> Run:
        flops = self.counts.flops_per_token * self.tokens + self.optimizer_flops * self.steps
        return self.fleet.run(flops, self.recipe.precision)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the accelerator's memory."""
        return self.counts.memory.peak_bytes <= self.fleet.accelerator.memory_gib * 2**30

    def to_dict(self) -> dict[str, Any]:
        """Everything as one flat record with units in the names; None: it has none."""
        recipe, counts, fleet = self.recipe, self.counts, self.fleet
        per_token = {name: n / counts.tokens for name, n in counts.flops._asdict().items()}
        return {
            "shape": self.shape,
            "method": recipe.method,
            "rank": self.rank,
            "options": recipe.options,
            "recipe": self.file,
            "precision": recipe.precision,
            "optimizer": recipe.optimizer,
            "checkpoint": self.checkpoint,
            "sequence_length": recipe.sequence_length,
            "batch_size": recipe.batch_size,
            "micro_batch_size": recipe.micro_batch_size,
            "parameters": counts.parameters.total,
            "trainable_parameters": counts.parameters.trainable,
            "block_parameters": counts.parameters.blocks,
            **{f"{name}_flops_per_token": n for name, n in per_token.items()},
            "flops_per_token": counts.flops_per_token,
            "optimizer_flops_per_step": self.optimizer_flops,
            "flops_per_step": self.flops_per_step,
            **counts.memory._asdict(),
            "accelerator": fleet.accelerator.name,
            "accelerator_flops": fleet.accelerator.rate(recipe.precision),
            "accelerator_memory_gib": fleet.accelerator.memory_gib,
            "accelerator_watts": fleet.accelerator.watts,
            "accelerator_dollars_per_hour": fleet.accelerator.dollars_per_hour,
            "devices": fleet.devices,
            "utilisation": fleet.utilisation,
            "all_reduce_bytes_per_step": self.all_reduce_bytes,
            "tokens": self.tokens,
            "steps": self.steps,
            **self.run._asdict(),
            "fits_the_accelerator": self.fits,
        }


def forecast_all(
    shapes: Sequence[Recipe],
    methods: Sequence[str],
    *,
    fleet: Fleet,
    tokens: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[Forecast]:
    """Every method at every shape.

    Args:
        shapes: recipes whose `method` is of no account; a `rank` goes to the methods that have one.
        methods: names; "dense" is one.
        tokens: of the run; None: `TOKENS_PER_PARAMETER` for each parameter of the dense model.
        say: told what is counted next.

    Raises:
        ValueError: no method or shape, an unknown one, a setting that no method takes, or a budget below one step.
    """
    if not methods:
        raise ValueError("there is no method to plan for; name one, for example --method cola")
    if not shapes:
        raise ValueError("there is no model to plan for; name a size, for example --size 60m")
    if any(shape.model == "egg" for shape in shapes):
        raise ValueError(
            "EGG is a model of its own with no dense twin; lorank pretrain --model egg --dry-run counts it"
        )
    _check_taken(shapes[0], methods)
    found = []
    for shape in shapes:
        budget = tokens
        if budget is None:
            dense = empty_model(with_method(shape, "dense"))
            budget = TOKENS_PER_PARAMETER * accounting.count_parameters(dense).total
        for method in methods:
            say(f"{method} {shape.model or shape.size}")
            found.append(_forecast(with_method(shape, method), fleet, budget, tokens is None))
    return found


def forecast_recipes(
    recipes: Mapping[str, Recipe],
    *,
    fleet: Fleet,
    tokens: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[Forecast]:
    """Every recipe as it is, by the name of its file.

    Args:
        tokens: of each run; None: the recipe's steps.

    Raises:
        ValueError: as training would before its first step, or a budget below one step.
    """
    found = []
    for file, recipe in recipes.items():
        say(file)
        budget = recipe.steps * recipe.batch_size * recipe.sequence_length if tokens is None else tokens
        try:
            schedule_of(recipe)
            found.append(_forecast(recipe, fleet, budget, tokens is None, file))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    return found


def _forecast(recipe: Recipe, fleet: Fleet, tokens: int, is_default: bool, file: str | None = None) -> Forecast:
    if fleet.devices > 1 and recipe.method == "eggroll":
        raise ValueError("method=eggroll runs in one process; give --devices 1")
    if fleet.devices > 1 and recipe.options.get("in_backward"):
        raise ValueError("in_backward=true sees the gradient of one process only; give --devices 1, or leave it out")
    micro = recipe.micro_batch_size or max(1, recipe.batch_size // fleet.devices)
    recipe = dataclasses.replace(recipe, micro_batch_size=micro)
    _check_batch(recipe, fleet.devices)
    if tokens < (least := recipe.batch_size * recipe.sequence_length):
        raise ValueError(
            f"tokens={tokens:,} are fewer than one step's {least:,} ({recipe.batch_size} sequences of "
            f"{recipe.sequence_length}); give more, or a smaller --batch-size"
        )
    counts = count(recipe, _empty(recipe), devices=fleet.devices)
    return Forecast(recipe.model or recipe.size, recipe, counts, fleet, tokens, is_default, file)


def with_method(shape: Recipe, method: str) -> Recipe:
    """The recipe with another method; of the rank and a method's own settings it keeps those that apply."""
    known = _settings_of(method)
    if method == "dense":
        return dataclasses.replace(shape, method=method, rank=None, options={}, targets=[], exclude=[])
    options = {name: value for name, value in shape.options.items() if name in known}
    return dataclasses.replace(
        shape,
        method=method,
        rank=shape.rank if "rank" in known else None,
        options=options,
        micro_batch_size=shape.batch_size if method == "eggroll" else shape.micro_batch_size,
    )


def _settings_of(method: str) -> list[str]:
    """Rank and options that a method takes."""
    if method == "dense":
        return []
    check_name(method)
    if method in ESTIMATORS:
        return settings_of()
    if (optimizer := find_optimizer(method)) is not None:
        return ["rank", *options_of(optimizer)]
    return list(find(method).__dataclass_fields__)


def _check_taken(shape: Recipe, methods: Sequence[str]) -> None:
    """Raises ValueError for a rank, option or pattern of which none of the methods would hear."""
    known = {name for method in methods for name in _settings_of(method)}
    wanted = [*shape.options, *(["rank"] if shape.rank is not None else [])]
    if any(method != "dense" for method in methods):
        known |= {"targets", "exclude"}
    wanted += [name for name in ("targets", "exclude") if getattr(shape, name)]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "drop it, or name a method that does"
            raise ValueError(f"none of {', '.join(methods)} takes {name!r}; {hint}")


def _empty(recipe: Recipe, layers: int | None = None) -> PreTrainedModel:
    """Its model; a complaint says whose."""
    try:
        return empty_model(recipe, layers=layers)
    except ValueError as error:
        raise ValueError(f"{recipe.method} on {recipe.model or recipe.size}: {error}") from None


def _check_batch(recipe: Recipe, devices: int) -> None:
    micro = (recipe.micro_batch_size or 1) * devices
    if recipe.batch_size % micro:
        raise ValueError(
            f"{devices} devices with micro-batches of {recipe.micro_batch_size} do not divide batch_size={recipe.batch_size}; "
            f"take a multiple of {micro}, or other --devices or --micro-batch-size"
        )


# ---- what fits


class Depth(NamedTuple):
    """The most layers with which a shape, its widths unchanged, trains in a given memory."""

    layers: int
    """0 where not even one goes in."""
    parameters: int
    """Of that model."""
    is_bound: bool
    """Whether more were not tried: it is `DEEPEST` times the shape's own number."""


class Fit(NamedTuple):
    """What of one forecast goes into a given memory."""

    micro_batch: int
    """The most sequences at a time that divide a device's part of the batch; 0 where not even one goes in."""
    is_whole: bool
    """Whether that is a device's whole part, so that a larger batch might go in."""
    size: str | None
    """The largest Llama of `SIZES` that trains, otherwise as its recipe says, with one sequence at a time."""
    depth: Depth | None
    """How deep the asked shape may be, with one sequence at a time; None where its depth cannot be set."""


def check_budget(recipes: Iterable[Recipe], gib: float) -> None:
    """Before anything is counted: `gib` is a budget, in which one recipe at least could train at its own or the smallest size.

    Raises:
        ValueError: it is not positive and finite; or what stands by in any step, weights, gradients and optimizer state, is
            more already.
    """
    check_memory(gib)
    least, name = math.inf, ""
    for recipe in recipes:
        smallest = dataclasses.replace(recipe, size=next(iter(SIZES)), model=None)
        for trial in (smallest, recipe):
            size = standing_bytes(trial, _empty(trial))
            if size <= gib * 2**30:
                return
            if size < least:
                least, name = size, f"{trial.method} {trial.model or trial.size}"
    raise ValueError(
        f"nothing fits in {gib:g} GiB: {name}, the least of what was asked, needs {least / 2**30:.3g} GiB for weights, "
        "gradients and optimizer state alone"
    )


def fit_all(found: Sequence[Forecast], gib: float, *, say: Callable[[str], object] = lambda line: None) -> list[Fit]:
    """For each forecast what goes into `gib`, with its batch and on its devices.

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
        name = one.file or f"{one.recipe.method} {one.shape}"
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
            f"nothing fits in {gib:g} GiB: {least[1]}, the least of what was asked, needs {least[0] / 2**30:.3g} GiB for "
            "one sequence"
        )
    return fits


class _Peaks:
    """Peaks of a recipe's model in bytes by micro-batch, each measured once."""

    def __init__(self, recipe: Recipe, devices: int, step: accounting.Step | None = None, *, layers: int | None = None):
        self.recipe, self.devices, self.step = recipe, devices, step
        self.model, self.known = _empty(recipe, layers), dict[int, float]()

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
        if self.at(share) <= limit:  # which may be less than a part of it takes: then nothing is accumulated
            return share
        parts = [0, *(b for b in range(1, share) if share % b == 0)]
        return parts[bisect.bisect_right(parts, limit, lo=1, key=self.at) - 1]


def deepest(recipe: Recipe, devices: int, limit: float) -> Depth | None:
    """With how many layers the recipe's shape trains in `limit` bytes, one sequence at a time; None where that cannot be set."""

    @functools.cache
    def peaks(layers: int) -> _Peaks:
        return _Peaks(recipe, devices, layers=layers)

    def parameters(layers: int) -> int:
        return accounting.count_parameters(peaks(layers).model).total

    own = getattr(_empty(recipe).config, "num_hidden_layers", None)
    start = (own or 0) // 2 or 1
    try:
        if own is None or not parameters(start) < parameters(start + 1):
            return None
        layers = largest_below(lambda layers: peaks(layers).at(1), limit, start=start, most=DEEPEST * own)
    except ValueError:  # the shape's configuration, or a rank for each block, leaves no choice
        return None
    return Depth(layers, parameters(layers) if layers else 0, layers == DEEPEST * own)


def largest_below(f: Callable[[int], float], limit: float, *, start: int = 1, most: int) -> int:
    """The largest b from 1 to `most` with f(b) <= limit, for an f that grows (and almost in a line: then four calls do); else 0.
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


# ---- what a user writes


def read_tokens(text: str) -> int:
    """A number of tokens, with k, M, B or T if wanted.

    >>> read_tokens("1.1B"), read_tokens("819200")
    (1100000000, 819200)
    """
    found = re.fullmatch(r"(\d+(?:[._]?\d+)*(?:e\d+)?)\s*([kMBT]?)", text.strip())
    if not found:
        raise ValueError(f"tokens={text!r} is not a number of tokens such as 1.1B or 819200")
    try:
        number = float(found[1].replace("_", "")) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[found[2]]
    except ValueError:
        raise ValueError(f"tokens={text!r} is not a number of tokens such as 1.1B or 819200") from None
    if number < 1 or math.isinf(number):
        raise ValueError(f"tokens={text!r} leaves nothing to train on; give for example 1.1B")
    return round(number)


def split_names(given: Iterable[str]) -> list[str]:
    """Names given one by one or with commas, each once.

    >>> split_names(["dense,cola", "cola"])
    ['dense', 'cola']
    """
    return list(dict.fromkeys(name.strip() for text in given for name in text.split(",") if name.strip()))
