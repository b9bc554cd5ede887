"""A fair comparison: what each row costs, and what is changed so that all spend the same.

Costs are counted on a model without weights, so that a comparison is planned before anything is trained. What may be
matched:

tokens   nothing is changed
flops    steps, so that steps × tokens per step × FLOPs per token (with recomputation and the optimizer's products) are
         those of the first row
time     steps, by the throughput measured in a short run
params   the rank, or if no rank changes it, the width of the model; what a method drops after training does not count
memory   the same, by the estimate of weights, gradients, optimizer state and activations
"""

import contextlib
import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorank import accounting
from lorank.comparison.process import signals_later
from lorank.conversion import method_of
from lorank.plan.counts import memory, optimizer_flops
from lorank.train.build import build_estimator
from lorank.train.methods import methods_of, optimizer_groups, title_of, written_out
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe, settings_with
from lorank.train.shape import uncounted

Match = Literal["tokens", "flops", "time", "params", "memory"]
CLOSE = 0.02
"""How far from its target a match by rank or width may be, as a part of the target."""
MLP_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim")
"""What configurations call the width of the MLP; None in one of them is four times the hidden size."""
ALONG = ("head_dim", "rotary_dim", "word_embed_proj_dim", "embedding_size", "encoder_ffn_dim")
"""Even sizes that follow the hidden size in proportion, where a configuration has them."""
OTHER_WIDTHS = ("_dim", "_rank", "_width", "_hidden_size", "_intermediate_size")
"""How the names of further widths end (latent attention, experts, recurrences); models that have them are not resized."""

Figure = Literal["parameters", "flops_per_token", "memory_bytes"]
"""What is counted: parameters, FLOPs per position with recomputation and the optimizer's products, or bytes of training on
one micro-batch."""


def is_dense(recipe: Recipe) -> bool:
    """Whether nothing in the recipe is low-rank: a plain model, autograd, an optimizer that projects nothing."""
    return title_of(recipe) == "dense"


def estimates_gradient(recipe: Recipe) -> bool:
    """Whether the gradient does not come from autograd."""
    return "gradient" in methods_of(recipe).gradient.answers()


@contextlib.contextmanager
def _trying() -> Iterator[None]:
    """Models that are built inside have no weights, and there are no warnings about ranks beyond break-even."""
    with warnings.catch_warnings(action="ignore"), torch.device("meta"):
        yield


class Costs:
    """Counts the models of a comparison, each figure once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._known: dict[str, float] = {}

    def of(self, figure: Figure, recipe: Recipe, config: PretrainedConfig | None = None) -> float:
        """A figure of a recipe, or of its method on the shape of `config`; ValueError as building the model would."""
        config = build_config(recipe, self.tokenizer) if config is None else config
        free = (*settings_with("free"), *(["optimizer"] if figure == "parameters" else []))
        settings = {name: value for name, value in recipe.to_dict().items() if name not in free}
        key = json.dumps([figure, settings, config.to_dict()], sort_keys=True, default=str)
        if key not in self._known:
            with signals_later():
                with _trying():
                    model = build_model(recipe, config)
                self._known[key] = _count(figure, recipe, model)
        return self._known[key]

    def check(self, recipe: Recipe) -> None:
        """Build what a run builds before it trains: its model, on no device, and its optimizer, on a matrix.

        Raises:
            ValueError, ImportError: as the run would.
        """
        settings = {name: value for name, value in recipe.to_dict().items() if name not in settings_with("free")}
        key = json.dumps(["check", settings], sort_keys=True, default=str)
        if key not in self._known:
            with signals_later(), _trying():
                model = build_model(recipe, build_config(recipe, self.tokenizer))
                groups = optimizer_groups(recipe, model)
                estimator = build_estimator(recipe, model)
            if estimator is None:
                _try_optimizer(recipe, groups)
            self._known[key] = 1.0


def _try_optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> None:
    """Make the optimizer with two small matrices, which may be a pair of factors, in place of each group's parameters."""
    small = [
        {**group, "params": [torch.nn.Parameter(torch.zeros(4, 4)) for _ in group["params"][:2]]} for group in groups
    ]
    for group in small:
        if "rank" in group:
            group["rank"] = 1
    beta1, beta2 = recipe.betas
    methods_of(recipe).mover.optimizer(small, lr=recipe.lr, betas=(beta1, beta2), eps=recipe.eps)


def _count(figure: Figure, recipe: Recipe, model: PreTrainedModel) -> float:
    if figure == "parameters":
        if (method := method_of(model)) is not None:
            method.finalize(model)  # what is saved and reported: MASA drops the network that made its coefficients
        return accounting.count_parameters(model).total
    length, batch = recipe.sequence_length, recipe.micro_batch_size or recipe.batch_size
    if figure == "flops_per_token":
        estimator = build_estimator(recipe, model)
        if estimator is not None:
            passes = estimator.flops_per_token
        else:
            try:
                flops = accounting.measure_flops(model, batch=batch, sequence_length=length)
            except ValueError as error:
                raise uncounted(error, model.config, recipe.shape) from error
            passes = flops.total / (batch * length)
        return passes + optimizer_flops(recipe, model) / (recipe.batch_size * length)
    return memory(recipe, model, batch, devices=1).total_bytes


def nearest(value: Callable[[int], float], target: float, low: int, high: int) -> int:
    """The integer in [low, high] at which a growing function is nearest to `target`; few calls where it is straight.

    >>> nearest(lambda n: 3.0 * n + 1, 30, 1, 100), nearest(lambda n: float(n**3), 60, 1, 100)
    (10, 4)
    """
    below, above = value(low) - target, value(high) - target
    if below >= 0 or below == above:
        return low
    if above <= 0:
        return high
    left, right, last = below, above, 0.0  # an end that stays twice counts half, as in the Illinois method
    while high - low > 1:
        guess = low + int(left / (left - right) * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        at_guess = value(guess) - target
        if at_guess <= 0:
            low, below, left = guess, at_guess, at_guess
            right = right / 2 if last < 0 else above
        else:
            high, above, right = guess, at_guess, at_guess
            left = left / 2 if last > 0 else below
        last = -1.0 if at_guess <= 0 else 1.0
    return low if -below <= above else high


# ---------------------------------------------------------------------------------------------------------------------
# Narrower dense models
# ---------------------------------------------------------------------------------------------------------------------


def resized(config: PretrainedConfig, hidden_size: int, intermediate_size: int) -> PretrainedConfig:
    """The same architecture at another width, with as many blocks and heads.

    Raises:
        ValueError: the configuration does not say how wide the model or its MLP is.
    """
    hidden, mlp = _widths(config)
    new = copy.deepcopy(config)
    new.hidden_size = hidden_size
    setattr(new, mlp, intermediate_size)
    for name in set(ALONG) & set(config.to_dict()):
        if size := getattr(config, name):
            setattr(new, name, 2 * max(1, round(size * hidden_size / hidden / 2)))
    return new


def _widths(config: PretrainedConfig) -> tuple[int, str]:
    """The hidden size, and what the configuration calls the width of its MLP."""
    hidden = getattr(config, "hidden_size", None)
    mlp = next((name for name in MLP_WIDTHS if hasattr(config, name)), None)
    refused = f"a model of type {config.model_type!r} cannot be made narrower: its configuration"
    if hidden is None or mlp is None or not isinstance(getattr(config, mlp), int | None):
        raise ValueError(f"{refused} does not have one hidden size and one MLP width")
    for name, value in config.to_dict().items():
        if name.endswith(OTHER_WIDTHS) and name not in (*ALONG, *MLP_WIDTHS) and value:
            raise ValueError(f"{refused} has a width of another kind ({name}={value})")
    return hidden, mlp


def _hidden_unit(config: PretrainedConfig) -> int:
    """Hidden sizes are multiples of this, so that each head has an even number of rotary positions, even if only a part of
    the head is rotated."""
    rotary = getattr(config, "rope_parameters", None) or {}
    part = rotary.get("partial_rotary_factor") or 1.0
    return 2 * Fraction(part).limit_denominator(64).denominator * config.num_attention_heads


def choose_width(
    config: PretrainedConfig, measure: Callable[[PretrainedConfig], float], target: float
) -> PretrainedConfig:
    """`config` at the width whose `measure` is nearest to `target`.

    Blocks and heads stay. The hidden size is chosen first, at the old proportions; the MLP's width then closes the gap, at
    the next smaller hidden size if that is nearer.

    Raises:
        ValueError: as `resized`.
    """
    hidden, mlp = _widths(config)
    wide, unit = getattr(config, mlp) or 4 * hidden, _hidden_unit(config)

    def proportional(units: int) -> int:
        return max(1, round(units * unit * wide / hidden))

    def closest(units: int) -> tuple[float, PretrainedConfig]:
        most = 16 * proportional(units)
        shape = partial(resized, config, units * unit)
        found = shape(nearest(lambda width: measure(shape(width)), target, 1, most))
        return abs(measure(found) - target), found

    most = max(1, 2 * hidden // unit)
    units = nearest(lambda units: measure(resized(config, units * unit, proportional(units))), target, 1, most)
    away, found = closest(units)
    if away > CLOSE * target and units > 1:
        away, found = min((away, found), closest(units - 1), key=lambda pair: pair[0])
    return found


def narrow_to_match(recipe: Recipe, costs: Costs, target: float, by: Figure, folder: Path) -> tuple[Recipe, str]:
    """The recipe on a model of another width that costs `target` by the figure `by`, written to `folder`; and
    its shape in words.

    Raises:
        ValueError: the architecture cannot be resized, or no width comes near the target.
    """
    whole = build_config(recipe, costs.tokenizer)
    config = choose_width(whole, lambda shape: costs.of(by, recipe, shape), target)
    if _parameter_names(recipe, config) != _parameter_names(recipe, whole):  # a projection between widths, for example
        raise ValueError(
            f"a model of type {whole.model_type!r} cannot be made narrower: at another width it has other parameters"
        )
    found = costs.of(by, recipe, config)
    if abs(found - target) > CLOSE * target:
        raise ValueError(f"no width of {title_of(recipe)} has {by}={target:,.0f}; the nearest has {found:,.0f}")
    config.save_pretrained(folder)
    mlp = getattr(config, _widths(config)[1])
    shape = f"hidden size {config.hidden_size}, MLP {mlp}, {config.num_hidden_layers} blocks"
    return dataclasses.replace(
        written_out(recipe), model=str(folder), shape={}
    ), shape  # the file has the shape's entries


def _parameter_names(recipe: Recipe, config: PretrainedConfig) -> list[str]:
    with signals_later(), _trying():
        return [name for name, _ in build_model(recipe, config).named_parameters()]


def match_structure(recipe: Recipe, costs: Costs, target: float, by: Figure, folder: Path) -> tuple[Recipe, str]:
    """The recipe with the rank, or if no rank makes a difference, the width, whose cost by `by` is nearest to `target`; and
    what was chosen.

    Raises:
        ValueError: it cannot come near.
    """
    if abs(costs.of(by, recipe) - target) <= 1e-9 * target:
        return recipe, "as it is"
    most = build_config(recipe, costs.tokenizer).get_text_config().hidden_size

    def at(rank: int) -> float:
        return costs.of(by, recipe.but({"rank": rank}))

    ranked = any(hasattr(method, "rank") for method in methods_of(recipe))
    lowest, highest = (at(1), at(most)) if ranked else (0.0, 0.0)
    if lowest == highest:
        try:
            return narrow_to_match(recipe, costs, target, by, folder)
        except ValueError as error:
            raise ValueError(f"{error}; use --match tokens, or methods with more similar costs") from None
    rank = nearest(at, target, 1, most)
    if abs(at(rank) - target) > CLOSE * target:
        raise ValueError(
            f"no rank of {title_of(recipe)} has {by}={target:,.0f}: rank 1 has {lowest:,.0f} and rank {most} {highest:,.0f}; use "
            "--match tokens, or leave out the method"
        )
    return recipe.but({"rank": rank}), f"rank {rank}"


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another number of steps; warm-up and evaluations keep their share of it."""
    steps = max(1, steps)
    scaled, warmup = steps / recipe.steps, recipe.warmup_steps
    scheduled = steps if recipe.schedule_steps is None else max(1, round(recipe.schedule_steps * scaled))
    return dataclasses.replace(
        recipe,
        steps=steps,
        schedule_steps=None if recipe.schedule_steps is None else scheduled,
        warmup_steps=min(round(warmup * scaled), scheduled - 1) if isinstance(warmup, int) else warmup,
        eval_every=max(1, round(recipe.eval_every * scaled)) if recipe.eval_every else 0,
    )


def flops_of(recipe: Recipe, costs: Costs) -> float:
    """Of the whole run."""
    return costs.of("flops_per_token", recipe) * recipe.sequence_length * recipe.batch_size * recipe.steps
