"""Where the gradient comes from if not from autograd: EGGROLL on any language model, and on EGG in integers."""

import dataclasses
import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorank import accounting
from lorank.egg import EggConfig, EggForCausalLM
from lorank.optim.eggroll import Eggroll
from lorank.optim.eggroll_int8 import IntegerEggroll, Votes, alpha_at, deal
from lorank.train.recipe import EGG_SETTINGS, Recipe

SHAPE = {"hidden_size": 64, "num_hidden_layers": 1}
"""Options of model=egg that fix its shape; the others are those of `IntegerEggroll`."""


class Estimator(Protocol):
    """What `PretrainTrainer` calls instead of forward and backward."""

    flops_per_token: float

    def __call__(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Fill `.grad` for this batch and step, of which all randomness is a function, and return the mean loss in nats."""


@dataclasses.dataclass
class LanguageModelEggroll:
    """`Eggroll` whose fitness is the negative cross-entropy that a member has on its rows of the batch."""

    model: PreTrainedModel
    estimate: Eggroll
    flops_per_token: float

    def __call__(self, batch: dict[str, Tensor], step: int) -> Tensor:
        given = {name: deal(rows, self.estimate.population, self.estimate.group_size) for name, rows in batch.items()}
        self.estimate.epoch = step

        def fitness(members: range) -> Tensor:
            rows = {name: rows_of(members).flatten(0, 1) for name, rows_of in given.items()}
            labels = rows.pop("labels")[:, 1:]
            logits = self.model(**rows, use_cache=False).logits[:, :-1]
            nats = F.cross_entropy(logits.mT.float(), labels, reduction="none").view(len(members), -1).sum(1)
            return -nats / (labels != -100).view(len(members), -1).sum(1)

        return -self.estimate(fitness).mean()


@dataclasses.dataclass
class EggEggroll:
    """`IntegerEggroll`; the loss is the members' integer likelihood in nats."""

    estimate: IntegerEggroll
    flops_per_token: float

    def __call__(self, batch: dict[str, Tensor], step: int) -> Tensor:
        self.estimate.epoch = step
        return -self.estimate(batch["input_ids"]).mean() / 16 * torch.log(torch.tensor(2.0))


def build_estimator(recipe: Recipe, model: PreTrainedModel) -> Estimator | None:
    """The recipe's estimator, None where autograd does it.

    Raises:
        ValueError: settings that an estimator has no use for, or options it does not know.
    """
    if recipe.method != "eggroll":
        return None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("method=eggroll runs in one process; start it without torchrun")
    if recipe.micro_batch_size not in (None, recipe.batch_size):
        raise ValueError(
            "method=eggroll does not accumulate gradients; drop micro_batch_size, give --option chunk=MEMBERS"
        )
    if recipe.compile:
        raise ValueError("method=eggroll works through hooks, which compile does not see; drop compile")
    kind: Any = Eggroll
    options = dict(recipe.options)
    if isinstance(model, EggForCausalLM):
        kind = IntegerEggroll
        options = {name: value for name, value in options.items() if name not in SHAPE}
    elif recipe.rank is not None:
        options.setdefault("rank", recipe.rank)
    known = [name for name in inspect.signature(kind).parameters if name not in ("model", "seed")]
    for name in options:
        if name not in known:
            raise ValueError(f"options: eggroll has no field {name!r}; it has {', '.join(known)}")
    estimate = kind(model, **{**DEFAULTS[kind], **options}, seed=recipe.seed)
    members = estimate.group_size or estimate.population  # that see a token
    deal(torch.empty(recipe.batch_size, 1), estimate.population, estimate.group_size)
    if isinstance(model, EggForCausalLM):
        return EggEggroll(estimate, model.flops_per_token() * members)
    forward = accounting.flops_per_token(model, recipe.sequence_length, batch=recipe.batch_size) / 3
    return LanguageModelEggroll(model, estimate, forward * members)


DEFAULTS: dict[type, dict[str, Any]] = {Eggroll: {"population": 64, "sigma": 0.01, "chunk": 16}, IntegerEggroll: {}}


def egg_config(recipe: Recipe) -> EggConfig:
    return EggConfig(**{name: recipe.options.get(name, default) for name, default in SHAPE.items()})


def build_egg(recipe: Recipe, config: EggConfig) -> EggForCausalLM:
    """An EGG model with fresh weights; ValueError for settings that have no meaning in integers."""
    if recipe.method != "eggroll":
        raise ValueError(f"model=egg has no gradient, so method={recipe.method} cannot train it; take method=eggroll")
    for name in ("weight_decay", "clip", "warmup_steps", "rank", "precision", "optimizer", "checkpoint"):
        if getattr(recipe, name) != (wanted := EGG_SETTINGS.get(name, Recipe.__dataclass_fields__[name].default)):
            raise ValueError(f"{name}={getattr(recipe, name)} has no meaning for model=egg; leave it at {wanted}")
    return EggForCausalLM(config)


def egg_optimizer(recipe: Recipe, estimator: EggEggroll) -> tuple[Callable[[Any], Votes], Callable[[int], float]]:
    """What makes the optimizer, and the schedule of α, whose flag is the recipe's `lr`."""
    pairs = estimator.estimate.population // 2
    return lambda model: Votes(model.parameters(), lr=1.0, pairs=pairs), partial(alpha_at, flag=recipe.lr)
