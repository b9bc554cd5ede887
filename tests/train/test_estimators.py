"""EGGROLL and EGG in whole runs: they learn, resume bit by bit, stop at Ctrl-C, and say what they cannot do."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from lorank.cli import cli
from lorank.train import run
from lorank.train.data import byte_tokenizer
from lorank.train.evaluation import evaluate_folder
from lorank.train.recipe import EGG_SETTINGS, Recipe

TEXT = "".join(
    f"line {i}: the {'quick' if i % 3 else 'slow'} brown fox counts {i * i} lazy dogs\n" for i in range(1500)
)
SHORT = {"steps": 6, "log_every": 1, "eval_every": 0, "save_every": 1, "keep": 20, "eval_tokens": 500}
FLOAT = {
    "method": "eggroll",
    "options": {"population": 8, "sigma": 0.02, "chunk": 4, "noise_reuse": 2},
    "vocab_size": 300,
    "sequence_length": 16,
    "batch_size": 4,
    "warmup_steps": 1,
}
EGG = {"model": "egg", "options": {"hidden_size": 8, "population": 16}, "batch_size": 8, "sequence_length": 16}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


def recipe(text: Path, kind: dict[str, Any], **changes: Any) -> Recipe:
    return Recipe.from_dict({"data": str(text), **SHORT, **kind, **changes})


def figures(folder: Path) -> list[tuple[float, ...]]:
    names = ("step", "loss_nats_per_token", "gradient_norm", "lr")
    return [tuple(r[name] for name in names) for r in run.history(folder) if "loss_nats_per_token" in r]


class StopAt(TrainerCallback):
    def __init__(self, step: int, how: int | None = None):
        self.step, self.how = step, how

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.how is None:
                raise MemoryError("killed by the test")
            os.kill(os.getpid(), self.how)


@pytest.mark.parametrize("kind", [FLOAT, EGG], ids=["float", "egg"])
def test_a_run_that_was_killed_or_stopped_resumes_as_if_it_had_not_been(
    kind: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    whole = run.pretrain(recipe(text, kind), tmp_path / "whole")
    assert whole is not None
    for name, stop in {"killed": StopAt(3), "stopped": StopAt(2, signal.SIGINT)}.items():
        out = tmp_path / name
        if stop.how is None:
            with pytest.raises(MemoryError):
                run.pretrain(recipe(text, kind), out, callbacks=[stop])
        else:
            assert run.pretrain(recipe(text, kind), out, callbacks=[stop]) is None
        resumed = run.pretrain(run.read_run(out), out, resume=True)
        assert resumed is not None
        assert figures(out) == figures(tmp_path / "whole")
        assert resumed.validation_loss_nats_per_token == whole.validation_loss_nats_per_token
        assert resumed.sample == whole.sample
    assert len({norm for _, _, norm, _ in figures(tmp_path / "whole")}) == 6, "each step has its own noise or data"


def test_a_transformer_learns(text: Path, tmp_path: Path) -> None:
    model = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({**model, **heads}))
    options = {"population": 64, "sigma": 0.03}
    changes = {"model": str(tmp_path), "options": options, "steps": 40, "lr": 0.02, "save_every": 0}
    summary = run.pretrain(recipe(text, FLOAT, **changes), tmp_path / "run")
    assert summary is not None
    losses = [loss for _, loss, _, _ in figures(tmp_path / "run")]
    assert losses[0] > 5.5 and summary.validation_loss_nats_per_token < losses[0] - 0.7
    forward = 2 * (16 * 16 * 4 + 3 * 16 * 32 + 16 * 300)
    assert summary.flops_per_token > 64 * forward, "the cost of a token is that of the whole population"


def test_members_in_groups_see_their_own_rows(text: Path, tmp_path: Path) -> None:
    options = {"population": 8, "sigma": 0.02, "group_size": 2, "rank": 2, "freeze_others": True}
    summary = run.pretrain(recipe(text, FLOAT, options=options, steps=2), tmp_path / "run")
    assert summary is not None and summary.steps == 2


def test_egg_learns_in_int8_from_the_command_line(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = f"--model egg --data {text} --option hidden_size=16 --option population=256 --batch-size 128 --steps 40"
    watch = "--log-every 1 --eval-every 20 --eval-tokens 500 --save-every 0"
    done = CliRunner().invoke(cli, ["pretrain", *flags.split(), *watch.split(), "--out", str(out)])
    assert done.exit_code == 0, done.output
    losses = [loss for _, loss, _, _ in figures(out)]
    assert losses[-1] < losses[0] - 1.0
    found = json.loads((out / "summary.json").read_text())
    assert (found["parameters"], found["block_parameters"]) == (513 * 16 + 4 * 16 + 12 * 256, 4 * 16 + 12 * 256)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(p.dtype == torch.int8 for p in model.parameters())
    last = [r for r in run.history(out) if "eval_bits_per_byte" in r][-1]
    assert last["eval_bits_per_byte"] == pytest.approx(losses[-1] / 0.6931, abs=0.5)
    assert evaluate_folder(str(out), data=str(text), sequence_length=32, max_tokens=500).tokens >= 500
    assert (
        Recipe.read(out / "recipe.yaml").to_dict() | EGG_SETTINGS | {"batch_size": 128} == run.read_run(out).to_dict()
    )


def test_bytes_are_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = "".join(chr(i) for i in range(1, 400)) + "  two spaces\n\tи €𝄞"
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode() and len(tokenizer) == 256 and tokenizer.eos_token_id == 0
    assert tokenizer("a\0b")["input_ids"] == [97, 98]
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (FLOAT, {"micro_batch_size": 2}, "eggroll does not accumulate gradients; drop micro_batch_size"),
        (FLOAT, {"options": {"populaton": 4}}, "eggroll has no field 'populaton'; it has population, sigma"),
        (FLOAT, {"options": {"population": 8, "group_size": 4}, "batch_size": 3}, "3 sequences are not dealt evenly"),
        (FLOAT, {"compile": True}, "works through hooks, which compile does not see"),
        (FLOAT, {"targets": ["q_proj"]}, "eggroll moves every matrix; drop targets"),
        (EGG, {"method": "cola"}, "model=egg has no gradient, so method=cola cannot train it"),
        (EGG, {"clip": 1.0}, "clip=1.0 has no meaning for model=egg; leave it at 0.0"),
        (EGG, {"optimizer": "muon"}, "optimizer=muon has no meaning for model=egg"),
        (EGG, {"options": {"rank": 2}}, "eggroll has no field 'rank'; it has population, sig"),
        (EGG, {"batch_size": 6}, "6 sequences are not dealt evenly to 8 groups"),
        (EGG, {"tokenizer": None, "vocab_size": 300}, "vocab_size"),
    ],
)
def test_refusals(kind: dict[str, Any], changes: dict[str, Any], message: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run.pretrain(recipe(text, kind, **changes), tmp_path / "run")


def test_several_processes_and_dry_runs_are_refused(text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from lorank.train.plan import plan

    for kind in (FLOAT, EGG):
        with pytest.raises(ValueError, match="a plan counts backward passes"):
            plan(recipe(text, kind))
    from lorank.train.estimators import build_estimator
    from lorank.train.model import build_config, build_model

    monkeypatch.setenv("WORLD_SIZE", "2")
    r = recipe(text, FLOAT)
    with pytest.raises(ValueError, match="eggroll runs in one process"):
        build_estimator(r, build_model(r, build_config(r)))


def test_settings_of_egg_are_defaults_which_a_user_can_change(text: Path) -> None:
    assert Recipe.from_dict({"model": "egg"}).method == "eggroll"
    assert Recipe.from_dict({"model": "egg", "lr": 0.25}).lr == 0.25
    assert dataclasses.replace(Recipe(), steps=90).method == "cola"
