"""Where the gradient comes from if not from autograd: EGGROLL on any language model, and on EGG in integers."""

import dataclasses
import inspect
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorank import accounting
from lorank.evolution.egg import EggConfig, EggForCausalLM
from lorank.evolution.eggroll import Eggroll
from lorank.evolution.integers import IntegerEggroll, Votes, alpha_at, deal
from lorank.train.recipe import EGG_SETTINGS, Recipe

SHAPE = {"hidden_size": 64, "num_hidden_layers": 1}
"""Options of model=egg that fix its shape; the others are those of `IntegerEggroll`."""


class Estimator(Protocol):
    """What `PretrainTrainer` calls instead of forward and backward."""

    flops_per_token: float

    @property
    def carries(self) -> bool:
        """Whether a row of a batch goes on where the same row of the batch before ended."""

    def __call__(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Fill `.grad` for this batch and step, of which all randomness is a function, and return the mean loss in nats."""

    def state_dict(self) -> dict[str, Tensor]:
        """What it carries from step to step."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""


@dataclasses.dataclass
class LanguageModelEggroll:
    """`Eggroll` whose fitness is the negative cross-entropy that a member has on its rows of the batch."""

    model: PreTrainedModel
    estimate: Eggroll
    flops_per_token: float = math.nan
    carries = False

    def __call__(self, batch: dict[str, Tensor], step: int) -> Tensor:
        self.estimate.epoch = step
        return -self.estimate(self.fitness(batch)).mean()

    def fitness(self, batch: dict[str, Tensor]) -> Callable[[range], Tensor]:
        given = {name: deal(rows, self.estimate.population, self.estimate.group_size) for name, rows in batch.items()}

        def fitness(members: range) -> Tensor:
            rows = {name: rows_of(members).flatten(0, 1) for name, rows_of in given.items()}
            labels = rows.pop("labels")[:, 1:]
            logits = self.model(**rows, use_cache=False).logits[:, :-1]
            nats = F.cross_entropy(logits.mT.float(), labels, reduction="none").view(len(members), -1).sum(1)
            return -nats / (labels != -100).view(len(members), -1).sum(1)

        return fitness

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


@dataclasses.dataclass
class EggEggroll:
    """`IntegerEggroll`; the loss is the members' integer likelihood in nats."""

    estimate: IntegerEggroll
    flops_per_token: float

    @property
    def carries(self) -> bool:
        return self.estimate.carry

    def __call__(self, batch: dict[str, Tensor], step: int) -> Tensor:
        self.estimate.epoch = step
        return -self.estimate(batch["input_ids"]).mean() / 16 * torch.log(torch.tensor(2.0))

    def state_dict(self) -> dict[str, Tensor]:
        return self.estimate.left

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.estimate.left = {name: t.to(self.estimate.model.device) for name, t in state.items()}


def build_estimator(recipe: Recipe, model: PreTrainedModel) -> Estimator | None:
    """The recipe's estimator, None where autograd does it.

    Raises:
        ValueError: settings that an estimator has no use for, or options it does not know.
    """
    if recipe.method != "eggroll":
        return None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("method=eggroll runs in one process; start it without torchrun")
    estimate = _estimate(recipe, model)
    members = estimate.group_size or estimate.population  # that see a token
    if isinstance(estimate, IntegerEggroll):
        return EggEggroll(estimate, estimate.model.flops_per_token() * members)
    forward = accounting.flops_per_token(model, recipe.sequence_length, batch=recipe.batch_size) / 3
    return LanguageModelEggroll(model, estimate, forward * members)


def _estimate(recipe: Recipe, model: PreTrainedModel) -> Eggroll | IntegerEggroll:
    if recipe.micro_batch_size not in (None, recipe.batch_size):
        raise ValueError(
            "method=eggroll does not accumulate gradients; drop micro_batch_size, give --option chunk=MEMBERS"
        )
    kind: Any = Eggroll
    options = dict(recipe.options)
    if isinstance(model, EggForCausalLM):
        kind = IntegerEggroll
        options = {name: value for name, value in options.items() if name not in SHAPE}
        options["compile"] = recipe.compile
    elif recipe.compile:
        raise ValueError("method=eggroll changes what torch's functions do, which compile does not see; drop compile")
    elif recipe.rank is not None:
        options.setdefault("rank", recipe.rank)
    known = settings_of(kind)
    for name in recipe.options:
        if name not in known and not (kind is IntegerEggroll and name in SHAPE):
            raise ValueError(f"options: eggroll has no field {name!r}; it has {', '.join(known)}")
    estimate = kind(model, **{**DEFAULTS[kind], **options}, seed=recipe.seed)
    deal(torch.empty(recipe.batch_size, 1), estimate.population, estimate.group_size)
    return estimate


def settings_of(kind: Callable[..., Any] = Eggroll) -> list[str]:
    """Options that an estimator takes."""
    return [name for name in inspect.signature(kind).parameters if name not in ("model", "seed", "compile")]


# ---- what a step takes


def step_cost(
    recipe: Recipe, model: PreTrainedModel, optimizer_bytes: int
) -> tuple[accounting.Flops, accounting.Memory]:
    """Of one step on the recipe's batch, counted on a twin of `model` without data, which runs one chunk of members.

    Forward is that of all members, the products of their noise included; backward, of which there is none, is the product that makes
    G, or the votes. Nothing is kept for it, so that the peak is that of a chunk.
    """
    whole = _estimate(recipe, model)
    chunk = min(whole.chunk, whole.population)
    rows = recipe.batch_size * (whole.group_size or whole.population) // whole.population  # of each member
    one = dataclasses.replace(  # as a population of its own, whose pairs see rows of their own
        recipe,
        options={**recipe.options, "population": chunk, "group_size": 2, "chunk": chunk}
        | ({} if isinstance(whole, IntegerEggroll) else {"baseline": False}),
        batch_size=chunk // 2 * rows,
        micro_batch_size=None,
        compile=False,
    )
    make = partial(torch.zeros, one.batch_size, recipe.sequence_length, dtype=torch.int64)

    def forward(twin: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            estimate: Any = _estimate(one, twin)
            with estimate.perturb(range(chunk)):
                LanguageModelEggroll(twin, estimate).fitness({"input_ids": make(), "labels": make()})(range(chunk))

    def backward(twin: Any) -> None:
        estimate: Any = _estimate(one, twin)
        estimate.write_gradients(torch.zeros(chunk))

    moved = [p for p in model.parameters() if p in whole.perturbed]
    weights = sum(t.numel() * t.element_size() for t in set(model.state_dict(keep_vars=True).values()))
    held = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})

    def votes(twin: Any) -> None:
        estimate: Any = _estimate(one, twin)
        estimate(make())

    if isinstance(whole, IntegerEggroll):
        gradients = 4 * sum(p.numel() for p in moved)
        everything, most = accounting.measure_call(model, votes)
        products = whole.model.flops_per_token() * chunk * rows * (recipe.sequence_length - 1 + whole.carry)
        flops, when = (products, everything - products), "forward"
        if whole.carry:  # the states of all members
            most += (whole.population - chunk) * rows * model.config.num_hidden_layers * model.config.hidden_size
    else:
        gradients = sum(p.numel() * p.element_size() for p in moved)
        there, back = accounting.measure_call(model, forward), accounting.measure_call(model, backward)
        flops, when, most = (there[0], back[0]), "forward" if there[1] >= back[1] else "step", max(there[1], back[1])
    all_members = [n * whole.population // chunk for n in flops]
    memory = accounting.Memory(weights, gradients, optimizer_bytes, 0, held + optimizer_bytes + most, when)  # type: ignore[arg-type]
    return accounting.Flops(all_members[0], all_members[1], 0), memory


def treatment(recipe: Recipe, model: PreTrainedModel) -> Callable[[Any], str]:
    """What a step does with a parameter, in words."""
    estimate = _estimate(recipe, model)
    names: dict[Any, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)

    def how(p: Any) -> str:
        if p not in estimate.perturbed:
            return "no noise, not stepped"
        if isinstance(estimate, IntegerEggroll):
            return f"{'rank-1' if p.ndim == 2 else 'full'} int8 noise, σ = 2^-{estimate.sig}; votes"
        also = f", also as {', '.join(names[p][1:])}" if names[p][1:] else ""
        return f"{f'rank-{estimate.rank}' if p.ndim == 2 else 'full'} noise, σ = {estimate.sigma:g}{also}; {recipe.optimizer}"

    return how


def population(recipe: Recipe, model: PreTrainedModel) -> str:
    """Who estimates a step's gradient, in words."""
    found = _estimate(recipe, model)
    groups = found.population // (found.group_size or found.population)
    rows = recipe.batch_size // groups
    moved = [p for p in model.parameters() if p in found.perturbed]
    rank = 1 if isinstance(found, IntegerEggroll) else found.rank
    vectors = 2 if isinstance(found, IntegerEggroll) else 1  # numbers drawn for one of a vector
    drawn = sum(rank * sum(p.shape) if p.ndim == 2 else vectors * p.numel() for p in moved)
    return (
        f"{found.population:,} members, {min(found.chunk, found.population):,} at a time, "
        f"{f'each group of {found.group_size} on' if groups > 1 else 'all on the same'} {rows:,} "
        f"sequence{'s' * (rows > 1)} of {recipe.sequence_length}; noise on {sum(p.numel() for p in moved):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, of {drawn:,} numbers a pair"
    )


DEFAULTS: dict[type, dict[str, Any]] = {Eggroll: {"population": 64, "sigma": 0.01, "chunk": 16}, IntegerEggroll: {}}


def egg_config(recipe: Recipe) -> EggConfig:
    return EggConfig(**{name: recipe.options.get(name, default) for name, default in SHAPE.items()})


def build_egg(recipe: Recipe, config: EggConfig) -> EggForCausalLM:
    """An EGG model with fresh weights; ValueError for settings that have no meaning in integers."""
    if recipe.method != "eggroll":
        raise ValueError(f"model=egg has no gradient, so method={recipe.method} cannot train it; take method=eggroll")
    for name in ("weight_decay", "clip", "warmup_steps", "rank", "precision", "optimizer", "checkpoint", "documents"):
        if getattr(recipe, name) != (wanted := EGG_SETTINGS.get(name, Recipe.__dataclass_fields__[name].default)):
            raise ValueError(f"{name}={getattr(recipe, name)} has no meaning for model=egg; leave it at {wanted}")
    alpha_at(0, recipe.lr)  # complains of one that is none
    return EggForCausalLM(config)


def egg_optimizer(recipe: Recipe, estimator: EggEggroll) -> tuple[Callable[[Any], Votes], Callable[[int], float]]:
    """What makes the optimizer, and the schedule of α, whose flag is the recipe's `lr`."""
    pairs = estimator.estimate.population // 2
    return lambda model: Votes(model.parameters(), lr=1.0, pairs=pairs), partial(alpha_at, flag=recipe.lr)
