"""What a recipe would do, without doing it: which layer becomes what, who moves which parameter, and what it costs."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorank import accounting
from lorank.plan.counts import Counts, count
from lorank.sites import expert_sites, find_sites, other_matrices, owners_of
from lorank.train.budget import Budget, Extent, extent_of, of_length, saved_parameters
from lorank.train.build import build_estimator
from lorank.train.folder import absolute
from lorank.train.methods import methods_of, optimizer_groups, schedule_of
from lorank.train.model import build_config, empty_model
from lorank.train.recipe import Recipe
from lorank.train.run import check_corpus, corpus_of


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
    """What a step does with one parameter, at all depths."""

    role: str
    depths: int
    shape: str
    treatment: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe's model next to its dense twin."""

    rows: list[Row]
    """Of all projections and other matrices of the blocks, unless the weights stay as they are and `treatments` says how they move."""
    treatments: list[Treatment]
    """Of all parameters, where they do not all move by one plain rule and a gradient from autograd."""
    model: Counts
    dense: Counts | None
    """None: the model has no dense twin."""
    checkpoint: bool
    """Whether blocks recompute part of their forward pass."""
    population: str = ""
    """Who estimates the gradient, if it is estimated."""
    vocab_size: int = 0
    saved_parameters: int = 0
    """Of the model as it is saved."""
    text: str = ""
    """What the data are, once they have been read."""
    extent: Extent | None = None
    """How long the run is, once the data have been read."""
    positions: int = 0
    """Tokens of the whole run, padding included."""


def plan(recipe: Recipe) -> Plan:
    """Count what `recipe` would train; no memory is allocated for the model and no data are read.

    Raises:
        ValueError: as building the model would.
    """
    model = empty_model(recipe)
    treatments, population = treatments_of(recipe, model)
    twin = dense_twin(recipe) if next(model.parameters()).is_floating_point() else None  # EGG in integers has none
    other = empty_model(twin) if twin else None
    converted = methods_of(recipe).method.answers()
    return Plan(
        _rows(other, model) if other is not None and (converted or not treatments) else [],
        treatments,
        count(recipe, model),
        count(twin, other) if twin and other is not None else None,
        bool(model.is_activation_checkpointing),
        population,
        model.config.vocab_size,
        saved_parameters(model),
    )


def plan_with_data(recipe: Recipe, found: Plan, budget: Budget | None = None) -> Plan:
    """The plan that was `found` for a recipe, after its data have been read and everything has been checked that can be checked before
    weights are there.

    Raises:
        ValueError: as training would before its first step.
        OSError: the data cannot be read.
    """
    recipe = absolute(recipe)
    corpus = corpus_of(recipe)
    vocab_size = build_config(recipe, corpus.tokenizer).vocab_size
    check_corpus(recipe, corpus, vocab_size)
    if vocab_size != found.vocab_size:  # of a small text, which fills no vocabulary
        found = plan(dataclasses.replace(recipe, vocab_size=vocab_size))
    if budget is not None:
        recipe = of_length(recipe, budget.steps_of(recipe, corpus, found.saved_parameters))
    schedule_of(recipe)
    return dataclasses.replace(
        found,
        text=corpus.description,
        extent=extent_of(recipe, corpus, found.saved_parameters),
        positions=recipe.steps * recipe.batch_size * recipe.sequence_length,
    )


def dense_twin(recipe: Recipe) -> Recipe:
    """The same run of the model as it is, by the same plain rule."""
    plain: dict[str, Any] = {"rank": None, "options": {}, "targets": [], "exclude": []}
    plain |= {"checkpoint": None, "checkpoint_every": 1}
    rule = methods_of(recipe).rule
    return dataclasses.replace(recipe, method="dense", optimizer=rule, gradient="autograd", **plain)


def treatments_of(recipe: Recipe, model: PreTrainedModel) -> tuple[list[Treatment], str]:
    """What a step does with each parameter, and who estimates its gradient."""
    if (estimator := build_estimator(recipe, model)) is not None:
        rule = methods_of(recipe).rule

        def estimated(name: str, p: nn.Parameter) -> str:
            said = estimator.treatment(name, p)
            return f"{said}; {rule}" if estimator.moves(p) else said

        return _by_role(model, estimated), estimator.describe()
    groups, found = optimizer_groups(recipe, model), methods_of(recipe)
    if not any(group.get("rank") or group.get("rule") for group in groups):
        return [], ""
    group_of = {p: group for group in groups for p in group["params"]}
    defaults = {f.name: f.default for f in dataclasses.fields(found.mover)}
    chosen = {name: value for name in defaults if (value := getattr(found.mover, name)) != defaults[name]}
    options = "".join(f", {name}={value}" for name, value in chosen.items() if name not in ("rank", "rule"))
    inside = "" if found.rule in ("adamw", found.mover.name) else f" ({found.rule})"

    def how(name: str, p: nn.Parameter) -> str:
        group = group_of.get(p)
        if group is None:
            return "frozen"
        if rank := group.get("rank"):
            return f"{found.mover.name}{inside}, rank {rank}{options}"
        rule, times = found.mover.settings(group)["rule"], group.get("lr_multiplier", 1.0)  # type: ignore[attr-defined]
        return rule if times == 1 else f"{rule}, lr × {times:.4g}"

    return _by_role(model, how), ""


def _rows(dense: nn.Module, model: nn.Module) -> list[Row]:
    rows: dict[str, Row] = {}
    modules = dict(model.named_modules())
    experts = expert_sites(dense)
    for site in [*find_sites(dense), *experts]:
        # a fused projection none of whose parts was converted is still one module, under its own name
        after = modules.get(f"{site.name}.all" if f"{site.name}.all" in modules else site.name)
        if after is not None and site.experts and not hasattr(after, "stands_for_experts"):
            after = None
        before = max(1, site.experts) * _size(site.linear)
        count = before if after is None else _size(after)
        now = "stays dense" if after is None or isinstance(after, nn.Linear | Conv1D) else _short(after)
        earlier = rows.get(site.role, Row(site.role, 0, "", "", 0, 0))
        rows[site.role] = Row(
            role=site.role,
            depths=earlier.depths + 1,
            before=f"{site.experts} × " * bool(site.experts) + f"{site.d_in} → {site.d_out}",
            after=earlier.after if now in earlier.after else f"{earlier.after}, then {now}".removeprefix(", then "),
            parameters_before=earlier.parameters_before + before,
            parameters_after=earlier.parameters_after + count,
        )
    taken = owners_of(experts)
    others = [
        Row(role, len(each), " × ".join(map(str, next(iter(each.values())).shape)), "stays dense", size, size)
        for role, each in other_matrices(dense).items()
        if role.rpartition(".")[0] not in taken
        for size in [sum(parameter.numel() for parameter in each.values())]
    ]
    shared = [
        Row(name, 1, "", "shared by the blocks", 0, _size(module)) for name, module in accounting.shared_modules(model)
    ]
    return [*rows.values(), *others, *shared]


def _by_role(model: nn.Module, how: Callable[[str, Any], str]) -> list[Treatment]:
    found: dict[tuple[str, str, str], int] = {}
    for name, p in model.named_parameters():
        key = (re.sub(r"\.\d+\.", ".*.", name), " × ".join(map(str, p.shape)), how(name, p))
        found[key] = found.get(key, 0) + 1
    return [Treatment(role, depths, shape, how) for (role, shape, how), depths in found.items()]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _short(module: nn.Module) -> str:
    known = ("d_in=", "d_out=")  # another column says it
    details = [part for part in module.extra_repr().split(", ") if not part.startswith(known)]
    return f"{type(module).__name__}({', '.join(details)})"
