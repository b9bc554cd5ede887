"""How much a run trains on, in units that people think in: tokens, epochs of the data, tokens per parameter.

A recipe knows steps alone. A budget becomes steps once the data and the model are known, and the run records these.
"""

import dataclasses
import logging
import math
import re
from typing import Any, NamedTuple, Self

from datasets import IterableDataset
from torch import nn

from lorank import accounting
from lorank.accounting.twin import twin_of, without_data
from lorank.conversion import method_of
from lorank.fields import Count, Positive, check_value
from lorank.method import Method
from lorank.train.data import Corpus
from lorank.train.data.sources import amount
from lorank.train.recipe import LONGEST, Recipe
from lorank.train.world import processes

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """One of these; ValueError unless it is positive.

    >>> Budget(epochs=1.5).given, Budget.read(tokens="2.6B").given
    (('epochs', 1.5), ('tokens', 2600000000))
    """

    steps: int | None = None
    """Optimizer steps."""
    tokens: int | None = None
    """As many, padding not included."""
    epochs: float | None = None
    """Passes over the training data."""
    tokens_per_parameter: float | None = None
    """Tokens for each parameter of the model that is saved, embeddings and head included."""

    def __post_init__(self) -> None:
        name, amount = self.given
        check_value(name, amount, Count if name in ("steps", "tokens") else Positive)

    @property
    def given(self) -> tuple[str, Any]:
        """Name and amount of the one that is given."""
        given = [(name, amount) for name, amount in dataclasses.asdict(self).items() if amount is not None]
        if len(given) != 1:
            raise ValueError(f"a budget must be one of {', '.join(dataclasses.asdict(self))}, got {len(given)} of them")
        return given[0]

    @classmethod
    def read(cls, *, tokens: str | None = None, **others: float | None) -> Self:
        """With the tokens as a user writes them."""
        return cls(tokens=None if tokens is None else read_tokens(tokens), **others)  # type: ignore[arg-type]

    def steps_of(self, recipe: Recipe, corpus: Corpus, parameters: int, groups: int | None = None) -> int:
        """The least number of optimizer steps that spends it, and of epochs the whole steps in them.

        Raises:
            ValueError: epochs of a stream.
        """
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            tokens = (self.tokens_per_parameter or 0) * parameters if self.tokens is None else self.tokens
            return math.ceil(tokens / tokens_per_step(recipe, corpus))
        each = steps_per_epoch(recipe, corpus, groups)
        if each is None:
            raise ValueError(
                f"data={recipe.data!r} is a stream, whose length is not known, so epochs of it cannot be counted; give --tokens"
            )
        return max(1, math.floor(self.epochs * each + 1e-9))


def of_length(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another number of steps. A shorter run keeps the share of its warm-up, also if that is a number of steps, which is
    logged; in a longer one the warm-up stays as it is."""
    warmup = recipe.warmup_steps
    if (
        steps >= recipe.steps
        or recipe.steps == LONGEST
        or recipe.schedule_steps is not None
        or not (isinstance(warmup, int) and warmup)
    ):
        return dataclasses.replace(recipe, steps=steps)
    scaled = min(max(1, round(warmup * steps / recipe.steps)), steps - 1)
    logger.warning(
        "warmup_steps is %s of %s steps, the same share as %s of %s in the recipe; --warmup-steps sets another",
        *(f"{number:,}" for number in (scaled, steps, warmup, recipe.steps)),
    )
    return dataclasses.replace(recipe, steps=steps, warmup_steps=scaled)


class Extent(NamedTuple):
    """How much a run trains on, in all units."""

    steps: int
    tokens: int
    """Without padding."""
    epochs: float | None
    """None: the data are a stream."""
    parameters: int
    """Of the model that is saved."""

    def __str__(self) -> str:
        """In one line."""
        epochs = "" if self.epochs is None else f"{_short(self.epochs)} epochs, "
        each, all_of_them = _short(self.tokens / self.parameters), amount(self.parameters, "").strip()
        return f"{self.steps:,} steps: {amount(self.tokens, 'tokens')}, {epochs}{each} per parameter ({all_of_them})"


def extent_of(recipe: Recipe, corpus: Corpus, parameters: int, groups: int | None = None) -> Extent:
    """What a recipe's steps amount to."""
    each = steps_per_epoch(recipe, corpus, groups)
    tokens = round(recipe.steps * tokens_per_step(recipe, corpus))
    return Extent(recipe.steps, tokens, None if each is None else recipe.steps / each, parameters)


def tokens_per_step(recipe: Recipe, corpus: Corpus) -> float:
    """The mean, without padding."""
    return recipe.batch_size * recipe.sequence_length * corpus.fill


def steps_per_epoch(recipe: Recipe, corpus: Corpus, groups: int | None = None) -> int | None:
    """Optimizer steps of a pass over the data, of which micro-batches that are not full are left out; None for a stream. `groups` is the
    number of parts of a batch that are computed at once, by default that of processes."""
    if isinstance(corpus.train, IterableDataset):
        return None
    together = min(recipe.batch_size, (recipe.micro_batch_size or recipe.batch_size) * (groups or processes()))
    return max(1, math.ceil(len(corpus.train) // together / (recipe.batch_size // together)))


def saved_parameters(model: nn.Module) -> int:
    """Parameters of a model as it is saved after training, without those that its method drops then."""
    method = method_of(model)
    if method is None or type(method).finalize is Method.finalize:
        return accounting.count_parameters(model).total
    try:
        with without_data("counted"):
            twin = twin_of(model)
            method.finalize(twin)
            return accounting.count_parameters(twin).total
    except ValueError:  # a method whose changes depend on the weights
        return accounting.count_parameters(model).total


def read_tokens(text: str) -> int:
    """A number of tokens, with k, M, B or T if wanted, in small letters or capitals.

    >>> read_tokens("1.1B"), read_tokens("300m"), read_tokens("50K"), read_tokens("819200")
    (1100000000, 300000000, 50000, 819200)
    """
    found = re.fullmatch(r"(\d+(?:[._]?\d+)*(?:e\d+)?)\s*([kmbt]?)", text.strip().lower())
    try:
        number = (
            float(found[1].replace("_", "")) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[found[2]]
            if found
            else 0
        )
    except ValueError:  # 1.2.3
        number = 0
    if number > 1e18:
        raise ValueError(f"tokens must be at most 1e18, got {text!r}")
    if number < 1:
        raise ValueError(f"tokens must be a number of tokens such as 1.1B or 819200, got {text!r}")
    return round(number)


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"
