"""Budgets: tokens, epochs and tokens per parameter become steps, and a run says how long it is in all units."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from lorank.accounting import count_parameters
from lorank.train.budget import Budget, extent_of, of_length, read_tokens, saved_parameters, steps_per_epoch
from lorank.train.data import Corpus
from lorank.train.folder import read_json, read_run
from lorank.train.methods import methods_of
from lorank.train.model import empty_model
from lorank.train.recipe import LONGEST, Recipe
from lorank.train.run import pretrain


def corpus_of_rows(rows: int, tokens: int = 10, length: int = 10) -> Corpus:
    mask = [[1] * tokens + [0] * (length - tokens)] * rows
    train = Dataset.from_dict({"input_ids": [[0] * length] * rows, "attention_mask": mask})
    return Corpus(None, train, train, 1.0, "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (Budget(tokens=800), 20),
        (Budget(tokens=801), 21),
        (Budget(tokens_per_parameter=20), 50),
        (Budget(epochs=1), 25),
        (Budget(epochs=1.5), 37),
        (Budget(epochs=1e-9), 1),
    ],
)
def test_a_budget_is_steps_of_forty_tokens(budget: Budget, steps: int) -> None:
    """103 rows are 25 whole batches of four; the model has 100 parameters."""
    corpus = corpus_of_rows(103)
    recipe = Recipe(batch_size=4, sequence_length=10, steps=steps)
    assert budget.steps_of(recipe, corpus, 100) == steps
    assert extent_of(recipe, corpus, 100) == (steps, 40 * steps, steps / 25, 100)


def test_a_shorter_run_keeps_the_share_of_its_warm_up() -> None:
    recipe = Recipe(steps=1000, warmup_steps=100)
    assert [of_length(recipe, steps).warmup_steps for steps in (1, 2, 50, 999, 1000, 2000)] == [0, 1, 5, 100, 100, 100]
    for same in (
        Recipe(),
        Recipe(warmup_steps=0),
        Recipe(steps=LONGEST, warmup_steps=30),
        Recipe(warmup_steps=30, schedule_steps=200),
    ):
        assert of_length(same, 50) == dataclasses.replace(same, steps=50)


def test_padding_is_no_token() -> None:
    corpus, recipe = corpus_of_rows(8, tokens=6), Recipe(batch_size=4, sequence_length=10)
    assert Budget(tokens=240).steps_of(recipe, corpus, 1) == 10


def test_an_epoch_may_end_with_a_part_of_the_micro_batches() -> None:
    corpus, recipe = corpus_of_rows(11), Recipe(batch_size=8, micro_batch_size=2)
    assert steps_per_epoch(recipe, corpus) == 2


def test_a_stream_has_no_epochs() -> None:
    rows = IterableDataset.from_generator(lambda: iter(()))
    held_out = corpus_of_rows(1).train
    corpus, recipe = Corpus(None, rows, held_out, 1.0, ""), Recipe(sequence_length=10, data="a/b")  # type: ignore[arg-type]
    assert extent_of(recipe, corpus, 1).epochs is None and "epochs" not in str(extent_of(recipe, corpus, 1))
    with pytest.raises(ValueError, match="data='a/b' is a stream, whose length is not known"):
        Budget(epochs=1).steps_of(recipe, corpus, 1)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.2.3", "1Q", "many", "nan"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tokens must be a number of tokens such as 1.1B or 819200"):
        read_tokens(text)


@pytest.mark.parametrize("text", ["1e30", "1e999", "2000000T"])
def test_more_tokens_than_anybody_has_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"tokens must be at most 1e18, got '{text}'"):
        read_tokens(text)


@pytest.mark.parametrize("amounts", [{}, {"tokens": 3, "epochs": 1.0}, {"epochs": -1.0}, {"epochs": float("inf")}])
def test_a_budget_is_one_positive_amount(amounts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Budget(**amounts)


@pytest.mark.parametrize("method", ["dense", "masa", "self-guided"])
def test_parameters_are_those_that_are_saved(method: str) -> None:
    """MASA drops a network when training ends, self-guided training its guide."""
    recipe = Recipe(method=method, vocab_size=300)
    model = empty_model(recipe)
    before = count_parameters(model).total
    found = saved_parameters(model)
    assert count_parameters(model).total == before and (found == before) == (method == "dense")
    methods_of(recipe).method.finalize(model)
    assert found == count_parameters(model).total


def test_a_run_records_the_steps_and_says_its_length(
    recipe: Callable[..., Recipe], tmp_path: Path, quick: None
) -> None:
    lines: list[str] = []
    summary = pretrain(
        recipe(eval_every=0, save_every=0), tmp_path / "run", budget=Budget(tokens=3 * 4 * 32), say=lines.append
    )
    assert summary is not None and (summary.steps, summary.tokens) == (3, 384)
    assert read_run(tmp_path / "run").steps == read_json(tmp_path / "run/run.json")["recipe"]["steps"] == 3
    [line] = lines
    assert line.startswith("3 steps: 0.4 k tokens, 0.0") and f"{384 / summary.parameters:.3g} per parameter (" in line
