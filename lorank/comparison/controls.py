"""The dense models that a method must beat: narrower until they cost what the cheapest method costs.

A method that saves compute is not better because it is cheaper: a smaller dense model is cheaper too. `dense-small` is that
model, trained by each optimizer with which the full dense model is trained.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorank.comparison.matching import CLOSE, Costs, Figure, estimates_gradient, is_dense, narrow_to_match
from lorank.train.methods import fitting, methods_of
from lorank.train.model import build_config
from lorank.train.recipe import Recipe

CONTROL = "dense-small"
SAVINGS: dict[Figure, str] = {
    "flops_per_token": "training FLOPs per token",
    "parameters": "parameters",
    "memory_bytes": "memory (estimated)",
}
"""What dense-small has as little of as the cheapest method: the first of them that any method saves."""


class Control(NamedTuple):
    """A narrower dense model."""

    name: str
    recipe: Recipe
    chosen: str
    """Its shape, and for what, in words."""
    like: str
    """What it has in common with which method, in words."""


def dense_twin(base: Recipe) -> Recipe:
    """The recipe without a low-rank method: a plain model, autograd, an optimizer that projects nothing, with those of the options
    that it has."""
    plain: dict[str, Any] = {"rank": None, "targets": [], "exclude": []}
    twin = dataclasses.replace(base, method="dense", gradient="autograd", **plain)
    return fitting(twin if is_dense(twin) else dataclasses.replace(twin, optimizer="adamw"))


def find_controls(
    base: Recipe,
    methods: Sequence[tuple[str, Recipe]],
    dense: Sequence[Recipe],
    costs: Costs,
    matched: Figure | None,
    folder: Path,
) -> tuple[list[Control], dict[str, str]]:
    """A narrower model for each optimizer of the dense rows, and why there is none, by name.

    Args:
        methods: name and recipe of each candidate of a low-rank method. A control costs what the cheapest of those with its
            optimizer costs, or of all if none has it.
        dense: the full dense models.
        matched: what is already equal for all rows, which nobody saves.
        folder: where the shapes are written.
    """
    others = [(name, recipe) for name, recipe in methods if not estimates_gradient(recipe)]
    if not others:
        return [], {CONTROL: "no method takes part that a narrower model could cost as much as"}
    found, missing = [], {}
    for name, rule, twin in _names(base, dense):
        same = [(one, recipe) for one, recipe in others if methods_of(recipe).rule == rule]
        try:
            found.append(_narrowed(name, twin, same or others, costs, matched, folder / name))
        except ValueError as error:
            missing[name] = str(error)
    if not found:  # one sentence for all
        missing = {CONTROL: next(iter(missing.values()))} if missing else {}
    return found, missing


def _names(base: Recipe, dense: Sequence[Recipe]) -> Iterator[tuple[str, str, Recipe]]:
    """(name, optimizer's rule, full dense recipe) of each control."""
    seen: list[str] = []
    for row in dense:
        if (rule := methods_of(row).rule) not in seen:
            like: dict[str, Any] = {
                "optimizer": row.optimizer,
                "options": row.options,
                "checkpoint": None,
                "checkpoint_every": 1,
            }
            twin = dense_twin(dataclasses.replace(base, **like))
            yield f"{CONTROL}-{rule}" if seen else CONTROL, rule, twin
            seen.append(rule)


def _narrowed(
    name: str,
    dense: Recipe,
    others: Sequence[tuple[str, Recipe]],
    costs: Costs,
    matched: Figure | None,
    folder: Path,
) -> Control:
    for by, words in SAVINGS.items():
        if by == matched:
            continue
        cheapest, other = min(((costs.of(by, recipe), one) for one, recipe in others), key=lambda pair: pair[0])
        if cheapest < (1 - CLOSE) * costs.of(by, dense):
            recipe, shape = narrow_to_match(dense, costs, cheapest, by, folder)
            whole = build_config(dense, costs.tokenizer)
            like = f"{words} of {other}"
            chosen = f"{shape} (the full dense model: hidden size {whole.hidden_size}), for the {like}"
            return Control(name, recipe, chosen, like)
    saved = " or ".join(words for by, words in SAVINGS.items() if by != matched)
    raise ValueError(f"no method here costs over {CLOSE:.0%} less than the dense model in {saved}")


def control_names(rows: Mapping[str, tuple[Recipe, str]]) -> list[str]:
    """What controls may be called next to these rows, name -> (recipe, kind)."""
    rules = dict.fromkeys(methods_of(recipe).rule for recipe, kind in rows.values() if kind == "dense")
    return [CONTROL, *(f"{CONTROL}-{rule}" for rule in list(rules)[1:])]
