"""Recipes: names, types, sense, YAML."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from lorank.train.methods import methods_of, schedule_of
from lorank.train.recipe import Recipe

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("cola-*[mb].yaml"))


def test_yaml_and_back_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = Recipe(method="low-rank", rank={"mlp": 8, ".*": 0.25}, lr=6e-3, options={"x": 1}, targets=["mlp"])
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / "r.yaml") == recipe


def test_changes_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("lr: 6e-3\nsteps: 100\n")
    recipe = Recipe.read(tmp_path / "r.yaml", steps=200)
    assert (recipe.lr, recipe.steps) == (0.006, 200)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 80),
        ({"steps": 50}, 10),
        ({"steps": 1}, 0),
        ({"steps": 2, "warmup_steps": 0.9}, 1),
        ({"warmup_steps": 80}, 80),
    ],
)
def test_warm_up_is_steps_or_a_share_of_them(settings: dict, steps: int) -> None:
    recipe = Recipe(**settings)
    assert recipe.warmup == steps
    assert schedule_of(recipe)(steps) == 1 and (steps == 0 or schedule_of(recipe)(steps - 1) == (steps - 1) / steps)
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rates": 1}, "unknown setting 'learning_rates'"),
        ({"warmup_step": 1}, "did you mean 'warmup_steps'"),
        ({"steps": -1}, "steps must be a positive integer, got -1"),
        ({"steps": "many"}, "steps must be a positive integer, got 'many'"),
        ({"lr": 0}, "lr must be a positive number, got 0.0"),
        ({"lr": "fast"}, "lr must be a positive number, got 'fast'"),
        ({"lr": float("inf")}, "lr must be a positive number, got inf"),
        ({"clip": -1.0}, "clip must be a number of at least 0, got -1.0"),
        ({"optimizer": 3}, "optimizer must be a string or a mapping, got 3"),
        ({"precision": "fp64"}, "precision must be 'fp32', 'bf16' or 'bf16-pure', got 'fp64'"),
        ({"betas": [0.9]}, "betas must be two numbers in [0, 1), got [0.9]"),
        ({"betas": [0.9, 1.0]}, "betas must be"),
        ({"warmup_steps": 400}, "warmup_steps must be below steps=400, got 400; give fewer, or a fraction such as 0.2"),
        ({"warmup_steps": 1.5}, "warmup_steps must be an integer of at least 0 or a number in [0, 1), got 1.5"),
        ({"micro_batch_size": 3}, "micro_batch_size must divide batch_size=8, got 3"),
        ({"micro_batch_size": 32}, "micro_batch_size must divide batch_size=8, got 32"),
        ({"sequence_length": 1}, "sequence_length must be an integer of at least 2, got 1"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio must be a number from 0 to 1, got 2.0"),
        ({"rank": [1]}, "rank must be a positive integer"),
        ({"rank": True}, "rank must be a positive integer"),
        ({"seed": 2**32}, "seed must be"),
        ({"data": ""}, "data must not be empty"),
    ],
)
def test_senseless_settings_are_one_sentence(settings: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Recipe.from_dict(settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1", "line 1 is not valid YAML"), ("- 1\n- 2\n", "must be a mapping"), ("stepz: 3", "did you mean 'steps'")],
)
def test_broken_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match="r.yaml") as caught:
        Recipe.read(tmp_path / "r.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match="nowhere.yaml does not exist; name a YAML file or one of apollo-60m"):
        Recipe.read("nowhere.yaml")


def test_a_recipe_of_ours_is_found_by_its_name() -> None:
    assert Recipe.read("cola-60m") == Recipe.read(SHIPPED[0].with_name("cola-60m.yaml"))


def test_changes_by_dotted_names() -> None:
    recipe = Recipe(method="cola", optimizer={"galore": {"rank": 8}}, options={"activation": "relu"})
    changes = {"optimizer.update_gap": 5, "method.rank": 4, "options.nonlinearity": "both", "shape.hidden_size": 64}
    changed = recipe.but({**changes, "lr": "1e-2"})
    assert (changed.method, changed.optimizer) == ({"cola": {"rank": 4}}, {"galore": {"rank": 8, "update_gap": 5}})
    assert changed.options == {"activation": "relu", "nonlinearity": "both"} and changed.shape == {"hidden_size": 64}
    assert changed.lr == 0.01 and recipe.lr == Recipe.lr


# The training settings of the CoLA paper's configurations: lr, steps, warm-up, micro-batch, rank, non-linearity.
PUBLISHED = {
    "cola-60m": (6e-3, 10_000, 2_000, 256, 128, "both"),
    "cola-130m": (3e-3, 20_000, 2_000, 256, 256, "both"),
    "cola-350m": (3e-3, 60_000, 6_000, 64, 256, "low-rank"),
    "cola-1b": (2e-3, 100_000, 10_000, 32, 512, "low-rank"),
    "cola-7b": (1e-3, 150_000, 15_000, 16, 1024, "low-rank"),
}


def test_cola_has_a_recipe_for_each_published_size() -> None:
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


@pytest.mark.parametrize(
    ("recipe", "change", "found"),
    [
        ("galore-60m", "optimizer.update_gap", 500),
        ("galore-60m", "optimizer.galore.update_gap", 500),
        ("galore-60m", "method.galore.update_gap", 500),
        ("galore-60m", "update_gap", 500),
        ("galore-60m", "optimizer.rank", 64),
        ("cola-60m", "method.rank", 64),
        ("cola-60m", "method.cola.rank", 64),
        ("relora-60m", "method.alpha", 16),
    ],
)
def test_the_method_gets_what_a_change_says(recipe: str, change: str, found: int) -> None:
    """However the recipe and the change write it; and the next change, written otherwise, holds again."""
    own, changed = change.rpartition(".")[2], Recipe.read(recipe).but({change: found})
    for shorthand in ({}, {own: found + 1}):
        again = changed.but(shorthand)
        values = [getattr(method, own) for method in methods_of(again) if hasattr(method, own)]
        assert values == [found + len(shorthand)]


def test_a_setting_given_twice_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="rank of cola is given twice, as rank and under cola; give it once"):
        methods_of(Recipe.read("cola-60m").but({"rank": 16, "method.cola.rank": 8}))
    twice = Recipe(method="galore").but({"options.update_gap": 5, "optimizer.update_gap": 500})
    with pytest.raises(ValueError, match="update_gap of galore is given twice, as options.update_gap and under galore"):
        methods_of(twice)


def test_the_rank_of_another_method_stays() -> None:
    found = methods_of(Recipe(method="cola+galore", rank=8).but({"optimizer.galore.rank": 4}))
    assert (found.method.to_dict()["rank"], found.optimizer.to_dict()["rank"]) == (8, 4)
