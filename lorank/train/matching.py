"""A fair race: what each contestant costs, and what is changed so that all spend the same.

A contestant is a name and a recipe. Its costs are counted on a model without weights, so that a race is planned before
anything is trained. What may be matched:

tokens   nothing is changed
flops    steps, so that steps × tokens per step × FLOPs per token (recomputation and the optimizer's products counted) are
         those of the first method
time     steps, by the throughput measured in a short run
params   the rank, or where no rank changes it the width of the model; what a method drops after training does not count
memory   the same, by the estimate of weights, gradients, optimizer state and activations
"""

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorank import accounting
from lorank.conversion import method_of
from lorank.train.estimators import build_estimator
from lorank.train.model import Projection, build_config, build_model, find_projection, written_out
from lorank.train.optimizers import build_low_rank_optimizer, build_optimizer
from lorank.train.plan import memory, optimizer_flops
from lorank.train.recipe import Recipe

Match = Literal["tokens", "flops", "time", "params", "memory"]
FREE_OF_COST = (
    "lr",
    "seed",
    "data_seed",
    "weight_decay",
    "decay",
    "betas",
    "eps",
    "clip",
    "steps",
    "warmup_steps",
    "min_lr_ratio",
)
"""Settings that change neither a model nor what a step of it costs."""
CLOSE = 0.02
"""How far from its target a match by rank or width may stay, as a part of the target."""


Figure = Literal["parameters", "flops_per_token", "memory_bytes"]
"""What is counted of a model: its parameters, FLOPs per position with recomputation and the optimizer's products, bytes of
training one micro-batch."""


class Costs:
    """Counts models of a race, each figure once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._known: dict[str, float] = {}

    def of(self, figure: Figure, recipe: Recipe, config: PretrainedConfig | None = None) -> float:
        """A figure of a recipe, or of its method on the shape of `config`; ValueError as building the model would."""
        config = build_config(recipe, self.tokenizer) if config is None else config
        free = (*FREE_OF_COST, "optimizer") if figure == "parameters" else FREE_OF_COST
        settings = {name: value for name, value in recipe.to_dict().items() if name not in free}
        key = json.dumps([figure, settings, config.to_dict()], sort_keys=True, default=str)
        if key not in self._known:
            with warnings.catch_warnings(action="ignore"), torch.device("meta"):  # ranks beyond break-even are tried
                model = build_model(recipe, config)
            self._known[key] = _count(figure, recipe, model)
        return self._known[key]

    def check(self, recipe: Recipe) -> None:
        """Build what a run builds before it trains: its model, on no device, and its optimizer, on a matrix.

        Raises:
            ValueError, ImportError: as the run would.
        """
        free = [name for name in FREE_OF_COST if name != "lr"] if recipe.method == "eggroll" else FREE_OF_COST
        settings = {name: value for name, value in recipe.to_dict().items() if name not in free}
        key = json.dumps(["check", settings], sort_keys=True, default=str)
        if key not in self._known:
            with warnings.catch_warnings(action="ignore"), torch.device("meta"):
                model = build_model(recipe, build_config(recipe, self.tokenizer))
                projection = find_projection(recipe, model)
                estimator = build_estimator(recipe, model)
            if estimator is None:
                _try_optimizer(recipe, model, projection)
            self._known[key] = 1.0


def _try_optimizer(recipe: Recipe, model: PreTrainedModel, projection: Projection | None) -> None:
    matrix: Any = torch.nn.Linear(4, 4, bias=False)
    method = method_of(model)
    settings: dict[str, Any] = {name: getattr(recipe, name) for name in ("lr", "weight_decay", "decay", "betas", "eps")}
    if projection is not None:
        kind, _, options = projection
        build_low_rank_optimizer(matrix, kind, {matrix.weight: 1}, recipe.optimizer, options=options, **settings)
    else:
        build_optimizer(matrix, recipe.optimizer, adamw=method.adamw if method else None, **settings)


def _count(figure: Figure, recipe: Recipe, model: PreTrainedModel) -> float:
    if figure == "parameters":
        if (method := method_of(model)) is not None:
            method.finalize(
                model
            )  # what is saved and reported: MASA's is without the network that made its coefficients
        return accounting.count_parameters(model).total
    length, batch = recipe.sequence_length, recipe.micro_batch_size or recipe.batch_size
    if figure == "flops_per_token":
        passes = accounting.measure_flops(model, batch=batch, sequence_length=length).total / (batch * length)
        return passes + optimizer_flops(recipe, model) / (recipe.batch_size * length)
    return memory(recipe, model, batch, devices=1).total_bytes


def nearest(value: Callable[[int], float], target: float, low: int, high: int) -> int:
    """The integer in [low, high] at which a growing function is nearest to `target`; few calls where it is straight.

    >>> nearest(lambda n: 3.0 * n + 1, 30, 1, 100), nearest(lambda n: float(n**3), 60, 1, 100)
    (10, 4)
    """
    at_low, at_high = value(low), value(high)
    if target <= at_low or at_low == at_high:
        return low
    if target >= at_high:
        return high
    while high - low > 1:
        guess = low + int((target - at_low) / (at_high - at_low) * (high - low))
        guess = min(max(guess, low + max(1, (high - low) // 50)), high - max(1, (high - low) // 50))
        at_guess = value(guess)
        if at_guess <= target:
            low, at_low = guess, at_guess
        else:
            high, at_high = guess, at_guess
    return low if target - at_low <= at_high - target else high


# ---------------------------------------------------------------------------------------------------------------------
# Narrower dense models
# ---------------------------------------------------------------------------------------------------------------------


def resized(config: PretrainedConfig, hidden_size: int, intermediate_size: int) -> PretrainedConfig:
    """The same architecture at another width, with as many blocks and heads; a Llama of that shape where the
    architecture does not name its widths as Llama does."""
    if not {"hidden_size", "intermediate_size"} <= set(config.to_dict()):
        return LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=1e-6,
            tie_word_embeddings=config.tie_word_embeddings,
            use_cache=False,
        )
    new = copy.deepcopy(config)
    new.hidden_size, new.intermediate_size = hidden_size, intermediate_size
    if getattr(new, "head_dim", None):
        new.head_dim = hidden_size // new.num_attention_heads
    return new


def choose_width(
    config: PretrainedConfig, measure: Callable[[PretrainedConfig], float], target: float
) -> PretrainedConfig:
    """`config` at the width whose `measure` is nearest to `target`.

    Blocks and heads stay. The hidden size is a multiple of two per head (rotary positions take even heads), as near as
    may be to the old proportions; the MLP's width then closes the gap.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    unit = 2 * heads

    def proportional(units: int) -> PretrainedConfig:
        return resized(config, units * unit, max(1, round(units * unit * wide / hidden)))

    most = max(1, 2 * hidden // unit)
    units = nearest(lambda units: measure(proportional(units)), target, 1, most)
    best = nearest(lambda width: measure(resized(config, units * unit, width)), target, 1, 4 * units * unit)
    return resized(config, units * unit, best)


def narrow_to_match(recipe: Recipe, costs: Costs, target: float, by: Figure, folder: Path) -> tuple[Recipe, str]:
    """The recipe on a model of another width that costs `target` by the figure `by`, written to `folder`; and
    its shape in words.

    Raises:
        ValueError: no width comes near the target.
    """
    config = choose_width(build_config(recipe, costs.tokenizer), lambda shape: costs.of(by, recipe, shape), target)
    found = costs.of(by, recipe, config)
    if abs(found - target) > CLOSE * target:
        raise ValueError(
            f"no width of {recipe.method} has {by}={target:,.0f}; the nearest has {found:,.0f}; take --match tokens or "
            "methods whose costs are nearer to each other"
        )
    config.save_pretrained(folder)
    shape = f"hidden size {config.hidden_size}, MLP {config.intermediate_size}, {config.num_hidden_layers} blocks"
    return dataclasses.replace(written_out(recipe), model=str(folder)), shape


def match_structure(recipe: Recipe, costs: Costs, target: float, by: Figure, folder: Path) -> tuple[Recipe, str]:
    """The recipe with the rank, or where no rank makes a difference the width, whose cost by `by` is nearest to `target`;
    and what was chosen.

    Raises:
        ValueError: it cannot come near.
    """
    if abs(costs.of(by, recipe) - target) <= 1e-9 * target:
        return recipe, "as it is"
    most = build_config(recipe, costs.tokenizer).hidden_size

    def at(rank: int) -> float:
        return costs.of(by, dataclasses.replace(recipe, rank=rank))

    try:
        lowest, highest = (0.0, 0.0) if recipe.method == "dense" else (at(1), at(most))
    except ValueError as error:
        if "no rank" not in str(error):
            raise
        lowest = highest = 0.0
    if lowest == highest:
        return narrow_to_match(recipe, costs, target, by, folder)
    rank = nearest(at, target, 1, most)
    if abs(at(rank) - target) > CLOSE * target:
        raise ValueError(
            f"no rank of {recipe.method} has {by}={target:,.0f}: rank 1 has {lowest:,.0f}, rank {most} {highest:,.0f}; take "
            "--match tokens, or leave the method out"
        )
    return dataclasses.replace(recipe, rank=rank), f"rank {rank}"


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe at another length: warm-up and evaluations keep their places in it."""
    steps = max(1, steps)
    scaled = steps / recipe.steps
    return dataclasses.replace(
        recipe,
        steps=steps,
        warmup_steps=min(round(recipe.warmup_steps * scaled), steps - 1),
        eval_every=max(1, round(recipe.eval_every * scaled)) if recipe.eval_every else 0,
    )


def flops_of(recipe: Recipe, costs: Costs) -> float:
    """Of the whole run."""
    return costs.of("flops_per_token", recipe) * recipe.sequence_length * recipe.batch_size * recipe.steps
