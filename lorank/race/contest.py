"""Who takes part in a comparison, with which settings: from what the user asked for to the recipe of every run.

Beside the methods that were named there are controls: the dense model trained by AdamW and by Muon, and `dense-small`, a
dense model made narrower until it costs what the cheapest method costs: FLOPs per token, or if no method saves those,
parameters or memory. There is no dense-small where no method saves any of them or the architecture cannot be made narrower.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

import yaml

from lorank.race.matching import CLOSE, Costs, Figure, Match, flops_of, match_structure, narrow_to_match, with_steps
from lorank.train.model import build_config, schedule_of, written_out
from lorank.train.recipe import Recipe, published_lr

MATCHES = ("tokens", "flops", "time", "params", "memory")
RATES = (1e-3, 3e-3, 9e-3)
"""Tried where neither a learning rate nor a sweep is asked for."""
AROUND = (1 / 3, 1.0, 3.0)
"""Times the learning rate that is asked for: what the dense rows try."""
SHARED = [
    "method",
    "seed",
    "data_seed",
    "data",
    "validation",
    "text_column",
    "tokenizer",
    "vocab_size",
    "sequence_length",
    "documents",
    "batch_size",
    "steps",
    "eval_every",
    "eval_tokens",
    "log_every",
    "save_every",
    "keep",
    "report_to",
    "size",
    "model",
]
"""Settings in which compared runs do not differ, or which have a flag of their own."""
LOW_RANK_ONLY = ("rank", "options", "targets", "exclude")
CONTROL = "dense-small"
STRUCTURE: dict[str, Figure] = {"params": "parameters", "memory": "memory_bytes"}
"""What is matched by rank or width, and the figure that says so."""
SAVINGS: dict[Figure, str] = {
    "flops_per_token": "training FLOPs per token",
    "parameters": "parameters",
    "memory_bytes": "memory (estimated)",
}
"""What the control has as little of as the cheapest method: the first of them that any method saves."""
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
"""No names of files on Windows, with or without an extension."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the user asks for; ValueError in one sentence if it makes no sense."""

    base: Recipe
    """What all have in common."""
    methods: Sequence[str]
    """Each METHOD or NAME=METHOD."""
    seeds: Sequence[int] = (42,)
    sweep: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    """Setting -> the values among which each contestant's best is chosen."""
    own: Mapping[str, Mapping[str, Sequence[Any]]] = dataclasses.field(default_factory=dict)
    """Contestant -> setting -> its own values instead."""
    tuned: Literal["none", "dense", "all"] = "none"
    """Whose learning rate is chosen where `sweep` and `own` do not say: nobody's, all train at the base's; of dense rows, the best
    around it; everybody's, the one that the method's recipe of the size names, and for dense rows and where there is none the
    best of `RATES`."""
    match: Match = "tokens"
    tasks: Sequence[str] = ()
    """Of lm-evaluation-harness."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("no method is named; give at least one, for example --method cola --method dense")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} are none or hold one twice; give different ones, such as 1,2,3")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"seed {seed} is not from 0 to 2**32 - 1; give different ones, such as 1,2,3")
        if self.match not in MATCHES:
            raise ValueError(f"match={self.match!r} is none of {', '.join(MATCHES)}")
        for settings in (self.sweep, *self.own.values()):
            for name, values in settings.items():
                self._check(name, values)

    def _check(self, name: str, values: Sequence[Any]) -> None:
        if name in SHARED:
            raise ValueError(f"{name} is the same for all that are compared; give it as a flag or in the recipe")
        cost = name.partition(".")[0] in (
            *LOW_RANK_ONLY,
            "option",
            "checkpoint",
            "checkpoint_every",
            "micro_batch_size",
        )
        if self.match in ("params", "memory", "time") and cost and len(values) > 1:
            raise ValueError(
                f"--match {self.match} settles each contestant's cost once, so {name} cannot be swept beside it"
            )
        if self.match in ("params", "memory") and name == "rank":
            raise ValueError(f"--match {self.match} chooses the rank itself; leave {name} out")
        if not values:
            raise ValueError(f"{name} has no values to try; give some, for example lr=1e-3,3e-3")
        tried = [with_setting(self.base, name, value) for value in values]
        for value, recipe in zip(values, tried, strict=True):
            if tried.count(recipe) > 1:
                raise ValueError(f"{name}={value} is given twice among the values to try; give each once")

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, equal for equal comparisons."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**{**fields, "base": Recipe.from_dict(fields["base"])})


@dataclasses.dataclass
class Candidate:
    """A contestant with one choice of the swept settings; the recipe lacks its seed only."""

    settings: dict[str, Any]
    recipe: Recipe
    flops: float
    """Of the whole run, recomputation counted."""
    memory_bytes: float | None
    """Of one micro-batch, estimated; where that is what is matched."""


@dataclasses.dataclass
class Contestant:
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
    """Of the control: what of whom it has, in words."""


def parse_values(text: str) -> tuple[str, list[Any]]:
    """NAME=V1,V2 as a name and its values.

    >>> parse_values("lr=1e-3,3e-3")
    ('lr', [0.001, 0.003])
    """
    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise ValueError(f"{text!r} is not NAME=VALUE,VALUE..., for example lr=1e-3,3e-3")
    return name.replace("-", "_"), [_number(value) for value in values.split(",")]


def _number(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value  # YAML's floats want a dot, 1e-3 has none
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is no value; give a number or a word") from None
    except ValueError:
        return value


def with_setting(recipe: Recipe, name: str, value: Any) -> Recipe:
    """The recipe with one setting changed; options.NAME is a field of the method."""
    head, dot, field = name.partition(".")
    if head in ("option", "options") and dot:
        return dataclasses.replace(recipe, options={**recipe.options, field: value})
    return Recipe.from_dict({**recipe.to_dict(), name: value})


def slug(settings: Mapping[str, Any]) -> str:
    """Settings as a piece of a file name, another one for every value.

    >>> slug({"lr": 0.003, "rank": 64}), slug({"betas": [0.9, 0.95]})
    ('lr=0.003_rank=64', 'betas=%5B0.9%2C%200.95%5D')
    """
    return quote("_".join(f"{name}={value}" for name, value in settings.items()), safe="=+") or "run"


def find_contestants(comparison: Comparison) -> dict[str, tuple[Recipe, str]]:
    """Name -> (recipe, kind) of all but the control, the user's order kept."""
    found: dict[str, tuple[Recipe, str]] = {}

    def add(name: str, recipe: Recipe, kind: str) -> None:
        if name.casefold() in map(str.casefold, (*found, CONTROL)):  # one folder where case does not count
            way_out = f"give one another name, as in --method my-{name}={recipe.method}"
            raise ValueError(f"two contestants are called {name!r}; {way_out}")
        folder = re.fullmatch(r"\w[\w.+-]{0,63}", name) and not name.endswith(".")
        if not folder or name.partition(".")[0].lower() in DEVICES:
            raise ValueError(
                f"{name!r} is no name for a contestant, which has a folder of that name; take up to 64 letters, digits, '.', '+', "
                "'-' and '_', a letter or digit first and no '.' last"
            )
        found[name] = (recipe, kind)

    base = comparison.base
    dense = dataclasses.replace(base, method="dense", rank=None, options={}, targets=[], exclude=[])

    def add_dense(name: str) -> None:
        """With both optimizers; a dense row of the user's own with one of them is one more."""
        add(name, dense, "dense")
        for other in ("adamw", "muon"):
            if other != base.optimizer:
                add(f"dense-{other}", with_setting(dense, "optimizer", other), "dense")

    for text in comparison.methods:
        name, equals, method = text.partition("=")
        method = method if equals else name
        if text == "dense":
            add_dense("dense")
        elif method == "dense":
            add(name, dense, "dense")
        else:
            add(name, dataclasses.replace(base, method=method), "method")
    if "dense" not in comparison.methods and base.model != "egg":  # whose like there is not in floating point
        add_dense("dense")
    unknown = [name for name in comparison.own if name not in (*found, CONTROL)]
    if unknown:
        raise ValueError(f"--for {unknown[0]}: there is no such contestant; there are {', '.join((*found, CONTROL))}")
    return found


def plan_contest(
    comparison: Comparison, costs: Costs, folder: Path, seconds_per_step: Mapping[str, float] | None = None
) -> tuple[list[Contestant], str]:
    """Every contestant with the recipes of its candidates, matched to the first one as the comparison says; and why there is
    no control, if there is none.

    Args:
        folder: where the shapes of narrower models are written.
        seconds_per_step: contestant -> measured, for match="time".

    Raises:
        ValueError: a method or setting that does not exist or does not fit; costs that cannot be matched.
    """
    contestants: list[Contestant] = []
    by, target = STRUCTURE.get(comparison.match), None
    for name, (recipe, kind) in find_contestants(comparison).items():
        try:
            chosen, (recipes, rate) = "as it is", _swept(comparison, name, recipe)
            if by and target is not None:
                first, chosen = match_structure(recipes[0][1], costs, target, by, folder / name)
                shape: dict[str, Any] = {"rank": first.rank, "model": first.model}
                recipes = [(settings, dataclasses.replace(written_out(one), **shape)) for settings, one in recipes]
            elif by:
                target = costs.of(by, recipes[0][1])
            contestants.append(_contestant(comparison, name, kind, chosen, recipes, rate, costs))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    control = _control(comparison, contestants, costs, folder)
    contestants += [] if isinstance(control, str) else [control]
    for contestant in contestants:
        for candidate in contestant.candidates:
            steps = _matched_steps(comparison, contestants[0], contestant, candidate, seconds_per_step or {})
            matched = _at_steps(contestant.name, comparison.match, candidate.recipe, steps)
            candidate.flops *= matched.steps / candidate.recipe.steps
            candidate.recipe = matched
            try:  # better now than when its turn comes
                costs.check(candidate.recipe)
            except (ValueError, ImportError) as error:
                raise ValueError(f"{contestant.name}: {error}") from None
    return contestants, control if isinstance(control, str) else ""


def _at_steps(name: str, match: str, recipe: Recipe, steps: int) -> Recipe:
    """The recipe at so many steps or, if its method takes whole cycles only, at the nearest that it takes.

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
    raise ValueError(f"{name}, at the {steps:,} steps that --match {match} gives it: {refused}") from None


def _swept(comparison: Comparison, name: str, recipe: Recipe) -> tuple[list[tuple[dict[str, Any], Recipe]], str]:
    """The contestant's recipe with every combination of values, and where its learning rate comes from; what its method does
    not have is not swept."""
    values, rate = {**comparison.sweep, **comparison.own.get(name, {})}, "as given, not tuned"
    if "lr" not in values:
        rates, rate = _rates(comparison, recipe)
        values = {**({"lr": rates} if rates else {}), **values}
    if len(values.get("lr", ())) > 1:
        rate = "the best of its sweep"
    if recipe.method == "dense":
        values = {
            key: value for key, value in values.items() if key.partition(".")[0] not in (*LOW_RANK_ONLY, "option")
        }
    if name == f"dense-{recipe.optimizer}":
        values.pop("optimizer", None)
    found = []
    for choice in itertools.product(*values.values()):
        settings, changed = dict(zip(values, choice, strict=True)), recipe
        for key, value in settings.items():
            changed = with_setting(changed, key, value)
        found.append((settings, changed))
    return found, rate


def _rates(comparison: Comparison, recipe: Recipe) -> tuple[list[float], str]:
    """The learning rates that a contestant tries where the user names none for it, and where they come from."""
    given = "as given, not tuned"
    if comparison.tuned == "none" or (comparison.tuned == "dense" and recipe.method != "dense"):
        return [], given
    if recipe.model == "egg":  # its rule has no learning rate of that kind
        return [], "the default of its rule"
    if comparison.tuned == "dense":
        return [float(f"{recipe.lr * part:.4g}") for part in AROUND], ""
    published = None if recipe.model or recipe.method == "dense" else published_lr(recipe.method, recipe.size)
    return list(RATES if published is None else [published]), f"its recipe's at {recipe.size}, not tuned here"


def _contestant(
    comparison: Comparison,
    name: str,
    kind: str,
    chosen: str,
    recipes: Sequence[tuple[dict[str, Any], Recipe]],
    rate: str,
    costs: Costs,
) -> Contestant:
    candidates = []
    for settings, recipe in recipes:
        memory = costs.of("memory_bytes", recipe) if comparison.match == "memory" else None
        candidates.append(Candidate(settings, recipe, flops_of(recipe, costs), memory))
    return Contestant(name, recipes[0][1].method, kind, chosen, candidates, rate)


def _control(comparison: Comparison, contestants: Sequence[Contestant], costs: Costs, folder: Path) -> Contestant | str:
    """The dense model as narrow as costs what the cheapest method costs, or why there is none."""
    dense = dataclasses.replace(
        comparison.base,
        method="dense",
        rank=None,
        options={},
        targets=[],
        exclude=[],
        checkpoint=None,
        checkpoint_every=1,
    )
    methods = [one for one in contestants if one.kind == "method" and one.method != "eggroll"]
    rivals = [(candidate.recipe, one.name) for one in methods for candidate in one.candidates]
    if not rivals:
        return "no method takes part that a narrower model could cost as much as"
    if comparison.base.model == "egg":
        return "EGG has no like in floating point"
    matched = STRUCTURE.get(comparison.match)  # by which the dense rows are as narrow as the first method makes them
    try:
        for by in SAVINGS:
            if by == matched:
                continue
            cheapest, rival = min(((costs.of(by, recipe), name) for recipe, name in rivals), key=lambda pair: pair[0])
            if cheapest < (1 - CLOSE) * costs.of(by, dense):
                break
        else:
            saved = " or ".join(words for by, words in SAVINGS.items() if by != matched)
            return f"no method here costs over {CLOSE:.0%} less than the dense model in {saved}"
        recipe, shape = narrow_to_match(dense, costs, cheapest, by, folder / CONTROL)
    except ValueError as error:
        return str(error)
    like = f"{SAVINGS[by]} of {rival}"
    whole = build_config(dense, costs.tokenizer)
    chosen = f"{shape} (the whole dense model: {whole.hidden_size}), for the {like}"
    recipes, rate = _swept(comparison, CONTROL, recipe)
    control = _contestant(comparison, CONTROL, "control", chosen, recipes, rate, costs)
    return dataclasses.replace(control, like=like)


def _matched_steps(
    comparison: Comparison,
    first: Contestant,
    contestant: Contestant,
    candidate: Candidate,
    seconds_per_step: Mapping[str, float],
) -> int:
    steps = comparison.base.steps
    if comparison.match == "flops":
        return max(1, round(steps * _per_step(first.candidates[0]) / _per_step(candidate)))
    if comparison.match == "time":
        return max(1, round(steps * seconds_per_step[first.name] / seconds_per_step[contestant.name]))
    return steps


def _per_step(candidate: Candidate) -> float:
    return candidate.flops / candidate.recipe.steps
