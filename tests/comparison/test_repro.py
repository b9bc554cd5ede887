"""Reproductions: their names, what is published, and how whole runs are continued and judged."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import lorank
from lorank.comparison import repro
from lorank.train import run
from lorank.train.recipe import Recipe
from lorank.train.shipped import recipes_folder

pytestmark = pytest.mark.usefixtures("uncounted")


@pytest.mark.parametrize("name", repro.names())
def test_a_published_figure_is_the_one_that_the_recipe_quotes(name: str) -> None:
    found = repro.find(name)
    text = " ".join(
        line[2:] for line in found.curve_file.with_suffix(".yaml").read_text().splitlines() if line[:2] == "# "
    )
    quoted = re.search(r"validation perplexity (?:there )?is (\d+\.\d+)", text)
    assert (None if quoted is None else float(quoted[1])) == found.published.perplexity
    assert found.published.source.split()[-1] in text
    unsure = "lr" in text.partition("Unconfirmed")[2] or name == "fira-60m"
    if found.published.perplexity and found.published.tolerance:
        assert found.published.tolerance == (repro.IN_PART if unsure else repro.IN_FULL)


def test_names_go_both_ways_and_cola_m_shares_colas_recipe() -> None:
    assert repro.find("cola-60m") == repro.find("60m-cola")
    plain, m = repro.find("cola-60m"), repro.find("cola-m-60m")
    assert m.recipe == dataclasses.replace(plain.recipe, method="cola-m") and m.curve_file == plain.curve_file


def test_an_installed_package_has_its_recipes_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (
        'force-include = { recipes = "lorank/recipes" }' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    )
    (tmp_path / "lorank/recipes").mkdir(parents=True)
    monkeypatch.setattr(lorank, "__file__", str(tmp_path / "lorank/__init__.py"))
    assert recipes_folder() == tmp_path / "lorank/recipes"


TEXT = "".join(f"line {i}: the {'quick' if i % 3 else 'slow'} fox counts {i * i} lazy dogs\n" for i in range(400))


class Killed(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise MemoryError("killed by the test")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> repro.Reproduction:
    """cola-60m stands for a run of four steps."""
    (tmp_path / "fox.txt").write_text(TEXT)
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "num_attention_heads": 2, "num_key_value_heads": 2}))
    data = {"data": str(tmp_path / "fox.txt"), "tokenizer": "bytes", "sequence_length": 32, "batch_size": 8}
    pace = {"steps": 4, "warmup_steps": 1, "eval_every": 2, "save_every": 2, "log_every": 1}
    recipe = Recipe(model=str(tmp_path / "config.json"), rank=8, micro_batch_size=8, **data, **pace)
    published = repro.Published(1000.0, 0.1, "nobody")
    found = repro.Reproduction("cola-60m", recipe, published, tmp_path / "curve.json")
    monkeypatch.setattr(repro, "find", lambda name: found)
    return found


def test_a_run_goes_on_where_it_was_killed_and_is_judged(small, repro_command, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(MemoryError):
        repro.reproduce("cola-60m", tmp_path / "run", [Killed()], micro_batch_size=4)
    outcome = repro.reproduce("cola-60m", tmp_path / "run")  # as it began, with micro-batches of 4
    assert outcome is not None and outcome["within"] is False and len(outcome["evaluations"]) == 2
    whole = run.pretrain(dataclasses.replace(small.recipe, micro_batch_size=8), tmp_path / "whole")
    assert whole is not None
    assert outcome["perplexity"] == pytest.approx(whole.published_compatible_perplexity, rel=5e-3)
    own = json.loads((tmp_path / "run/summary.json").read_text())["published_compatible_perplexity"]
    assert own > 1.1 * outcome["perplexity"]  # as twice as many batches give it
    assert outcome["evaluations"][-1] == (4, pytest.approx(outcome["perplexity"], rel=5e-3))
    assert outcome["unbiased"] == pytest.approx(whole.validation_perplexity, rel=1e-3)

    monkeypatch.setattr(run, "pretrain", lambda *args, **kwargs: pytest.fail("there is nothing left to run"))
    code, out, _ = repro_command("cola-60m", "--out", tmp_path / "run")
    assert code == 1 and "OUTSIDE" in out and "step 2" in out
    met = dataclasses.replace(small, published=repro.Published(outcome["perplexity"] * 1.05, 0.1, "nobody"))
    monkeypatch.setattr(repro, "find", lambda name: met)
    code, out, _ = repro_command("cola-60m", "--out", tmp_path / "run")
    assert code == 0 and "within" in out
    silent = dataclasses.replace(small, published=repro.Published(None, None, "nobody"))
    monkeypatch.setattr(repro, "find", lambda name: silent)
    code, out, _ = repro_command("cola-60m", "--out", tmp_path / "run")
    assert code == 0 and "not judged" in out

    for other, words in (({"lr": 0.5}, "its lr is 0.003"), ({"seed": 1}, "its seed is 42")):
        another = dataclasses.replace(small, recipe=dataclasses.replace(small.recipe, **other))
        monkeypatch.setattr(repro, "find", lambda name, another=another: another)
        code, _, err = repro_command("cola-60m", "--out", tmp_path / "run")
        assert code == 2 and "holds another run" in err and words in err and len(err.splitlines()) == 1
    monkeypatch.setattr(repro, "find", lambda name: small)
    code, _, err = repro_command("cola-60m", "--out", tmp_path / "run", "--micro-batch-size", 2)
    assert code == 2 and "its micro_batch_size is 4" in err
    (tmp_path / "run/metrics.jsonl").unlink()
    code, _, err = repro_command("cola-60m", "--out", tmp_path / "run")
    assert code == 2 and "metrics.jsonl is missing" in err and len(err.splitlines()) == 1
    (tmp_path / "run/metrics.jsonl").write_text("")
    code, _, err = repro_command("cola-60m", "--out", tmp_path / "run")
    assert code == 2 and "has no evaluation" in err


def test_tolerance_goes_to_both_sides() -> None:
    expected = repro.Published(34.0, 0.035, "")
    judged = {p: repro.outcome(p, p, [], expected)["within"] for p in (32.7, 32.9, 35.1, 35.3)}
    assert judged == {32.7: False, 32.9: True, 35.1: True, 35.3: False}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["colla-60m"], "did you mean 'cola-60m'"),
        (["61m-cola"], "unknown reproduction '61m-cola'"),
        (["--out", "here"], "lorank repro cola-60m --out here"),
        (["cola-60m", "--out", "here", "--first-steps"], "--out needs a NAME and excludes --first-steps"),
        (["cola-60m", "--micro-batch-size", "8"], "give it with --out"),
        (["cola-60m", "--out", "here", "--micro-batch-size", "7"], "must divide batch_size=512"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence(
    repro_command, monkeypatch, tmp_path: Path, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = repro_command(*arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_the_list_and_a_card(repro_command) -> None:
    code, out, _ = repro_command()
    assert code == 0 and all(name in out for name in repro.names()) and max(map(len, out.splitlines())) <= 80
    code, out, _ = repro_command("dense-60m")
    assert code == 0 and "perplexity 34.06" in out and "lorank repro dense-60m --out" in out and "10000" in out
