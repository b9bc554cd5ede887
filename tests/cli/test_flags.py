"""Settings of a recipe on the command line: about twenty flags, and --set for all of them."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from lorank.cli import PACKAGES, cli
from lorank.cli.flags import BUDGETS, GROUPS, changes_of, recipe_of, split_budget, value_of
from lorank.comparison.settings import parse_values
from lorank.train.recipe import LONGEST, Recipe, settings_with
from lorank.train.shipped import recipe_names, recipe_path

OTHERS: dict[str, Any] = {
    "schedule_steps": 500,
    "model": "gpt2",
    "method": "low-rank",
    "optimizer": "muon",
    "gradient": "eggroll",
    "rank": 0.5,
}
OTHERS |= {
    "size": "20m",
    "shape": {"hidden_size": 64},
    "options": {"alpha": 1e-3},
    "targets": ["mlp"],
    "exclude": ["x"],
}
OTHERS |= {"checkpoint": "blocks", "attention": "eager", "precision": "bf16", "data": "my_texts", "validation": "other"}
OTHERS |= {"text_column": "body", "tokenizer": "bytes", "vocab_size": 300, "documents": "padded", "decay": "all"}
OTHERS |= {"on_nan": "skip"}
OTHERS |= {"betas": [0.8, 0.99], "report_to": ["tensorboard"], "micro_batch_size": 2, "data_seed": 7}
OTHERS |= {
    "license": "mit",
    "push_to_hub": "me/model",
    "start_from": "runs/dense",
    "distil": "runs/dense:0.5",
    "eval_tokens": 60,
}


def other_value(field: "dataclasses.Field[Any]") -> Any:
    """A value of a setting that is not its default."""
    if field.name in OTHERS:
        return OTHERS[field.name]
    return not field.default if isinstance(field.default, bool) else field.default * 2


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda field: field.name)
def test_every_setting_is_reached_by_set(field: "dataclasses.Field[Any]") -> None:
    wanted = other_value(field)
    text = yaml.safe_dump(wanted, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
    recipe = recipe_of(None, {"assignments": (f"{field.name}={text}",)})
    assert getattr(recipe, field.name) == wanted != getattr(Recipe(), field.name)


OF_A_START = ("recipe", "out", "resume", "fsdp", "tensor_parallel", "dry_run")
"""Flags of pretrain that are no settings of a recipe."""


def test_the_help_lists_the_everyday_flags() -> None:
    options = [option for option in cli.commands["pretrain"].params if not getattr(option, "hidden", False)]
    flags = {option.name for option in options} - {*OF_A_START, *BUDGETS}
    assert flags == {*settings_with("everyday"), "assignments"} and 18 <= len(flags) <= 24


@pytest.mark.parametrize("command", ["pretrain", "plan", "compare"])
def test_flags_of_version_0_1_still_work(command: str) -> None:
    """All settings had a flag; `plan --method` and `compare --seeds` are flags of another kind."""
    options = {option.name for option in cli.commands[command].params}
    others = {
        "plan": {"method": "methods", "model": "models", "size": "sizes"},
        "compare": {"method": "methods", "seed": "seeds"},
    }
    for field in dataclasses.fields(Recipe):
        if field.name not in ("shape", "gradient", "push_to_hub", "start_from", "distil"):  # new in 0.2
            assert others.get(command, {}).get(field.name, field.name) in options, field.name


def test_hidden_flags_mean_what_set_means() -> None:
    words = "--betas 0.8 0.99 --compile --weight-decay 0.5 --documents padded --micro-batch-size 2 --report-to wandb"
    context = cli.commands["pretrain"].make_context("pretrain", [*words.split(), "--batch-size", "4"])
    recipe = recipe_of(None, {n: v for n, v in context.params.items() if n not in (*OF_A_START, *BUDGETS)})
    found = (
        recipe.betas,
        recipe.compile,
        recipe.weight_decay,
        recipe.documents,
        recipe.micro_batch_size,
        recipe.report_to,
    )
    assert found == ([0.8, 0.99], True, 0.5, "padded", 2, ["wandb"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-2.5E+4", -2.5e4),
        ("[1e-3, 2]", [1e-3, 2]),
        ("7", 7),
        ("true", True),
        ("null", None),
        ("low-rank", "low-rank"),
        ("{mlp: 0.5}", {"mlp": 0.5}),
        ("1e3-model", "1e3-model"),
    ],
)
def test_values_are_yaml_and_powers_of_ten_are_numbers(text: str, value: Any) -> None:
    assert value_of(text) == value and type(value_of(text)) is type(value)


def test_dotted_names_are_entries_of_mappings() -> None:
    given = ("shape.hidden_size=64", "optimizer.update_gap=500", "options.alpha=1e-2")
    recipe = recipe_of(None, {"method": "cola", "optimizer": "galore", "assignments": given})
    assert recipe.shape == {"hidden_size": 64} and recipe.options == {"alpha": 0.01}
    assert recipe.optimizer == {"galore": {"update_gap": 500}}
    given = ("method.cola.rank=2", "optimizer.galore.rank=3", "nonlinearity=low-rank")  # galore stands under method
    recipe = recipe_of(None, {"method": "cola+galore", "assignments": given})
    assert recipe.method == {"cola": {"rank": 2}, "galore": {"rank": 3}}
    assert recipe.options == {"nonlinearity": "low-rank"}, "a method's setting may be named alone"
    given = ("method.low-rank.rank=2", "optimizer.dct-adamw.update-gap=3", "weight-decay=0.5")
    recipe = recipe_of(None, {"method": "low-rank", "optimizer": "dct-adamw", "assignments": given})
    assert recipe.method == {"low-rank": {"rank": 2}} and recipe.optimizer == {"dct-adamw": {"update_gap": 3}}
    assert recipe.weight_decay == 0.5
    assert parse_values("optimizer.dct-adamw.update-gap=1,2") == ("optimizer.dct-adamw.update_gap", [1, 2])


def test_flags_win_over_a_recipe_by_name() -> None:
    recipe = recipe_of("cola-60m", {"lr": 1.0, "assignments": ("clip=0",)})
    assert (recipe.lr, recipe.clip, recipe.batch_size) == (1.0, 0, Recipe.read("cola-60m").batch_size)


def test_a_shorter_recipe_keeps_the_share_of_its_warm_up(caplog: pytest.LogCaptureFixture) -> None:
    full = Recipe.read("cola-60m")
    assert recipe_of("cola-60m", {}) == full == recipe_of("cola-60m", {"steps": full.steps})
    assert recipe_of("cola-60m", {"steps": 20_000}).warmup_steps == full.warmup_steps == 2000 and not caplog.text
    assert recipe_of("cola-60m", {"steps": 50}) == dataclasses.replace(full, steps=50, warmup_steps=10)
    assert "warmup_steps is 10 of 50 steps, the same share as 2,000 of 10,000 in the recipe" in caplog.text
    assert recipe_of("cola-60m", {"steps": 50, "warmup_steps": 7}).warmup_steps == 7
    with pytest.raises(ValueError, match="warmup_steps must be below steps=50, got 60"):
        recipe_of("cola-60m", {"steps": 50, "assignments": ("warmup_steps=60",)})
    with pytest.raises(ValueError, match="steps must be a positive integer, got 0"):
        recipe_of("cola-60m", {"steps": 0})
    budget, flags = split_budget({"tokens": "10M", "lr": 1e-3})
    assert budget is not None and recipe_of("cola-60m", flags) == dataclasses.replace(full, lr=1e-3)
    assert recipe_of("cola-60m", {**flags, "warmup_steps": 7}).steps == LONGEST


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"assignments": ("weight_dekay=1",)}, "unknown setting 'weight_dekay'; did you mean 'weight_decay'"),
        ({"assignments": ("shap.hidden_size=1",)}, "unknown setting 'shap'; did you mean 'shape'"),
        (
            {"assignments": ("optimizer.galore.rank=1",)},
            "a setting of a named method, got method=cola.*name galore too",
        ),
        ({"assignments": ("lr.first=1",)}, "lr is one value and has no entry 'first'"),
        ({"assignments": ("lr",)}, "--set must be NAME=VALUE, for example weight_decay=0.1, got 'lr'"),
        ({"assignments": ("betas=[1",)}, "a value must be valid YAML"),
        ({"assignments": ("lr=1", "lr=2")}, "lr is given twice, by --set and by --set"),
        ({"assignments": ("lr=1",), "lr": 2.0}, "lr is given twice, by --lr and by --set"),
        ({"options": ("alpha",)}, "--option must be NAME=VALUE"),
    ],
)
def test_what_set_refuses(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipe_of(None, flags)


def test_a_setting_that_belongs_to_another_flag_is_refused() -> None:
    with pytest.raises(ValueError, match="use --seeds"):
        recipe_of(None, {"assignments": ("seed=1",)}, own={"seed": "--seeds"})


def test_flags_that_were_not_given_change_nothing() -> None:
    assert changes_of({"lr": None, "targets": (), "assignments": ()}) == {}


# ---- the group


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_has_help(name: str, in_this_process) -> None:
    code, out, _ = in_this_process(name, "--help")
    assert code == 0 and "Usage:" in out and "--help" in out
    command = cli.commands[name]
    assert all(option.help for option in command.params if isinstance(option, click.Option)), (
        "every flag says what it does"
    )
    assert getattr(importlib.import_module(f"lorank.cli.{name}"), name) is command, "one command, one file"


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['lorank', '--help']; from lorank.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'datasets', 'rich', 'numpy') if name in sys.modules])"
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert out.strip().endswith("[]") and "pretrain" in out


def test_version_is_the_environment_block_of_a_report(in_this_process) -> None:
    code, out, _ = in_this_process("--version")
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and names == ["lorank", "Python", *PACKAGES, "platform", "device"]
    assert all(len(line.split()) > 1 for line in out.splitlines())


def test_papers_are_listed_and_printed(in_this_process) -> None:
    code, out, _ = in_this_process("papers")
    assert code == 0 and "arXiv 2502.10940" in out and "sltrain" in out
    code, out, _ = in_this_process("papers", "sst", "--json")
    assert code == 0 and {cell["paper"] for cell in json.loads(out)["cells"]} == {"sst"}


def test_recipes_are_found_by_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_path("60m-apollo-mini") == recipe_path("apollo-mini-60m")  # as reproductions are called
    code, _, err = in_this_process("pretrain", "cola-61m")
    assert code == 2 and "name a YAML file or one of" in err and "cola-60m" in err


def test_recipes_are_listed_and_printed(in_this_process: Callable[..., tuple[int, str, str]]) -> None:
    code, listed, _ = in_this_process("recipes")
    assert code == 0 and re.search(r"^cola-60m +CoLA 60M on C4, 1.1B tokens$", listed, re.M)
    assert [line.split()[0] for line in listed.splitlines()] == recipe_names()
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in listed.splitlines())
    assert in_this_process("recipes", "cola-60m") == (0, recipe_path("cola-60m").read_text(), "")
    assert in_this_process("recipes", "60m-cola")[1] == recipe_path("cola-60m").read_text(), "as pretrain takes it"
    code, _, error = in_this_process("recipes", "sltrain")
    meant = "sltrain-130m or sltrain-1b or sltrain-350m or sltrain-60m or sltrain-7b"
    said = f"lorank: NAME must be one of those that `lorank recipes` lists, got 'sltrain'; did you mean {meant}?\n"
    assert (code, error) == (2, said)
    assert "did you mean cola-60m?" in in_this_process("recipes", "cola60m")[2]


@pytest.mark.parametrize("command", ["pretrain", "compare", "plan", "bench"])
def test_the_help_has_its_options_in_groups(command: str, in_this_process: Callable[..., tuple[int, str, str]]) -> None:
    _, said, _ = in_this_process(command, "--help")
    titles = re.findall(r"^(\S[\w ]*):$", said, re.M)
    assert titles == [*GROUPS, "Options"]
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", said[said.index(titles[0]) :], re.M)
    visible = [p for p in cli.commands[command].params if isinstance(p, click.Option) and not p.hidden]
    assert len(shown) == len(set(shown)) == len(visible) + 1  # and --help


@pytest.mark.parametrize(
    ("given", "data"), [((), "embedded"), (("a",), "a"), (("a", "b:0.3"), ["a", "b:0.3"])], ids=["none", "one", "two"]
)
def test_data_is_one_source_or_several(given: tuple[str, ...], data: str | list[str]) -> None:
    recipe = recipe_of(None, {"data": given})
    assert recipe.data == data
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_the_name_alone_shows_the_commands(lorank) -> None:
    code, out, err = lorank()
    assert code == 0 and out.startswith("Usage: ") and "pretrain" in out and not err
