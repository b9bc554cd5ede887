"""Recipes: names, types, sense, YAML."""

import dataclasses
from pathlib import Path

import pytest

from lorank.train.recipe import Recipe

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("cola-*.yaml"))


def test_yaml_and_back_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = Recipe(method="low-rank", rank={"mlp": 8, ".*": 0.25}, lr=6e-3, options={"x": 1}, targets=["mlp"])
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / "r.yaml") == recipe


def test_changes_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("lr: 6e-3\nsteps: 100\n")
    recipe = Recipe.read(tmp_path / "r.yaml", steps=200)
    assert (recipe.lr, recipe.steps) == (0.006, 200)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rates": 1}, "unknown setting 'learning_rates'"),
        ({"warmup_step": 1}, "did you mean 'warmup_steps'"),
        ({"steps": -1}, "steps=-1 is not positive"),
        ({"steps": "many"}, "steps='many' is not int"),
        ({"lr": 0}, "lr=0.0 is not positive"),
        ({"lr": "fast"}, "lr='fast' is not float"),
        ({"clip": -1.0}, "clip=-1.0 is negative"),
        ({"optimizer": "sgd"}, "optimizer='sgd' is not one of 'adamw', 'adamw-8bit', 'adafactor', 'muon'"),
        ({"precision": "fp64"}, "precision='fp64' is not one of"),
        ({"betas": [0.9]}, "betas=[0.9]"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"warmup_steps": 400}, "leaves none of steps=400"),
        ({"micro_batch_size": 3}, "micro_batch_size=3 does not divide batch_size=8"),
        ({"micro_batch_size": 32}, "is not between 1 and batch_size=8"),
        ({"sequence_length": 1}, "no token to predict"),
        ({"min_lr_ratio": 2.0}, "above 1"),
        ({"rank": [1]}, "rank=[1]"),
        ({"rank": True}, "rank=True"),
    ],
)
def test_senseless_settings_are_one_sentence(settings: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Recipe.from_dict(settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1", "line 1 is not valid YAML"), ("- 1\n- 2\n", "is not a mapping"), ("stepz: 3", "did you mean 'steps'")],
)
def test_broken_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match="r.yaml") as caught:
        Recipe.read(tmp_path / "r.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match="nowhere.yaml does not exist"):
        Recipe.read("nowhere.yaml")


# The training settings of the CoLA paper's configurations: lr, steps, warm-up, micro-batch, rank, non-linearity.
PUBLISHED = {
    "cola-60m": (6e-3, 10_000, 2_000, 256, 128, "both"),
    "cola-130m": (3e-3, 20_000, 2_000, 256, 256, "both"),
    "cola-350m": (3e-3, 60_000, 6_000, 64, 256, "low-rank"),
    "cola-1b": (2e-3, 100_000, 10_000, 32, 512, "low-rank"),
    "cola-7b": (1e-3, 150_000, 15_000, 16, 1024, "low-rank"),
}


def test_every_published_size_of_cola_has_a_recipe_and_no_other_is_claimed() -> None:
    assert {path.stem for path in SHIPPED} == set(PUBLISHED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_hold_the_published_settings(path: Path) -> None:
    r = Recipe.read(path)
    lr, steps, warmup, micro, rank, nonlinearity = PUBLISHED[path.stem]
    assert (r.lr, r.steps, r.warmup_steps, r.micro_batch_size, r.rank) == (lr, steps, warmup, micro, rank)
    assert r.options == {"nonlinearity": nonlinearity}
    assert (r.batch_size, r.sequence_length, r.documents, r.vocab_size) == (512, 256, "padded", 32_000)
    assert (r.weight_decay, r.decay, r.clip, r.precision, r.seed) == (0.01, "all", 0.5, "bf16-pure", 42)
    assert (r.betas, r.eps, r.min_lr_ratio) == ([0.9, 0.999], 1e-8, 0.1)


def test_every_setting_has_help() -> None:
    assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(Recipe))
