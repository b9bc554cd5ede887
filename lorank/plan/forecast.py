"""What training would take, for any shapes and methods side by side: counted on models without data, priced by a fleet.

Nothing here is measured on an accelerator. Counts are exact (operations of matrix products and attention, bytes of
tensors); time, energy and price follow from them by the fleet's assumptions.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedModel

from lorank import accounting
from lorank.accelerators import Fleet, Run
from lorank.distributed.traffic import Traffic, traffic
from lorank.plan.counts import Counts, count
from lorank.sites import other_matrices
from lorank.train.budget import Budget, saved_parameters
from lorank.train.methods import check_used, fitting, methods_of, rank_of, run_title, schedule_of, title_of
from lorank.train.model import empty_dense, empty_model
from lorank.train.recipe import Recipe
from lorank.train.run import corpus_of

METHODS = ("dense", "low-rank", "cola", "cola-m", "crnet", "sltrain", "relora", "masa")
"""Planned for unless the user names others."""
TRAFFIC = {
    "devices": "processes",
    "numbers_per_token_dense": "dense",
    "numbers_per_token_between_layers": "between",
    "numbers_per_token_at_bottleneck": "cut",
    "numbers_per_token_of_norms": "norms",
    "parameters_per_device": "parameters",
    "refusal": "refusal",
}
"""What a record says of tensor parallelism, by the field of `lorank.distributed.traffic.Traffic`."""
TOKENS_PER_PARAMETER = 20
"""Of the dense model: the budget unless the user names one (arXiv 2203.15556)."""


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
    left_dense: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Matrices of the blocks that the method does not reach, such as experts: {role: parameters, all depths}."""
    traffic: Traffic | None = None
    """What devices that share a model send each other, if that is asked."""
    tokens_per_parameter: ClassVar[int] = TOKENS_PER_PARAMETER

    @property
    def title(self) -> str:
        """What the recipe is called: "cola", "galore", "cola+galore", "cola+muon", "dense"."""
        return run_title(self.recipe)

    @property
    def rule(self) -> str:
        """The plain rule by which weights move."""
        return methods_of(self.recipe).rule

    @property
    def rank(self) -> Any:
        """The recipe's, else the one of the method's paper at that size, else its default; None: no method has one."""
        return rank_of(self.recipe)

    @property
    def checkpoint(self) -> str:
        """Name of the policy under which blocks are trained."""
        return self.recipe.checkpoint or methods_of(self.recipe).method.policy or "none"

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
        """Whether a method does something between steps, which no figure here includes."""
        return any(method.has_hook for method in methods_of(self.recipe))

    @property
    def starts_dense(self) -> bool:
        """Whether the first steps train more weights than the later ones, as which all are counted."""
        return bool(getattr(methods_of(self.recipe).method, "warm_start", 0))

    @property
    def all_reduce_bytes(self) -> float:
        """Sent by each device in a step of data-parallel training."""
        return accounting.all_reduce_bytes(self.counts.memory.gradients_bytes, self.fleet.devices)

    @property
    def gathered_bytes(self) -> float:
        """Sent by each device in a step, more than with AdamW, if weights are sharded (FSDP2) and the optimizer needs whole matrices."""
        return (self.fleet.devices - 1) / self.fleet.devices * self.counts.gathered_bytes

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
            "method": self.title,
            "rank": self.rank,
            "options": recipe.options,
            "recipe": self.file,
            "precision": recipe.precision,
            "optimizer": self.rule,
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
            "optimizer_gather_bytes_per_step": self.gathered_bytes,
            "tokens": self.tokens,
            "steps": self.steps,
            **self.run._asdict(),
            "fits_the_accelerator": self.fits,
            **{f"tensor_parallel_{name}": getattr(self.traffic, field, None) for name, field in TRAFFIC.items()},
        }


def forecast_all(
    shapes: Sequence[Recipe],
    methods: Sequence[str],
    *,
    fleet: Fleet,
    budget: Budget | None = None,
    alone: bool = False,
    tensor_parallel: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[Forecast]:
    """Every method at every shape.

    Args:
        shapes: recipes whose `method` does not matter; a `rank` goes to the methods that have one.
        methods: names, or names joined by "+"; "dense" is one.
        budget: of each run, where parameters are those of each row's model; None: `TOKENS_PER_PARAMETER` for each
            parameter of the dense model.
        alone: plan what runs in one process only for one device of the fleet; else it is refused.
        tensor_parallel: also say what that many devices that share a model send each other.
        say: called with what is counted next.

    Raises:
        ValueError: no method or shape, an unknown one, a setting that no method has, or a budget below one step.
    """
    if not methods:
        raise ValueError("there is no method to plan for; name one, for example --method cola")
    if not shapes:
        raise ValueError("there is no model to plan for; name a size, for example --size 60m")
    check_used(shapes[0], {method: with_method(shapes[0], method) for method in methods})
    found = []
    for shape in shapes:
        given = budget
        if given is None:
            given = Budget(tokens=TOKENS_PER_PARAMETER * accounting.count_parameters(empty_dense(shape)).total)
        for method in methods:
            say(f"{method} {shape.model or shape.size}")
            row = with_method(shape, method)
            found.append(_forecast(row, fleet, given, budget is None, alone=alone, shared_by=tensor_parallel))
    return found


def forecast_recipes(
    recipes: Mapping[str, Recipe],
    *,
    fleet: Fleet,
    budget: Budget | None = None,
    tensor_parallel: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[Forecast]:
    """Every recipe as it is, by the name of its file.

    Args:
        budget: of each run; None: the recipe's steps.
        tensor_parallel: also say what that many devices that share a model send each other.

    Raises:
        ValueError: as training would before its first step, or a budget below one step.
    """
    found = []
    for file, recipe in recipes.items():
        say(file)
        given = budget or Budget(steps=recipe.steps)
        try:
            found.append(_forecast(recipe, fleet, given, budget is None, file, shared_by=tensor_parallel))
            schedule_of(dataclasses.replace(recipe, steps=found[-1].steps))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    return found


def _forecast(
    recipe: Recipe,
    fleet: Fleet,
    budget: Budget,
    is_default: bool,
    file: str | None = None,
    *,
    alone: bool = False,
    shared_by: int | None = None,
) -> Forecast:
    methods = methods_of(recipe)
    reason = f"{methods.gradient.name} runs in one process" if methods.gradient.answers() else ""
    if getattr(methods.mover, "in_backward", False):
        reason = "in_backward must be false on several devices, because it sees the gradient of one process only"
    if reason and fleet.devices > 1:
        if not alone:
            raise ValueError(f"{reason}; use --devices 1")
        fleet = dataclasses.replace(fleet, devices=1)
    micro = recipe.micro_batch_size or max(1, recipe.batch_size // fleet.devices)
    recipe = dataclasses.replace(recipe, micro_batch_size=micro)
    _check_batch(recipe, fleet.devices)
    model = built(recipe)
    others = other_matrices(model) if methods.method.answers() else {}
    left = {role: sum(parameter.numel() for parameter in each.values()) for role, each in others.items()}
    tokens = _tokens_of(recipe, model, budget)
    if tokens < (least := recipe.batch_size * recipe.sequence_length):
        raise ValueError(
            f"tokens must be at least one step's {least:,} ({recipe.batch_size} sequences of {recipe.sequence_length}), got "
            f"{tokens:,}; give more, or a smaller --batch-size"
        )
    counts = count(recipe, model, devices=fleet.devices)
    sent = None if shared_by is None else traffic(model, shared_by)
    return Forecast(recipe.model or recipe.size, recipe, counts, fleet, tokens, is_default, file, left, sent)


def _tokens_of(recipe: Recipe, model: PreTrainedModel, budget: Budget) -> int:
    """What a budget comes to, where steps and epochs count padding too."""
    if budget.tokens is not None:
        return budget.tokens
    if budget.tokens_per_parameter is not None:
        return math.ceil(budget.tokens_per_parameter * saved_parameters(model))
    steps = budget.steps or budget.steps_of(recipe, corpus_of(recipe), 1)
    return steps * recipe.batch_size * recipe.sequence_length


def with_method(shape: Recipe, method: str) -> Recipe:
    """The recipe with another method; of the rank, the methods' settings and the patterns it keeps those that apply."""
    recipe = fitting(dataclasses.replace(shape, method=method))
    methods = methods_of(recipe)
    chooses = methods.method.name != "dense" or hasattr(methods.mover, "rank")
    return dataclasses.replace(
        recipe,
        targets=shape.targets if chooses else [],
        exclude=shape.exclude if chooses else [],
        micro_batch_size=shape.batch_size if methods.gradient.answers() else shape.micro_batch_size,
    )


def built(recipe: Recipe, layers: int | None = None) -> PreTrainedModel:
    """Its model without data; an error says whose it is."""
    try:
        return empty_model(recipe, layers=layers)
    except ValueError as error:
        raise ValueError(f"{title_of(recipe)} on {recipe.model or recipe.size}: {error}") from None


def _check_batch(recipe: Recipe, devices: int) -> None:
    micro = (recipe.micro_batch_size or 1) * devices
    if recipe.batch_size % micro:
        raise ValueError(
            f"batch_size must be a multiple of {micro}, {devices} devices with micro-batches of {recipe.micro_batch_size}, got "
            f"{recipe.batch_size}; change --batch-size, --devices or --micro-batch-size"
        )


# ---- what a user writes


def split_names(given: Iterable[str]) -> list[str]:
    """Names given one by one or with commas, each once.

    >>> split_names(["dense,cola", "cola"])
    ['dense', 'cola']
    """
    return list(dict.fromkeys(name.strip() for text in given for name in text.split(",") if name.strip()))
