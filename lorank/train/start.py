"""A run that starts from trained weights: those of any saved model, dense or converted, that transformers loads as a causal one.

The model's shape, its vocabulary and, if it is converted, its method are its own; what else a recipe says is the run's.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lorank.analysis.batches import Batch, until
from lorank.conversion import convert, method_of, sites_to_convert
from lorank.fit.door import fit, structure_making
from lorank.method import Method, Patterns
from lorank.rewriting import converted_with
from lorank.table import from_record
from lorank.train.data.sources import first_line
from lorank.train.hub import read_config
from lorank.train.methods import methods_of, resolved
from lorank.train.recipe import Recipe
from lorank.train.saved import load_model
from lorank.train.watching import tell

FITTED_ON = 100_000
"""Tokens of the training text to which factors are fitted, if a method needs them."""
OWN: dict[str, Any] = {"model": None, "shape": {}, "vocab_size": None}
"""Settings that the saved model decides."""


def method_of_start(name: str) -> str:
    """The name of the method with which a saved model was converted, or "dense"."""
    recorded = _config_of(name)[1]
    return "dense" if recorded is None else recorded["method"]


def started(recipe: Recipe) -> Recipe:
    """The recipe with what the model that it starts from decides: its method with all settings, and by default its tokenizer.

    Raises:
        ValueError: a setting that the model decides, a method that it has not, or one that would drop its weights.
    """
    if recipe.start_from is None:
        return recipe
    for name, default in OWN.items():
        if getattr(recipe, name) != default:
            raise ValueError(
                f"{name} must be left out with start_from, whose model has its own, got {getattr(recipe, name)!r}"
            )
    recorded = _config_of(recipe.start_from)[1]
    recipe = dataclasses.replace(recipe, tokenizer=recipe.tokenizer or recipe.start_from)
    method = methods_of(recipe).method
    if recorded is None:
        if method.name != "dense" and not method.keeps_outputs and structure_making(method) is None:
            raise ValueError(
                f"method must keep the trained weights of start_from={recipe.start_from!r}, got {method.name} with settings that "
                "lorank cannot fit to them; make factors with lorank compress, and start from the result"
            )
        return recipe
    saved = from_record(recorded)
    fields = {field.name: getattr(saved, field.name) for field in dataclasses.fields(saved)}
    whole = resolved(recipe)
    given = whole.method[saved.name] if isinstance(whole.method, dict) and saved.name in whole.method else {}
    if method.name != saved.name or any(given[name] != fields[name] for name in given):
        wrong = (
            method.name if method.name != saved.name else next(name for name in given if given[name] != fields[name])
        )
        peft = ", or put a LoRA of peft on the loaded model" if method.adapts else ""
        raise ValueError(
            f"start_from={recipe.start_from!r} is converted ({saved.name}) and keeps its settings; leave out {wrong}{peft}; if {saved.name} can "
            "be merged, lorank export makes a dense model to start from"
        )
    patterns: dict[str, Any] = {name: recorded[name] or [] for name in ("targets", "exclude")}
    return dataclasses.replace(whole, method={saved.name: fields}, **patterns)


def start_config(name: str) -> PretrainedConfig:
    """The configuration of the dense model that a saved one is or was made from."""
    return _config_of(name)[0]


def _config_of(name: str) -> tuple[PretrainedConfig, Mapping[str, Any] | None]:
    try:
        config = read_config(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"start_from must be a run, a folder with a model or a hub name, got {name!r}: {first_line(error)}"
        ) from None
    recorded = getattr(config, "lorank", None)
    if recorded is None:
        return config, None
    settings = {
        key: value for key, value in config.to_dict().items() if key not in ("lorank", "model_type", "auto_map")
    }
    return AutoConfig.for_model(config.model_type.removeprefix("lorank_"), **settings), recorded


def batched(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[Batch]:
    """Rows of a corpus as batches without labels."""
    some: list[Mapping[str, Any]] = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield {name: torch.tensor([[*one[name]] for one in some]) for name in some[0] if name != "labels"}
            some = []


class Start:
    """The weights of a saved model, for one of the same kind; and text, if a method needs factors of them."""

    def __init__(self, recipe: Recipe, text: Iterable[Mapping[str, Any]] = ()):
        assert recipe.start_from is not None and recipe.tokenizer is not None
        model, _ = load_model(recipe.start_from, tokenizer=recipe.tokenizer)
        self.name = recipe.start_from
        self.converted = converted_with(model) is not None
        self.method = method_of(model)
        self.weights: dict[str, Tensor] = model.state_dict()
        self.text = text
        self.batch_size = recipe.batch_size

    def convert(self, model: PreTrainedModel, method: Method, targets: Patterns, exclude: Patterns) -> None:
        """Convert a model that has the weights, with a method that keeps them, or factors that are fitted to them on the text."""
        structure = None if self.converted or method.keeps_outputs else structure_making(method)
        if structure is None:
            convert(model, method, targets=targets, exclude=exclude)
            return
        if torch.cuda.is_available():
            model.to("cuda")  # type: ignore[arg-type]
        what, done = f"fitting the factors of {method.name} to the trained weights", itertools.count(1)
        total = len(sites_to_convert(model, method, targets, exclude))
        tell(what, 0, None, "")
        batches = until(batched(self.text, self.batch_size), FITTED_ON)
        fit(
            model,
            structure,
            batches,
            becomes=method,
            targets=targets,
            exclude=exclude,
            see=lambda fitted: tell(what, next(done), total, "projections"),
        )

    @torch.no_grad()
    def fill(self, model: PreTrainedModel) -> None:
        """Copy the weights into a model.

        Raises:
            ValueError: they are those of another model.
        """
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            raise ValueError(
                f"the weights of start_from={self.name!r} do not fit their configuration: {first_line(error)}"
            ) from None
        self.weights = {}
