"""YAML of recipe files and flags: numbers as people write them, and no key twice."""

import math
from pathlib import Path

import pytest
import yaml

from lorank.train.methods import methods_of
from lorank.train.recipe import Recipe
from lorank.train.yamls import load


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


def test_numbers_are_those_of_yaml_1_2() -> None:
    """In 1.1, which PyYAML reads, the first three are 90, 16 and 8."""
    assert [load(text) for text in ("1:30", "0x10", "010")] == ["1:30", "0x10", "010"]
    assert [load(text) for text in ("1_000", "-3", ".5", "5.", "-.inf")] == [1000, -3, 0.5, 5.0, -math.inf]


def test_a_value_inside_itself_is_refused() -> None:
    with pytest.raises(yaml.YAMLError, match="must not contain itself"):
        load("shape: &a {x: [*a]}")
    assert load("[&a {x: 1}, *a]") == [{"x": 1}, {"x": 1}]


@pytest.mark.parametrize("repeated", ["[{}]", "{{<<: [{}]}}"], ids=["lists", "joined mappings"])
def test_aliases_that_stand_for_too_much_are_refused_at_once(repeated: str, tmp_path: Path) -> None:
    """Eight of each other, twelve times: as many values as no machine holds, in some hundred bytes."""
    names = "bcdefghijklm"
    lines = [
        f"  {name}: &{name} {repeated.format(','.join([f'*{before}'] * 8))}"
        for before, name in zip("a" + names, names, strict=False)
    ]
    file = tmp_path / "recipe.yaml"
    file.write_text("\n".join(["shape:", "  a: &a {x: 1}", *lines]))
    with pytest.raises(ValueError, match=r"recipe.yaml, line \d+ is not valid YAML: its aliases stand for more than"):
        Recipe.read(file)
    assert load("- &a {x: 1}\n- {<<: [*a, *a], y: *a}") == [{"x": 1}, {"x": 1, "y": {"x": 1}}]


@pytest.mark.parametrize("deep", ["[" * 20_000, "{a: " * 3000 + "1" + "}" * 3000, "- " * 3000])
def test_values_far_too_deep_are_refused(deep: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(deep)
    with pytest.raises(ValueError, match=r"recipe.yaml, line 1 is not valid YAML: values must be at most 100 deep"):
        Recipe.read(tmp_path / "recipe.yaml")


def test_values_deep_by_their_aliases_are_refused() -> None:
    lines = ["- &a0 [x]", *(f"- &a{line} [*a{line - 1}]" for line in range(1, 200))]
    assert len(load("\n".join(lines[:90]))) == 90
    with pytest.raises(yaml.YAMLError, match="at most 100 deep"):
        load("\n".join(lines))


@pytest.mark.parametrize("value", ["9" * 5000, "2020-13-45", "!!bool x", "!!timestamp x", "!!int ''"])
def test_a_value_that_cannot_be_read_is_named_with_its_line(value: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"seed: 1\nlr: {value}")
    with pytest.raises(
        ValueError, match=r"recipe.yaml, line 2 is not valid YAML: '.*' cannot be read as (int|time|bool)"
    ):
        Recipe.read(tmp_path / "recipe.yaml")
