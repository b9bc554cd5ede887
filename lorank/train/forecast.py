"""What training would take, for any shapes and methods side by side: counted on models without data, priced by a fleet.

Nothing here is measured on an accelerator. Counts are exact (operations of matrix products and attention, bytes of
tensors); time, energy and price follow from them by the fleet's assumptions.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from lorank import accounting
from lorank.accelerators import Fleet, Run
from lorank.methods import find_method
from lorank.optim import find_optimizer
from lorank.sizes import SIZES
from lorank.train.model import check_name, rank_of
from lorank.train.plan import Counts, count, empty_model, memory
from lorank.train.recipe import Recipe

METHODS = ("dense", "low-rank", "cola", "cola-m", "crnet", "sltrain", "relora", "masa")
"""Planned for unless the user names others."""
TOKENS_PER_PARAMETER = 20
"""Of the dense model: the budget unless the user names one (arXiv 2203.15556)."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One method at one shape."""

    shape: str
    """A named size, or the model whose configuration it is."""
    recipe: Recipe
    counts: Counts
    fleet: Fleet
    tokens: int
    """Of the whole run."""
    budget_is_default: bool = False

    @property
    def rank(self) -> Any:
        """What was asked, else what the method's paper takes at the size, else its default; None: the method has none."""
        return rank_of(self.recipe)

    @property
    def checkpoint(self) -> str:
        """Name of the policy under which blocks are trained."""
        dense = self.recipe.method in ("dense", "eggroll") or find_optimizer(self.recipe.method) is not None
        own = None if dense else find_method(self.recipe.method).checkpoint_policy
        return self.recipe.checkpoint or own or "none"

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch_size * self.recipe.sequence_length

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def all_reduce_bytes(self) -> float:
        """Sent by each device in a step of data-parallel training."""
        return accounting.all_reduce_bytes(self.counts.memory.gradients_bytes, self.fleet.devices)

    @property
    def run(self) -> Run:
        return self.fleet.run(self.counts.flops_per_token * self.tokens)

    @property
    def fits(self) -> bool:
        """Whether the peak is below the accelerator's memory; an unknown peak is taken to be."""
        return not self.counts.memory.peak_bytes > self.fleet.accelerator.memory_gib * 2**30

    def to_dict(self) -> dict[str, Any]:
        """Everything as one flat record with units in the names; None where unknown."""
        recipe, counts, fleet = self.recipe, self.counts, self.fleet
        per_token = {name: n / counts.tokens for name, n in counts.flops._asdict().items()}
        record = {
            "shape": self.shape,
            "method": recipe.method,
            "rank": self.rank,
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
            "flops_per_step": counts.flops_per_token * self.tokens_per_step,
            **counts.memory._asdict(),
            "accelerator": fleet.accelerator.name,
            "accelerator_flops": fleet.accelerator.flops,
            "accelerator_memory_gib": fleet.accelerator.memory_gib,
            "accelerator_watts": fleet.accelerator.watts,
            "accelerator_dollars_per_hour": fleet.accelerator.dollars_per_hour,
            "devices": fleet.devices,
            "utilisation": fleet.utilisation,
            "all_reduce_bytes_per_step": self.all_reduce_bytes,
            "tokens": self.tokens,
            "steps": self.steps,
            **self.run._asdict(),
            "fits_the_accelerator": None if math.isnan(counts.memory.peak_bytes) else self.fits,
        }
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}


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
        ValueError: no method or shape, an unknown one, or a budget below one step.
    """
    if not methods:
        raise ValueError("there is no method to plan for; name one, for example --method cola")
    if not shapes:
        raise ValueError("there is no model to plan for; name a size, for example --size 60m")
    if any(shape.model == "egg" for shape in shapes):
        raise ValueError(
            "EGG is a model of its own with no dense twin; lorank pretrain --model egg --dry-run counts it"
        )
    found = []
    for shape in shapes:
        name = shape.model or shape.size
        _check_batch(shape, fleet.devices)
        budget = tokens
        if budget is None:
            dense = empty_model(with_method(shape, "dense"))
            budget = TOKENS_PER_PARAMETER * accounting.count_parameters(dense).total
        if budget < (least := shape.batch_size * shape.sequence_length):
            raise ValueError(
                f"tokens={budget:,} are fewer than one step's {least:,} ({shape.batch_size} sequences of "
                f"{shape.sequence_length}); give more, or a smaller --batch-size"
            )
        for method in methods:
            say(f"{method} {name}")
            recipe = with_method(shape, method)
            counts = count(recipe, _empty(recipe), devices=fleet.devices)
            found.append(Forecast(name, recipe, counts, fleet, budget, tokens is None))
    return found


def with_method(shape: Recipe, method: str) -> Recipe:
    """The recipe with another method; of the rank and a method's own settings it keeps those that apply."""
    if method == "dense":
        return dataclasses.replace(shape, method=method, rank=None, options={}, targets=[], exclude=[])
    micro = shape.batch_size if method == "eggroll" else shape.micro_batch_size
    return dataclasses.replace(
        shape, method=method, rank=shape.rank if _has_rank(method) else None, micro_batch_size=micro
    )


def _has_rank(method: str) -> bool:
    if method == "dense":
        return False
    check_name(method)
    return (
        method == "eggroll" or find_optimizer(method) is not None or "rank" in find_method(method).__dataclass_fields__
    )


def _empty(recipe: Recipe) -> PreTrainedModel:
    """Its model; a complaint says whose."""
    try:
        return empty_model(recipe)
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


@dataclasses.dataclass(frozen=True)
class Fit:
    """What of one method goes into a given memory."""

    method: str
    micro_batch: dict[str, int]
    """The most sequences at a time, by shape; 0 where not even one goes in."""
    size: str | None
    """The largest named size that trains with one sequence at a time."""


def fit_all(
    shapes: Sequence[Recipe],
    methods: Sequence[str],
    gib: float,
    *,
    say: Callable[[str], object] = lambda line: None,
) -> list[Fit]:
    """For each method what goes into `gib`, gradients of earlier micro-batches included.

    Raises:
        ValueError: nothing does, or the peak cannot be known.
    """
    if not gib > 0 or math.isinf(gib):
        raise ValueError(f"--fits {gib:g} is not a positive number of GiB")
    found, least = [], (math.inf, "")
    for method in methods:
        batches = {}
        for shape in shapes:
            say(f"the largest micro-batch of {method}")
            recipe = with_method(shape, method)
            peak = functools.cache(functools.partial(_peak, recipe, _empty(recipe)))
            name = shape.model or shape.size
            batches[name] = largest_below(peak, gib * 2**30)
            least = min(least, (peak(1), f"{method} {name}"))
        say(f"the largest size of {method}")
        sizes = {shape.size: batches[shape.size] > 0 for shape in shapes if shape.model is None}
        found.append(Fit(method, batches, _largest_size(with_method(shapes[0], method), gib * 2**30, sizes)))
    if not any(fit.size or any(fit.micro_batch.values()) for fit in found):
        raise ValueError(
            f"nothing fits in {gib:g} GiB: {least[1]}, the least of what was asked, needs {least[0] / 2**30:.3g} GiB for "
            "one sequence"
        )
    return found


def largest_below(f: Callable[[int], float], limit: float) -> int:
    """The largest b >= 1 with f(b) <= limit, for an f that grows (and almost in a line: then four calls do); else 0.

    >>> largest_below(lambda b: 10 + 3 * b, 100), largest_below(lambda b: 10 + 3 * b, 12)
    (30, 0)
    """
    low, high = 1, 2
    if f(low) > limit:
        return 0
    while f(high) <= limit:
        slope = (f(high) - f(low)) / (high - low)
        low, high = high, max(high + 1, int(high + (limit - f(high)) / slope) + 1)
    while high - low > 1:
        guess = int(low + (limit - f(low)) * (high - low) / (f(high) - f(low)))
        guess = min(max(guess, low + 1), high - 1)
        low, high = (guess, high) if f(guess) <= limit else (low, guess)
    return low


def _peak(recipe: Recipe, model: PreTrainedModel, batch: int) -> float:
    peak = memory(recipe, model, batch, accumulate=True).peak_bytes
    if math.isnan(peak):
        raise ValueError(f"what fits is unknown for {recipe.model}: memory of mixtures of experts is not counted")
    return peak


def _largest_size(recipe: Recipe, limit: float, known: Mapping[str, bool]) -> str | None:
    for name in reversed(SIZES):
        if name in known:
            if known[name]:
                return name
            continue
        trial = dataclasses.replace(recipe, size=name, model=None)
        model = _empty(trial)
        numbers, each = accounting.count_parameters(model), next(model.parameters()).element_size()
        least = each * (numbers.total + 2 * numbers.trainable)  # weights, gradients and one moment: known at once
        if least <= limit and _peak(trial, model, 1) <= limit:
            return name
    return None


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
