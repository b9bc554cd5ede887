"""How fast methods train on this machine: in turns, in one process, on the same work, forward and backward.

Two kinds of work: a block of the 1B shape without embeddings and head, where low rank is at home, and the model of a recipe.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lorank.accounting import MORE_FLOPS, achievable_flops, saved_by
from lorank.loss import next_token_loss
from lorank.plan.forecast import with_method
from lorank.train.methods import methods_of
from lorank.train.model import build_config, build_model, with_layers
from lorank.train.recipe import Recipe

METHODS = ("dense", "cola", "cola-m")
ROUNDS = 3
"""At least that many are timed, after one that warms up."""
BLOCKS, BLOCKS_SIZE, BLOCKS_TOKENS = 1, "1b", 256
Say = Callable[[str], object]


class Work(NamedTuple):
    """What all methods do in turns."""

    title: str
    recipe: Recipe
    layers: int | None
    """Blocks of the model; None: as many as the recipe says."""
    tokens: int
    """Of a step."""
    step: Callable[[PreTrainedModel], Tensor]
    """The forward pass, up to what is differentiated."""

    def model(self, method: str) -> PreTrainedModel:
        recipe = with_method(self.recipe, method)
        config = build_config(recipe)
        torch.manual_seed(recipe.seed)
        with torch.device(_device()):
            return build_model(recipe, config if self.layers is None else with_layers(config, self.layers)).train()


class Row(NamedTuple):
    """A method: its times in seconds, one a round, and what one step computes and keeps."""

    name: str
    seconds: list[float]
    flops: int
    """Of forward and backward, recomputation included."""
    kept_bytes: int
    """What the forward pass leaves for backward."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def speed_up(self, first: "Row") -> tuple[float, float, float]:
        """How many times as fast as another row: the median over rounds, the least and the most."""
        ratios = [theirs / own for theirs, own in zip(first.seconds, self.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


class Bench(NamedTuple):
    """All that was measured; the first row of each work is what the others are compared with."""

    works: list[tuple[Work, list[Row]]]
    ceiling: float
    """FLOP/s that the device reaches at most."""
    source: str
    """Where `ceiling` comes from."""
    busy: bool
    """Whether other programs wanted more than a quarter of the cores just before."""


def bench(recipe: Recipe, names: Sequence[str], *, seconds: float, say: Say = lambda line: None) -> Bench:
    """Time methods with a block of the 1B shape, then with the recipe's model.

    Args:
        seconds: to spend in all, building and counting included; each takes at least three rounds, however long they are.
        say: gets what is going on.

    Raises:
        ValueError: a method that leaves forward and backward as they are, or that does not suit the model.
    """
    for name in names:
        found = methods_of(with_method(recipe, name))
        if found.gradient.answers() or (found.method.name == "dense" and name != "dense"):
            raise ValueError(f"method must change forward and backward, which bench times; {name} does not")
    busy = os.getloadavg()[0] > (os.cpu_count() or 1) / 4
    middle = time.perf_counter() + seconds / 2
    works = [
        (work, measure(work, names, end, say))
        for work, end in ((_blocks(recipe), middle), (_whole(recipe), middle + seconds / 2))
    ]
    ceiling, source = achievable_flops()
    reached = max(row.flops / row.median for _, rows in works for row in rows)
    if reached > ceiling:
        ceiling, source = reached, f"the fastest step here, which exceeds the {source}"
    return Bench(works, ceiling, source, busy)


def measure(work: Work, names: Sequence[str], end: float, say: Say) -> list[Row]:
    """Rounds in which each method takes one step, until the clock (`time.perf_counter`) says `end`."""

    def once(model: PreTrainedModel) -> float:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        work.step(model).backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    models, counted = {}, {}
    for name in names:
        say(f"{name}, {work.title}: counting")
        models[name] = model = work.model(name)
        with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
            once(model)  # which warms up, too
        counted[name] = counter.get_total_flops(), saved_by(model, lambda: work.step(model)).bytes  # noqa: B023
    times: list[dict[str, float]] = []
    while len(times) < ROUNDS or time.perf_counter() < end:
        say(f"{work.title}: round {len(times) + 1}")
        times.append({name: once(model) for name, model in models.items()})
    return [Row(name, [each[name] for each in times], *counted[name]) for name in models]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _bf16(recipe: Recipe) -> torch.autocast:
    return torch.autocast(_device(), torch.bfloat16, enabled=recipe.precision == "bf16")


def _blocks(recipe: Recipe) -> Work:
    """Blocks alone; ranks and settings are those that the recipe names, or the paper's for the size."""
    small: dict[str, Any] = {
        "model": None,
        "size": BLOCKS_SIZE,
        "shape": {},
        "vocab_size": 64,
        "sequence_length": BLOCKS_TOKENS,
    }
    recipe = replace(recipe, **small)
    sequences = 32 if torch.cuda.is_available() else 1
    x = torch.randn(sequences, BLOCKS_TOKENS, build_config(recipe).hidden_size, device=_device())

    def step(model: PreTrainedModel) -> Tensor:
        with _bf16(recipe):
            return model.base_model(inputs_embeds=x.to(model.dtype)).last_hidden_state.float().square().mean()

    return Work(f"a block of the {BLOCKS_SIZE} shape", recipe, BLOCKS, sequences * BLOCKS_TOKENS, step)


def _whole(recipe: Recipe) -> Work:
    """The recipe's model and micro-batch; without a tokenizer it has as many entries as one trained on the data."""
    recipe = replace(recipe, vocab_size=recipe.vocab_size or 4096)
    size = recipe.micro_batch_size or recipe.batch_size, recipe.sequence_length
    ids = torch.randint(3, 64, size, device=_device())

    def step(model: PreTrainedModel) -> Tensor:
        with _bf16(recipe):
            return next_token_loss(model, {"input_ids": ids, "labels": ids}).total

    return Work(f"the whole model, {recipe.model or f'a Llama of size {recipe.size}'}", recipe, None, ids.numel(), step)
