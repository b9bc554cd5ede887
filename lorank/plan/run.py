"""What a recipe would do, without doing it: a model on the meta device, counted."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorank import accounting
from lorank.conversion import method_of
from lorank.evolution.egg import EggForCausalLM
from lorank.optim import options_of
from lorank.optim.dct import forget_matrices
from lorank.sites import find_sites
from lorank.train.data import load_tokenizer
from lorank.train.estimators import population, step_cost, treatment
from lorank.train.model import Projection, build_config, build_model, find_projection, with_layers
from lorank.train.optimizers import (
    build_low_rank_optimizer,
    build_optimizer,
    check_rule,
    kept_gradients,
    state_bytes,
    step_flops,
)
from lorank.train.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Row:
    """What becomes of one projection, at all depths."""

    role: str
    depths: int
    before: str
    after: str
    parameters_before: int
    """Weights and biases, all depths together."""
    parameters_after: int


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What the optimizer does with one parameter, at all depths."""

    role: str
    depths: int
    shape: str
    treatment: str


@dataclasses.dataclass(frozen=True)
class Counts:
    """A model's cost of training; FLOPs and memory are those of one micro-batch on one device, but for the step's."""

    parameters: accounting.Parameters
    flops: accounting.Flops
    tokens: int
    """Of the micro-batch."""
    memory: accounting.Memory
    step: accounting.Step
    """Bytes of the optimizer's step."""
    step_flops: float
    """Of the optimizer's own matrix products in an average step."""

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward passes, recomputation included."""
        return self.flops.total / self.tokens


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe's model beside its dense twin."""

    rows: list[Row]
    treatments: list[Treatment]
    """Of all parameters, where the method is a low-rank optimizer or an estimator."""
    model: Counts
    dense: Counts | None
    """None: the model is one of its own."""
    checkpoint: bool
    """Whether blocks recompute part of their forward pass."""
    population: str = ""
    """Who estimates the gradient, where the method is an estimator."""


def plan(recipe: Recipe) -> Plan:
    """Count what `recipe` would train; no memory is taken for the model and no data are read.

    Raises:
        ValueError: as building the model would.
    """
    plain: dict[str, Any] = {
        "rank": None,
        "options": {},
        "targets": [],
        "exclude": [],
        "checkpoint": None,
        "checkpoint_every": 1,
    }
    model = empty_model(recipe)
    if recipe.method == "eggroll":
        how = treatment(recipe, model)
        twin = None if isinstance(model, EggForCausalLM) else dataclasses.replace(recipe, method="dense", **plain)
        dense = count(twin, empty_model(twin)) if twin else None
        return Plan([], _by_role(model, how), count(recipe, model), dense, False, population(recipe, model))
    twin = dataclasses.replace(recipe, method="dense", **plain)
    other = empty_model(twin)
    projection = find_projection(recipe, model)
    return Plan(
        _rows(other, model),
        _treatments(recipe, model, projection) if projection else [],
        count(recipe, model),
        count(twin, other),
        model.is_activation_checkpointing,
    )


def empty_model(recipe: Recipe, *, layers: int | None = None) -> PreTrainedModel:
    """The recipe's model on the meta device: shapes without data; if asked, with another number of `layers`."""
    counted = recipe.tokenizer is not None and recipe.vocab_size is None  # all that a plan wants of a tokenizer
    tokenizer = load_tokenizer(recipe.tokenizer) if counted else None
    if tokenizer is None and recipe.vocab_size is None:
        recipe = dataclasses.replace(recipe, vocab_size=4096)  # what a tokenizer trained on the data would have
    config = build_config(recipe, tokenizer)
    with torch.device("meta"):
        return build_model(recipe, config if layers is None else with_layers(config, layers))


def count(recipe: Recipe, model: PreTrainedModel, *, devices: int = 1) -> Counts:
    """What training `recipe`'s model takes, on each of so many devices."""
    if recipe.method == "eggroll":
        moments = 0 if isinstance(model, EggForCausalLM) else state_bytes(model, recipe.optimizer)
        flops, held = step_cost(recipe, model, moments)
        tokens = recipe.batch_size * recipe.sequence_length
        return Counts(accounting.count_parameters(model), flops, tokens, held, accounting.Step(moments, moments), 0)
    batch, step = recipe.micro_batch_size or recipe.batch_size, optimizer_step(recipe, model)
    return Counts(
        accounting.count_parameters(model),
        accounting.measure_flops(model, batch=batch, sequence_length=recipe.sequence_length),
        batch * recipe.sequence_length,
        memory(recipe, model, batch, devices=devices, step=step),
        step,
        optimizer_flops(recipe, model, devices=devices),
    )


def memory(
    recipe: Recipe, model: PreTrainedModel, batch: int, *, devices: int, step: accounting.Step | None = None
) -> accounting.Memory:
    """What each device holds that trains `recipe`'s model on `batch` sequences at a time; `step` is `optimizer_step`'s, if known.

    Gradients stand by from the beginning of a micro-batch on if others came before it, and where several devices train: there
    they lie in buckets that are never given back. DDP sorts its buckets once, before the second step, into new ones, unless it
    looks for unused parameters, which Trainer has it do for models without checkpoints.
    """
    if recipe.method == "eggroll":
        raise ValueError(
            "memory of method=eggroll goes by --option chunk, so it is neither sought nor matched; drop --fits, or --match memory"
        )
    kind, ranks, options = find_projection(recipe, model) or (None, None, None)
    found = accounting.memory_estimate(
        model,
        optimizer_bytes=optimizer_bytes(recipe, model),
        step=step or optimizer_step(recipe, model),
        kept_gradients=kept_gradients(kind, ranks, options),
        batch=batch,
        sequence_length=recipe.sequence_length,
        autocast=recipe.precision == "bf16",
        accumulate=devices > 1 or batch < recipe.batch_size,
        padded=recipe.documents == "padded",
    )
    sorted_anew = found.weights_bytes + found.optimizer_bytes + 2 * found.gradients_bytes
    if devices > 1 and model.is_activation_checkpointing and sorted_anew > found.peak_bytes:
        return found._replace(peak_bytes=sorted_anew, peak_when="forward")
    return found


def optimizer_flops(recipe: Recipe, model: PreTrainedModel, *, devices: int = 1) -> float:
    """Of the matrix products in an average step of the recipe's optimizer, on each device the same."""
    kind, ranks, options = find_projection(recipe, model) or (None, None, None)
    micro_batches = max(1, recipe.batch_size // (devices * (recipe.micro_batch_size or recipe.batch_size)))
    return step_flops(model, recipe.optimizer, kind, ranks, options, micro_batches=micro_batches)


def optimizer_step(recipe: Recipe, model: PreTrainedModel) -> accounting.Step:
    """What the recipe's optimizer holds in the step that takes most, one that refreshes its bases.

    The kernels of adamw-8bit cannot be followed: that step is AdamW's with smaller moments, so as on a GPU, where they need nothing
    beside them (what runs on a CPU makes whole moments for a while).
    """
    rule = "adamw" if recipe.optimizer == "adamw-8bit" else recipe.optimizer
    projection = find_projection(recipe, model) or (None, None, None)
    fewer = state_bytes(model, rule, *projection) - state_bytes(model, recipe.optimizer, *projection)

    def build(twin: nn.Module) -> torch.optim.Optimizer:
        projection, method = find_projection(recipe, twin), method_of(model)
        own = method.adamw if method else None
        check_rule(recipe.optimizer, kind=projection.kind if projection else None, adamw=own)
        if projection is None:
            return build_optimizer(twin, rule, lr=0.1, weight_decay=0.1, adamw=own)
        kind, ranks, options = projection
        often = {"update_gap": 1} if "update_gap" in options_of(kind) else {}
        made: Any = build_low_rank_optimizer(
            twin, kind, ranks, rule, lr=0.1, weight_decay=0.1, options={**options, **often}
        )
        if recipe.optimizer == "adamw-8bit":
            made.inner.step = made.inner.step  # one of its own, so that all is stepped at once, as with bitsandbytes
        return made

    forget_matrices()
    try:
        found = accounting.measure_step(model, build)
    finally:
        forget_matrices()
    return accounting.Step(found.kept_bytes - fewer, found.most_bytes - fewer)


def optimizer_bytes(recipe: Recipe, model: PreTrainedModel) -> int:
    """What the recipe's optimizer keeps between steps."""
    kind, ranks, options = find_projection(recipe, model) or (None, None, None)
    return state_bytes(model, recipe.optimizer, kind, ranks, options)


def standing_bytes(recipe: Recipe, model: PreTrainedModel) -> int:
    """Weights, gradients and optimizer state of a step with several micro-batches: what it takes at least, known at once."""
    kind, ranks, options = find_projection(recipe, model) or (None, None, None)
    kept = kept_gradients(kind, ranks, options)
    gradients = sum(math.prod(kept.get(p, p.shape)) * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + gradients + state_bytes(model, recipe.optimizer, kind, ranks, options)


def _rows(dense: nn.Module, model: nn.Module) -> list[Row]:
    rows: dict[str, Row] = {}
    modules = dict(model.named_modules())
    for site in find_sites(dense):
        # a fused projection none of whose parts was converted is still one module, under its own name
        after = modules.get(site.name)
        count = _size(site.linear) if after is None else _size(after)
        now = "stays dense" if after is None or isinstance(after, nn.Linear | Conv1D) else _short(after)
        earlier = rows.get(site.role, Row(site.role, 0, "", "", 0, 0))
        rows[site.role] = Row(
            role=site.role,
            depths=earlier.depths + 1,
            before=f"{site.d_in} → {site.d_out}",
            after=earlier.after if now in earlier.after else f"{earlier.after}, then {now}".removeprefix(", then "),
            parameters_before=earlier.parameters_before + _size(site.linear),
            parameters_after=earlier.parameters_after + count,
        )
    shared = [
        Row(name, 1, "", "shared by the blocks", 0, _size(module)) for name, module in accounting.shared_modules(model)
    ]
    return [*rows.values(), *shared]


def _treatments(recipe: Recipe, model: nn.Module, projection: Projection) -> list[Treatment]:
    plain = recipe.optimizer == "adamw"
    options = "".join(f", {name}={value}" for name, value in projection.options.items())

    def how(p: nn.Parameter) -> str:
        if rank := projection.ranks.get(p):
            return f"{recipe.method}{'' if plain else f' ({recipe.optimizer})'}, rank {rank}{options}"
        return "muon's AdamW" if recipe.optimizer == "muon" else recipe.optimizer

    return _by_role(model, how)


def _by_role(model: nn.Module, how: Callable[[Any], str]) -> list[Treatment]:
    found: dict[tuple[str, str, str], int] = {}
    for name, p in model.named_parameters():
        key = (re.sub(r"\.\d+\.", ".*.", name), " × ".join(map(str, p.shape)), how(p))
        found[key] = found.get(key, 0) + 1
    return [Treatment(role, depths, shape, how) for (role, shape, how), depths in found.items()]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _short(module: nn.Module) -> str:
    known = ("d_in=", "d_out=")  # the column beside says it
    details = [part for part in module.extra_repr().split(", ") if not part.startswith(known)]
    return f"{type(module).__name__}({', '.join(details)})"
