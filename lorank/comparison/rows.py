"""The rows of a comparison: from what the user asks for to the recipe of every run.

Next to the methods that the user names there are dense models: one trained by AdamW, one by Muon, and for each optimizer a
`dense-small`, made narrower until it costs what the cheapest method costs in FLOPs per token, or if no method saves those,
in parameters or memory (`lorank.comparison.controls`). There is none if no method saves any of them, or if the architecture
cannot be made narrower; and none of these if the user wants the named rows only.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorank.comparison.controls import CONTROL, control_names, dense_twin, find_controls
from lorank.comparison.matching import Costs, Figure, flops_of, is_dense, match_structure, with_steps
from lorank.comparison.settings import LOW_RANK_ONLY, OF_COST, ComparisonSettings
from lorank.evolution.egg_model import EggConfig
from lorank.train.methods import (
    check_used,
    fitting,
    has_plain_rule,
    has_setting,
    methods_of,
    schedule_of,
    title_of,
    written_out,
)
from lorank.train.places import shared_name
from lorank.train.recipe import Recipe, full_name
from lorank.train.shipped import published_lr

RATES = (1e-3, 3e-3, 9e-3)
"""Tried if neither a learning rate nor a sweep is given."""
AROUND = (1 / 3, 1.0, 3.0)
"""Multiples of the given learning rate that the dense rows try."""
STRUCTURE: dict[str, Figure] = {"params": "parameters", "memory": "memory_bytes"}
"""What is matched by rank or width -> the figure that is made equal."""
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
"""Not allowed as file names on Windows, with or without an extension."""
GIVEN = "as given, not tuned"


@dataclasses.dataclass
class Candidate:
    """A row with one choice of the swept settings; its recipe is complete but for the seed."""

    settings: dict[str, Any]
    recipe: Recipe
    flops: float
    """Of the whole run, with recomputation."""
    memory_bytes: float | None
    """Of one micro-batch, estimated; only if memory is matched."""


@dataclasses.dataclass
class Row:
    """One row of the comparison."""

    name: str
    method: str
    kind: str
    """method, dense, or control."""
    chosen: str
    """What was chosen for it to match the others, in words."""
    candidates: list[Candidate]
    rate: str = ""
    """Where its learning rate comes from, in words."""
    like: str = ""
    """For dense-small: what it has in common with which method, in words."""


def find_rows(settings: ComparisonSettings) -> dict[str, tuple[Recipe, str]]:
    """Name -> (recipe, kind) of all rows but the narrower dense models, in the user's order."""
    found: dict[str, tuple[Recipe, str]] = {}
    dense, asked = dense_twin(settings.base), dict[str, Recipe]()
    rule = methods_of(dense).optimizer.name

    def add(name: str, recipe: Recipe, kind: str) -> None:
        _check_name(name, recipe, found)
        found[name] = (recipe, kind)

    def add_dense() -> None:
        """With both optimizers; a dense row of the user's with one of them is a further row."""
        add("dense", dense, "dense")
        for other in ("adamw", "muon"):
            if other != rule:
                add(f"dense-{other}", dense_twin(dataclasses.replace(settings.base, optimizer=other)), "dense")

    for text in settings.methods:
        name, _, method = text.partition("=")
        method = method or name
        recipe = fitting(dataclasses.replace(settings.base, method=method))
        if text == "dense" and not settings.only:
            add_dense()
        elif method == "dense":
            add(name, dense, "dense")
        elif is_dense(recipe):  # muon, adafactor
            mover = methods_of(dataclasses.replace(dense, method=recipe.method, optimizer="adamw")).optimizer.name
            given = recipe.optimizer if isinstance(recipe.optimizer, dict) and mover in recipe.optimizer else mover
            add(name, dense_twin(dataclasses.replace(settings.base, optimizer=given)), "dense")
            asked[name] = found[name][0]
        else:
            add(name, recipe, "method")
            asked[name] = recipe
    if not (settings.only or "dense" in settings.methods or in_integers(settings.base)):
        add_dense()
    if asked:
        dotted = [shared_name(full_name(name)).partition(".") for name in settings.sweep]
        swept = {entry: None for head, _, entry in dotted if head == "options"}
        check_used(dataclasses.replace(settings.base, options={**settings.base.options, **swept}), asked)
    names = [*found, *([] if settings.only else control_names(found))]
    for name in settings.own:
        if name not in names:
            raise ValueError(f"--for {name}: no such row; the rows are {', '.join(names)}")
    return found


def _check_name(name: str, recipe: Recipe, found: Mapping[str, Any]) -> None:
    taken = name.casefold() in map(str.casefold, found)  # one folder where case does not count
    if taken or name.casefold().startswith(CONTROL):
        raise ValueError(f"the name {name!r} is taken; rename the row, as in --method my-{name}={recipe.method}")
    is_folder = re.fullmatch(r"\w[\w.+-]{0,63}", name) and not name.endswith(".")
    if not is_folder or name.partition(".")[0].lower() in DEVICES:
        raise ValueError(
            "a row's name is also a folder's: it must be up to 64 letters, digits, '.', '+', '-' and '_', begin with a "
            f"letter or digit and not end with '.', got {name!r}"
        )


def in_integers(recipe: Recipe) -> bool:
    """Whether the model is EGG, which has no dense twin in floating point and no learning rate of the usual kind."""
    return recipe.model == EggConfig.model_type


def plan_rows(
    settings: ComparisonSettings, costs: Costs, folder: Path, seconds_per_step: Mapping[str, float] | None = None
) -> tuple[list[Row], dict[str, str]]:
    """Every row with the recipes of its candidates, matched to the first one as the settings say; and the dense-small
    that are missing, with the reason.

    Args:
        folder: where the shapes of narrower models are written.
        seconds_per_step: row -> measured, for match="time".

    Raises:
        ValueError: a method or setting that does not exist or does not fit, or costs that cannot be matched.
    """
    rows: list[Row] = []
    by, target = STRUCTURE.get(settings.match), None
    for name, (recipe, kind) in find_rows(settings).items():
        try:
            chosen, (recipes, rate) = "as it is", candidates_of(settings, name, recipe)
            if by and target is not None:
                first, chosen = match_structure(recipes[0][1], costs, target, by, folder / name)
                shape: dict[str, Any] = {} if first.rank is None else {"rank": first.rank}
                shape |= {"model": first.model, "shape": first.shape}
                recipes = [(values, written_out(one).but(shape)) for values, one in recipes]
            elif by:
                target = costs.of(by, recipes[0][1])
            rows.append(_row(settings, name, kind, chosen, recipes, rate, costs))
        except ValueError as error:
            raise _of_row(name, error) from None
    controls, missing = _controls(settings, rows, costs, folder)
    rows += controls
    for row in rows:
        for candidate in row.candidates:
            steps = _matched_steps(settings, rows[0], row, candidate, seconds_per_step or {})
            matched = _at_steps(row.name, settings.match, candidate.recipe, steps)
            candidate.flops *= matched.steps / candidate.recipe.steps
            candidate.recipe = matched
            try:  # better now than when its turn comes
                costs.check(candidate.recipe)
            except (ValueError, ImportError) as error:
                raise _of_row(row.name, error) from None
    return rows, missing


def _of_row(name: str, error: Exception) -> ValueError:
    """The same sentence, which begins with the row's name."""
    said = str(error)
    return ValueError(said if said.startswith(f"{name} ") else f"{name}: {said}")


def _at_steps(name: str, match: str, recipe: Recipe, steps: int) -> Recipe:
    """The recipe with that many steps, or if its method needs whole cycles, with the nearest number that it allows.

    Raises:
        ValueError: there is none within a quarter.
    """
    refused: ValueError | None = None
    for away in range(steps // 4 + 1):
        for near in (steps - away, steps + away):
            matched = with_steps(recipe, near)
            try:
                schedule_of(matched)
            except ValueError as error:
                refused = refused or error
            else:
                return matched
    raise ValueError(f"{name}, with the {steps:,} steps that --match {match} gives it: {refused}") from None


def candidates_of(
    settings: ComparisonSettings, name: str, recipe: Recipe
) -> tuple[list[tuple[dict[str, Any], Recipe]], str]:
    """The row's recipe with every combination of values, and where its learning rate comes from. What a dense model
    does not have is not swept."""
    swept = {key: tried for key, tried in settings.sweep.items() if _has(recipe, key)}
    values, rate = {**swept, **settings.own.get(name, {})}, GIVEN
    if "lr" not in values:
        rates, rate = _rates(settings, recipe)
        values = {**({"lr": rates} if rates else {}), **values}
    if len(values.get("lr", ())) > 1:
        rate = "the best of its sweep"
    if is_dense(recipe):
        values = {key: value for key, value in values.items() if not _is_low_rank(key, recipe)}
    if name == f"dense-{recipe.optimizer}":
        values.pop("optimizer", None)
    found = []
    for choice in itertools.product(*values.values()):
        chosen, changed = dict(zip(values, choice, strict=True)), recipe
        for key, value in chosen.items():
            changed = changed.but({key: value})
        found.append((chosen, changed))
    return found, rate


def _has(recipe: Recipe, setting: str) -> bool:
    """Whether the recipe's methods have a setting that is given to all rows."""
    head, _, entry = shared_name(full_name(setting)).partition(".")
    return has_setting(recipe, entry or head) if head in ("options", "rank") else True


def _is_low_rank(setting: str, recipe: Recipe) -> bool:
    """Whether a setting means nothing to a dense model with the optimizer of this recipe."""
    head, dot, entry = shared_name(full_name(setting)).partition(".")
    return not has_setting(recipe, entry) if dot and head == "options" else head in LOW_RANK_ONLY


def _rates(settings: ComparisonSettings, recipe: Recipe) -> tuple[list[float], str]:
    """The learning rates that a row tries if the user gives none for it, and where they come from."""
    if settings.tuned == "none" or (settings.tuned == "dense" and not is_dense(recipe)):
        return [], GIVEN
    if in_integers(recipe):
        return [], "the default of its rule"
    if settings.tuned == "dense":
        return [float(f"{recipe.lr * part:.4g}") for part in AROUND], ""
    elsewhere = (
        recipe.model or is_dense(recipe) or has_plain_rule(recipe)
    )  # papers' rates are for AdamW or their own optimizer
    published = None if elsewhere else published_lr(title_of(recipe), recipe.size)
    return list(RATES if published is None else [published]), f"from its {recipe.size} recipe, not tuned here"


def _row(
    settings: ComparisonSettings,
    name: str,
    kind: str,
    chosen: str,
    recipes: Sequence[tuple[dict[str, Any], Recipe]],
    rate: str,
    costs: Costs,
) -> Row:
    candidates = []
    for values, recipe in recipes:
        memory = costs.of("memory_bytes", recipe) if settings.match == "memory" else None
        candidates.append(Candidate(values, recipe, flops_of(recipe, costs), memory))
    return Row(name, title_of(recipes[0][1]), kind, chosen, candidates, rate)


def _controls(
    settings: ComparisonSettings, rows: Sequence[Row], costs: Costs, folder: Path
) -> tuple[list[Row], dict[str, str]]:
    """The narrower dense models, and why there is none, by name."""
    if settings.only:
        return [], {}
    if in_integers(settings.base):
        return [], {CONTROL: "EGG has no dense twin in floating point"}
    methods = [(row.name, one.recipe) for row in rows if row.kind == "method" for one in row.candidates]
    dense = [row.candidates[0].recipe for row in rows if row.kind == "dense"]
    found, missing = find_controls(settings.base, methods, dense, costs, STRUCTURE.get(settings.match), folder)
    made = []
    for name, recipe, chosen, like in found:
        recipes, rate = candidates_of(settings, name, recipe)
        control = _row(settings, name, "control", chosen, recipes, rate, costs)
        made.append(dataclasses.replace(control, like=like))
    return made, missing


EXTENSIONS = 2
"""How many values a sweep may be extended by."""


def beyond(candidates: Sequence[Candidate], losses: Sequence[float | None]) -> Candidate | None:
    """The next candidate if the best one is at the edge of its sweep: one more step of the same ratio, with its other
    settings. None if it is not at an edge, or only settings that change the cost are.

    Args:
        losses: of each candidate; None if its run failed.
    """
    done = [(loss, place) for place, loss in enumerate(losses) if loss is not None]
    if not done:
        return None
    best = candidates[min(done)[1]]
    for name, value in best.settings.items():
        tried = sorted({one.settings[name] for one in candidates if isinstance(one.settings[name], float)})
        free = full_name(name).partition(".")[0] not in OF_COST
        if free and len(tried) > 1 and tried[0] > 0 and value in (tried[0], tried[-1]):
            ratio = tried[-1] / tried[-2] if value == tried[-1] else tried[0] / tried[1]
            further = float(f"{value * ratio:.4g}")
            recipe = best.recipe.but({name: further})
            return dataclasses.replace(best, settings={**best.settings, name: further}, recipe=recipe)
    return None


def _matched_steps(
    settings: ComparisonSettings,
    first: Row,
    row: Row,
    candidate: Candidate,
    seconds_per_step: Mapping[str, float],
) -> int:
    steps = settings.base.steps
    if settings.match == "flops":
        return max(1, round(steps * _per_step(first.candidates[0]) / _per_step(candidate)))
    if settings.match == "time":
        return max(1, round(steps * seconds_per_step[first.name] / seconds_per_step[row.name]))
    return steps


def _per_step(candidate: Candidate) -> float:
    return candidate.flops / candidate.recipe.steps
