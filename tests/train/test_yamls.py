"""YAML of recipe files and flags: numbers as people write them, and no key twice."""

from pathlib import Path

import pytest

from lorank.train.methods import methods_of
from lorank.train.recipe import Recipe


def test_numbers_of_a_recipe_are_numbers_at_every_depth(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "lr: 1e-3\nmethod: {sltrain: {rank: 8, density: 3e-2}}\noptimizer: {galore: {scale: 25e-2}}\n"
        "betas: [9e-1, 95e-2]\nshape: {rms_norm_eps: 1e-5}\n"
    )
    recipe = Recipe.read(file)
    assert (recipe.lr, [*recipe.betas], recipe.shape) == (1e-3, [0.9, 0.95], {"rms_norm_eps": 1e-5})
    found = methods_of(recipe)
    assert (found.method.density, found.optimizer.scale) == (0.03, 0.25)  # type: ignore[attr-defined]


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("lr: 6e-3\nmethod: cola\nlr: 1e-3\n")
    with pytest.raises(ValueError, match=r"recipe .*recipe.yaml, line 3 is not valid YAML: lr is given twice"):
        Recipe.read(file)
