"""What a user asks of a comparison, checked before anything is read or built."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self
from urllib.parse import quote

import yaml

from lorank.comparison.matching import Match
from lorank.train.places import as_typed
from lorank.train.recipe import KEYS, Recipe, full_name, settings_with
from lorank.train.yamls import load

MATCHES = ("tokens", "flops", "time", "params", "memory")
STRUCTURAL = ("params", "memory")
"""What is matched by rank or width."""
LOW_RANK_ONLY = ("rank", "options", "targets", "exclude", "method", "gradient")
"""Settings, or with a dot entries of settings, that a dense model has no use for."""
OF_COST = (*LOW_RANK_ONLY, "checkpoint", "checkpoint_every", "micro_batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """What the user asks for; ValueError in one sentence if it makes no sense."""

    base: Recipe
    """What all rows have in common."""
    methods: Sequence[str]
    """Each METHOD or NAME=METHOD, where METHOD may be several joined by "+"."""
    seeds: Sequence[int] = (42,)
    sweep: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    """Setting -> the values among which each row's best is chosen."""
    own: Mapping[str, Mapping[str, Sequence[Any]]] = dataclasses.field(default_factory=dict)
    """Row -> setting -> its own values instead."""
    tuned: Literal["none", "dense", "all"] = "none"
    """Whose learning rate is chosen where `sweep` and `own` do not say. "none": all train at the base's. "dense": dense
    rows use the best around the base's. "all": a method uses the one that its recipe of the size names; dense rows, and
    methods without that recipe, use the best of `lorank.comparison.rows.RATES`."""
    match: Match = "tokens"
    tasks: Sequence[str] = ()
    """Of lm-evaluation-harness."""
    only: bool = False
    """Whether the named methods are compared alone, without dense rows."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("no method is named; give at least one, for example --method cola --method dense")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different whole numbers such as 1,2,3, got {list(self.seeds)}")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"seeds must be from 0 to 2**32 - 1, got {seed}")
        if self.base.push_to_hub is not None:
            raise ValueError(
                "push_to_hub must be left out of a comparison, whose models would all go to one place; push one of them with: "
                "lorank export RUN --push-to-hub NAME"
            )
        if self.match not in MATCHES:
            raise ValueError(f"match must be one of {', '.join(MATCHES)}, got {self.match!r}")
        for settings in (self.sweep, *self.own.values()):
            for name, values in settings.items():
                self._check(name, values)

    def _check(self, name: str, values: Sequence[Any]) -> None:
        head = full_name(name).partition(".")[0]
        if full_name(name) in settings_with("shared") or head == "shape":
            raise ValueError(f"{name} is the same for all rows; give it as a flag or in the recipe")
        if self.match in STRUCTURAL and name.rpartition(".")[2] == "rank":
            raise ValueError(f"--match {self.match} chooses the rank; leave out {name}")
        if self.match in (*STRUCTURAL, "time") and head in OF_COST and len(values) > 1:
            raise ValueError(f"--match {self.match} fixes the cost of each row, so {name} cannot be swept")
        if not values:
            raise ValueError(f"{name} needs at least one value, for example lr=1e-3,3e-3")
        of_row = head in KEYS and "." in name  # the base may not name the method
        tried = list(values) if of_row else [self.base.but({name: value}) for value in values]
        for value, recipe in zip(values, tried, strict=True):
            if tried.count(recipe) > 1:
                raise ValueError(f"{name}={value} is given twice; give each value once")

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, equal for equal settings."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**{**fields, "base": Recipe.from_dict(fields["base"])})


def parse_values(text: str) -> tuple[str, list[Any]]:
    """NAME=V1,V2 as a name and its values.

    >>> parse_values("lr=1e-3,3e-3")
    ('lr', [0.001, 0.003])
    """
    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise ValueError(f"a sweep must be NAME=VALUE,VALUE..., for example lr=1e-3,3e-3, got {text!r}")
    return as_typed(name), [_value(value) for value in values.split(",")]


def _value(text: str) -> Any:
    try:
        return load(text)
    except yaml.YAMLError:
        raise ValueError(f"a value must be a number or a word, got {text!r}") from None


def slug(settings: Mapping[str, Any]) -> str:
    """Settings as a part of a file name, different for different settings.

    >>> slug({"lr": 0.003, "rank": 64}), slug({"betas": [0.9, 0.95]})
    ('lr=0.003_rank=64', 'betas=%5B0.9%2C%200.95%5D')
    """
    return quote("_".join(f"{name}={value}" for name, value in settings.items()), safe="=+") or "run"
