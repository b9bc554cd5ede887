"""From a recipe's three keys to methods: what the weights are, how they move, and where the gradient comes from.

    method: cola                                  or  {cola: {rank: 128}}
    optimizer: galore                             or  {galore: {rank: 64, update_gap: 100}}
    gradient: autograd

Two shorthands are resolved here and nowhere else. `method` may name any method, or several joined by "+": ``method:
galore`` and ``method: cola+galore`` mean the keys under which the table knows them. The recipe's `rank` and each of its
`options` go to the first of the methods that has a field of that name.
"""

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lorank.accounting import rests_bytes
from lorank.fields import field_types, fits
from lorank.method import Method, check_combination, warmup_cosine
from lorank.optim.groups import plain_groups
from lorank.table import find, method_names, names_joined
from lorank.train.places import receiver
from lorank.train.recipe import KEYS, Recipe

logger = logging.getLogger(__name__)
DEFAULTS = ("dense", "adamw", "autograd")
"""What the three keys name where a recipe leaves the question to PyTorch."""


class Methods(NamedTuple):
    """The three methods of a recipe, with their settings."""

    method: Method
    optimizer: Method
    gradient: Method

    @property
    def mover(self) -> Method:
        """The one that makes the optimizer: the structure itself where it brings its own (SwitchLoRA)."""
        return self.method if "optimizer" in self.method.answers() else self.optimizer

    @property
    def rule(self) -> str:
        """The plain rule by which the weights move, inside a subspace where one is projected: "adamw", "muon", ..."""
        own = "adamw" if hasattr(self.optimizer, "rank") else self.optimizer.name
        return getattr(self.optimizer, "rule", own)

    @property
    def title(self) -> str:
        """What tables and reports call the recipe: the names that are not left to PyTorch, or "dense"."""
        named = [m.name for m in self if m.name not in DEFAULTS and not _is_plain_rule(type(m))]
        return "+".join(named) or "dense"


def methods_of(recipe: Recipe) -> Methods:
    """The recipe's methods. Settings come from the recipe, else from the paper for the recipe's size, else from the field.

    Raises:
        ValueError: an unknown name or setting, a value that does not fit, or methods that answer the same question.
    """
    built = []
    for kind, settings in _settings(recipe).items():
        published = {} if recipe.model else kind.published.get(recipe.size, {})
        try:
            built.append(kind(**{**published, **settings}))
        except ValueError as error:
            raise ValueError(f"{kind.name}: {error}") from None
    check_combination(built)
    found = Methods(*sorted(built, key=lambda method: KEYS.index(method.key)))
    if found.mover is not found.optimizer and found.optimizer != type(found.optimizer)():
        raise ValueError(
            f"{found.mover.name} brings its own optimizer; leave out the settings of {found.optimizer.name}"
        )
    return found


def title_of(recipe: Recipe) -> str:
    """`Methods.title`, for a recipe whose settings may be incomplete or wrong."""
    named = [kind.name for kind in _kinds(recipe) if kind.name not in DEFAULTS and not _is_plain_rule(kind)]
    return "+".join(named) or "dense"


def run_title(recipe: Recipe) -> str:
    """What a run is called: `title_of`, and the rule by which its weights move where that is another than AdamW.

    >>> run_title(Recipe(method="cola", optimizer="muon")), run_title(Recipe(method="galore", optimizer="muon"))
    ('cola+muon', 'galore+muon')
    """
    title, rule = title_of(recipe), methods_of(recipe).rule
    return title if rule in ("adamw", *title.split("+")) else f"{title}+{rule}"


def settings_of(recipe: Recipe) -> list[str]:
    """Names of the settings that the recipe's methods have."""
    return list(dict.fromkeys(field for kind in _kinds(recipe) for field in _fields(kind)))


def has_setting(recipe: Recipe, name: str) -> bool:
    """Whether one of the recipe's methods has a setting, by its name as an option."""
    return receiver(_kinds(recipe), name) is not None


def fitting(recipe: Recipe) -> Recipe:
    """The recipe without the rank and the options that none of its methods has."""
    options = {name: value for name, value in recipe.options.items() if has_setting(recipe, name)}
    return dataclasses.replace(recipe, rank=recipe.rank if has_setting(recipe, "rank") else None, options=options)


def check_used(asked: Recipe, rows: Mapping[str, Recipe]) -> None:
    """Raises ValueError if the rank, an option or a pattern that was asked for is for no row, a recipe by its name."""
    recipes = rows.values()
    known = sorted({name for recipe in recipes for name in settings_of(recipe)})
    for name in [*asked.options, *(name for name in ("rank", "targets", "exclude") if getattr(asked, name))]:
        patterns = name in ("targets", "exclude")
        if not any(getattr(recipe, name) if patterns else has_setting(recipe, name) for recipe in recipes):
            near = difflib.get_close_matches(name, [] if patterns else known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out, or add a method that has it"
            raise ValueError(f"no method here ({', '.join(rows)}) has the setting {name!r}; {hint}")


def rank_of(recipe: Recipe) -> Any:
    """The rank of the recipe's first method that has one; None if none has."""
    return next((method.rank for method in methods_of(recipe) if hasattr(method, "rank")), None)


def resolved(recipe: Recipe) -> Recipe:
    """The recipe without shorthands: each key names its own method, with the settings that the recipe gives it."""
    settings = _settings(recipe)
    keys: dict[str, Any] = {kind.key: {kind.name: given} if given else kind.name for kind, given in settings.items()}
    return dataclasses.replace(recipe, **keys, rank=None, options={})


def with_changed_defaults(recipe: Recipe, *, began: bool = False) -> Recipe:
    """The recipe of a run with every setting named whose default has changed. If the run `began`, those it does not name are what they
    were once."""
    built = {type(method): method for method in methods_of(recipe)}
    changes: dict[str, Any] = {}
    for kind, given in _settings(recipe).items():
        kept = {
            name: old if began else getattr(built[kind], name) for name, old in kind.once.items() if name not in given
        }
        if kept:
            changes[kind.key] = {kind.name: {**given, **kept}}
    return dataclasses.replace(resolved(recipe), **changes) if changes else recipe


def written_out(recipe: Recipe) -> Recipe:
    """The recipe with all settings that it leaves to its size written under its keys, so that the size may change."""
    keys: dict[str, Any] = {}
    for method in methods_of(recipe):
        settings = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
        given = {f.name: settings[f.name] for f in dataclasses.fields(method) if settings[f.name] != _default(f)}
        if "rank" in settings:
            given["rank"] = settings["rank"]
        keys[method.key] = {method.name: given} if given else method.name
    return dataclasses.replace(recipe, **keys, rank=None, options={})


def schedule_of(recipe: Recipe) -> Callable[[int], float]:
    """Multiplier of the learning rate by steps done: a method's own, or else a linear warm-up and a cosine.

    Raises:
        ValueError: the recipe has too few steps for the method's schedule.
    """
    given = (recipe.scheduled, recipe.warmup, recipe.min_lr_ratio)
    own = [schedule for method in methods_of(recipe) if (schedule := method.schedule(*given)) is not None]
    return own[0] if own else lambda step: warmup_cosine(step, *given)


# ---- the optimizer of a recipe


def optimizer_groups(recipe: Recipe, model: nn.Module, found: Methods | None = None) -> list[dict[str, Any]]:
    """Parameter groups of the recipe's optimizer. `targets` and `exclude` choose what is projected where the model is
    dense; else they have chosen what was converted."""
    found = found or methods_of(recipe)
    dense = found.method.name == "dense"
    groups = plain_groups(model, recipe.weight_decay, recipe.decay)
    patterns = (recipe.targets, recipe.exclude) if dense else (None, None)
    return found.mover.parameter_groups(model, groups, *patterns)


def build_optimizer(recipe: Recipe, model: nn.Module, found: Methods | None = None) -> Optimizer:
    """The recipe's optimizer over the trained parameters of a model; of other methods than the recipe's if `found`."""
    found = found or methods_of(recipe)
    beta1, beta2 = recipe.betas
    groups = optimizer_groups(recipe, model, found)
    projected = [(p, group["rank"]) for group in groups if group.get("rank") for p in group["params"]]
    if projected and all(min(p.shape[-2:]) <= rank for p, rank in projected):
        name, lowest, highest = found.mover.name, min(r for _, r in projected), max(r for _, r in projected)
        logger.warning(
            f"{name} projects nothing: its rank {highest} is not below the narrower side of any of its matrices; give it a lower one, "
            f"for example --set optimizer.{name}.rank={max(1, lowest // 4)}"
        )
    made: Any = found.mover.optimizer(groups, lr=recipe.lr, betas=(beta1, beta2), eps=recipe.eps)
    made.lorank_method = found.optimizer  # `step_hook` asks it too
    made.register_load_state_dict_pre_hook(partial(_with_settings, found.mover.once))
    return made


def _with_settings(changed: Mapping[str, Any], made: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A saved state whose groups have the recipe's settings where they name none of those whose default has changed: 0.1 saved none, and
    `with_changed_defaults` has decided them."""
    own, kept = made.param_groups, state["param_groups"]
    if len(own) != len(kept):
        return state  # which torch refuses
    groups = [
        {**{name: ours[name] for name in changed if name in ours}, **saved}
        for ours, saved in zip(own, kept, strict=True)
    ]
    return {**state, "param_groups": groups}


def state_bytes(recipe: Recipe, model: nn.Module, found: Methods | None = None) -> int:
    """Bytes that the recipe's optimizer keeps between steps, counters not included, and what undoes the rounding of weights
    that the method edits."""
    found = found or methods_of(recipe)
    mover, groups = found.mover, optimizer_groups(recipe, model, found)
    return rests_bytes(model) + sum(mover.state_bytes(p, group) for group in groups for p in group["params"])


def step_flops(recipe: Recipe, model: nn.Module, *, micro_batches: int = 1) -> float:
    """FLOPs of the matrix products in an average step of the recipe's optimizer; see `Method.step_flops`."""
    mover, groups = methods_of(recipe).mover, optimizer_groups(recipe, model)
    return sum(mover.step_flops(p, group, micro_batches=micro_batches) for group in groups for p in group["params"])


def gathered_bytes(recipe: Recipe, model: nn.Module) -> float:
    """Bytes that the recipe's optimizer makes whole in each process in an average step, if the model is sharded; see
    `Method.gathered_bytes`."""
    mover, groups = methods_of(recipe).mover, optimizer_groups(recipe, model)
    return sum(mover.gathered_bytes(p, group) for group in groups for p in group["params"])


def kept_gradients(recipe: Recipe, model: nn.Module) -> dict[nn.Parameter, tuple[int, ...]]:
    """Shape of what waits for the step, for each parameter whose gradient does not wait whole."""
    mover, groups = methods_of(recipe).mover, optimizer_groups(recipe, model)
    kept = {p: mover.kept_gradient(p, group) for group in groups for p in group["params"]}
    return {p: shape for p, shape in kept.items() if torch.Size(shape) != p.shape}


# ---- names


def _named(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The names under the three keys, with the options given there."""
    found: dict[str, dict[str, Any]] = {}
    for key in KEYS:
        value = getattr(recipe, key)
        entries = {name: {} for name in names_joined(value)} if isinstance(value, str) else value
        if not entries:
            raise ValueError(f"{key} must name a method, got an empty mapping")
        for name, options in entries.items():
            if not isinstance(options, Mapping):
                raise ValueError(f"{key}.{name} must be settings {{NAME: VALUE}}, got {options!r}")
            own = find(str(name)).key
            if key != "method" and own != key:
                raise ValueError(f"{key} must be one of {', '.join(method_names(key))}, got {name!r}; use {own}={name}")
            found.setdefault(str(name), {}).update(options)
    return found


def _kinds(recipe: Recipe) -> dict[type[Method], dict[str, Any]]:
    """One class for each of the three keys, in their order, with the options given under its name."""
    kinds: dict[type[Method], dict[str, Any]] = {find(name): dict(given) for name, given in _named(recipe).items()}
    for key, default in zip(KEYS, DEFAULTS, strict=True):
        under = [kind for kind in kinds if kind.key == key]
        if len(under) > 1 and any(
            kind.name == default for kind in under
        ):  # a default gives way, its settings are passed on
            given = kinds.pop(find(default))
            next(settings for kind, settings in kinds.items() if kind.key == key).update(given)
        elif not under:
            kinds[find(default)] = {}
    plain = [kind for kind in kinds if _is_plain_rule(kind)]
    projecting = [kind for kind in kinds if kind.key == "optimizer" and kind not in plain]
    joined = [value.split("+") for key in KEYS if isinstance(value := getattr(recipe, key), str)]
    together = any(plain[0].name in names and projecting[0].name in names for names in joined if plain and projecting)
    rules = field_types(projecting[0]).get("rule") if plain and projecting else None
    inside = rules is not None and fits(plain[0].name, rules)
    if plain and projecting and not together:  # "method: galore, optimizer: muon": the rule works inside the subspace
        if not inside:
            raise ValueError(
                f"{plain[0].name} and {projecting[0].name} cannot be combined: both decide how the weights move"
            )
        kinds.pop(plain[0])
        kinds[projecting[0]].setdefault("rule", plain[0].name)
    elif inside:
        rule, subspace = plain[0].name, projecting[0].name
        others = "+".join(name for name in next(names for names in joined if rule in names) if name != rule)
        raise ValueError(
            f"{rule} and {subspace} cannot be joined by '+', because both decide how the weights move; for {rule} inside the subspace of {subspace} "
            f"use method={others} and optimizer={rule}"
        )
    check_combination(list(kinds))
    return dict(sorted(kinds.items(), key=lambda item: KEYS.index(item[0].key)))


def _settings(recipe: Recipe) -> dict[type[Method], dict[str, Any]]:
    """The same with the recipe's `rank` and `options`, each for the first method with a field of that name."""
    kinds = _kinds(recipe)
    if recipe.rank is not None and "rank" in recipe.options:
        raise ValueError(f"rank is given twice, as rank={recipe.rank} and among the options; give it once")
    shorthand = {**recipe.options, **({} if recipe.rank is None else {"rank": recipe.rank})}
    for name, value in shorthand.items():
        owner = receiver(kinds, name)
        if owner is None:
            own_first = sorted(kinds, key=lambda kind: kind.name in DEFAULTS)
            fields = dict.fromkeys(f for kind in own_first for f in _fields(kind))
            asked = "+".join(name for name in _named(recipe) if name not in DEFAULTS[1:]) or "dense"
            raise ValueError(f"{asked} has no setting {name!r}; its settings are: {', '.join(fields)}")
        own = name.rpartition(".")[2]
        if own in kinds[owner]:
            where = "rank" if name == "rank" and recipe.rank is not None else f"options.{name}"
            raise ValueError(f"{own} of {owner.name} is given twice, as {where} and under {owner.name}; give it once")
        kinds[owner][own] = value
    for kind, given in kinds.items():
        for name in given:
            if name not in _fields(kind):
                known = ", ".join(_fields(kind)) or "none"
                others = ", ".join(other for other in method_names(kind.key) if name in _fields(find(other)))
                hint = f"; {name} is a setting of {others}" if others else ""
                raise ValueError(f"{kind.name} has no setting {name!r}; its settings are: {known}{hint}")
    return kinds


def has_plain_rule(recipe: Recipe) -> bool:
    """Whether the recipe's weights move by Muon, Adafactor or the like instead of AdamW or a method's own optimizer."""
    return any(_is_plain_rule(kind) for kind in _kinds(recipe))


def _is_plain_rule(kind: type[Method]) -> bool:
    """Muon, Adafactor and the like: an optimizer that projects nothing and does not know of factors, and so names no `rule`."""
    return (
        kind.key == "optimizer" and "rank" not in _fields(kind) and not hasattr(kind, "rule") and kind.name != "adamw"
    )


def _fields(kind: type[Method]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _default(field: "dataclasses.Field[Any]") -> Any:
    made: Any = field.default_factory
    return made() if field.default is dataclasses.MISSING else field.default
