"""What a recipe would do, without doing it: a model on the meta device, counted."""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorank import accounting
from lorank.conversion import find_sites
from lorank.train.data import load_tokenizer
from lorank.train.model import build_config, build_model
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
class Counts:
    """A model's cost of training; FLOPs with recomputation, memory for one micro-batch on one device."""

    parameters: accounting.Parameters
    flops_per_token: float
    memory: accounting.Memory


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe's model beside its dense twin."""

    rows: list[Row]
    model: Counts
    dense: Counts
    checkpoint: bool
    """Whether blocks recompute part of their forward pass."""


def plan(recipe: Recipe) -> Plan:
    """Count what `recipe` would train; no memory is taken for the model and no data are read.

    Raises:
        ValueError: as building the model would.
    """
    if recipe.method == "eggroll":
        raise ValueError("a dry run counts backward passes, which method=eggroll has none of; run it for a few steps")
    tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
    if tokenizer is None and recipe.vocab_size is None:
        recipe = dataclasses.replace(recipe, vocab_size=4096)  # what a tokenizer trained on the data would have
    plain: dict[str, Any] = {
        "rank": None,
        "options": {},
        "targets": [],
        "exclude": [],
        "checkpoint": None,
        "checkpoint_every": 1,
    }
    with torch.device("meta"):
        dense = build_model(dataclasses.replace(recipe, method="dense", **plain), build_config(recipe, tokenizer))
        model = build_model(recipe, build_config(recipe, tokenizer))
    return Plan(_rows(dense, model), _counts(recipe, model), _counts(recipe, dense), model.is_activation_checkpointing)


def _counts(recipe: Recipe, model: PreTrainedModel) -> Counts:
    batch = recipe.micro_batch_size or recipe.batch_size
    flops = accounting.measure_flops(model, batch=batch, sequence_length=recipe.sequence_length)
    return Counts(
        accounting.count_parameters(model),
        flops.total / (batch * recipe.sequence_length),
        accounting.memory_estimate(
            model,
            optimizer=recipe.optimizer,
            batch=batch,
            sequence_length=recipe.sequence_length,
            autocast=recipe.precision == "bf16",
        ),
    )


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
            after=now if now in earlier.after or not earlier.after else f"{earlier.after}, then {now}",
            parameters_before=earlier.parameters_before + _size(site.linear),
            parameters_after=earlier.parameters_after + count,
        )
    shared = [
        Row(name, 1, "", "shared by the blocks", 0, _size(module)) for name, module in accounting.shared_modules(model)
    ]
    return [*rows.values(), *shared]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _short(module: nn.Module) -> str:
    known = ("d_in=", "d_out=")  # the column beside says it
    details = [part for part in module.extra_repr().split(", ") if not part.startswith(known)]
    return f"{type(module).__name__}({', '.join(details)})"
