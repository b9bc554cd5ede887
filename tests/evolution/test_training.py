"""EGGROLL and EGG in whole runs: they learn, resume bit by bit, stop at Ctrl-C, and say what they cannot do."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from lorank.evolution.eggroll import Eggroll
from lorank.evolution.integers import EggEggroll
from lorank.train import run
from lorank.train.build import build_estimator
from lorank.train.data import byte_tokenizer, load_corpus
from lorank.train.evaluation import evaluate_folder
from lorank.train.folder import history, read_run
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe

LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}


class StopAt(TrainerCallback):
    def __init__(self, step: int, how: int | None = None):
        self.step, self.how = step, how

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.how is None:
                raise MemoryError("killed by the test")
            os.kill(os.getpid(), self.how)


@pytest.mark.parametrize("kind", ["float", "egg"])
def test_a_resumed_run_is_an_uninterrupted_one(kind: str, recipe: Any, figures: Any, tmp_path: Path) -> None:
    whole = run.pretrain(recipe(kind), tmp_path / "whole")
    assert whole is not None
    for name, stop in {"killed": StopAt(3), "stopped": StopAt(2, signal.SIGINT)}.items():
        out = tmp_path / name
        if stop.how is None:
            with pytest.raises(MemoryError):
                run.pretrain(recipe(kind), out, callbacks=[stop])
        else:
            assert run.pretrain(recipe(kind), out, callbacks=[stop]) is None
        resumed = run.pretrain(read_run(out), out, resume=True)
        assert resumed is not None
        assert figures(out) == figures(tmp_path / "whole")
        assert resumed.validation_loss_nats_per_token == whole.validation_loss_nats_per_token
        assert resumed.sample == whole.sample
    assert len({norm for _, _, norm, _ in figures(tmp_path / "whole")}) == 6, "each step has its own noise or data"


def test_a_transformer_learns(recipe: Any, figures: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": 64, **LLAMA, **HEADS})
    )
    options = {"population": 64, "sigma": 0.03, "chunk": 16, "noise_reuse": 1}
    changes = {"model": str(tmp_path), "options": options, "steps": 40, "lr": 0.02, "save_every": 0}
    summary = run.pretrain(recipe("float", **changes), tmp_path / "run")
    assert summary is not None
    losses = [loss for _, loss, _, _ in figures(tmp_path / "run")]
    assert losses[0] > 5.5 and summary.validation_loss_nats_per_token < losses[0] - 0.7
    forward = 2 * (16 * 16 * 4 + 3 * 16 * 32 + 16 * 300)
    assert summary.flops_per_token > 64 * forward, "the cost of a token is that of the whole population"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_cola_learns_without_backward_passes(optimizer: str, recipe: Any, figures: Any, tmp_path: Path) -> None:
    settings = {"method": "cola", "gradient": "eggroll", "optimizer": optimizer, "shape": LLAMA | HEADS, "rank": 4}
    options = {"population": 64, "sigma": 0.03, "chunk": 32, "noise_reuse": 1}
    changes = {"options": options, "steps": 24, "lr": 0.02, "save_every": 0}
    summary = run.pretrain(recipe("float", **settings, **changes), tmp_path / "run")
    assert summary is not None
    losses = [loss for _, loss, _, _ in figures(tmp_path / "run")]
    assert summary.validation_loss_nats_per_token < losses[0] - 0.3


def test_members_in_groups_see_their_own_rows(recipe: Any, tmp_path: Path) -> None:
    options = {"sigma": 0.02, "group_size": 2, "rank": 2, "freeze_others": True}
    summary = run.pretrain(recipe("float", options=options, steps=2), tmp_path / "run")
    assert summary is not None and summary.steps == 2


def test_egg_learns_in_int8(in_this_process: Any, text: Path, figures: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = f"--model egg --data {text} --option hidden_size=16 --option population=256 --batch-size 128 --steps 40"
    watch = "--set log_every=1 --eval-every 20 --set eval_tokens=500 --save-every 0"
    code, _, said = in_this_process("pretrain", *flags.split(), *watch.split(), "--out", out)
    assert code == 0, said
    losses = [loss for _, loss, _, _ in figures(out)]
    assert losses[-1] < losses[0] - 1.0
    found = json.loads((out / "summary.json").read_text())
    assert (found["parameters"], found["block_parameters"]) == (513 * 16 + 4 * 16 + 12 * 256, 4 * 16 + 12 * 256)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(p.dtype == torch.int8 for p in model.parameters())
    last = [r for r in history(out) if "eval_bits_per_byte" in r][-1]
    assert last["eval_bits_per_byte"] == pytest.approx(losses[-1] / 0.6931, abs=0.5)
    assert evaluate_folder(str(out), data=str(text), sequence_length=32, max_tokens=500).tokens >= 500


def test_bytes_are_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = "".join(chr(i) for i in range(1, 400)) + "  two spaces\n\tи €𝄞"
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode() and len(tokenizer) == 256 and tokenizer.eos_token_id == 0
    assert tokenizer("a\0b")["input_ids"] == [97, 98]
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


@pytest.mark.parametrize("carry", [True, False])
def test_rows_of_egg_continue_from_batch_to_batch(
    recipe: Any, text: Path, tmp_path: Path, monkeypatch: Any, carry: bool
) -> None:
    seen: list[torch.Tensor] = []
    call = EggEggroll.__call__

    def remember(self: EggEggroll, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        seen.append(batch["input_ids"])
        return call(self, batch, step)

    monkeypatch.setattr(EggEggroll, "__call__", remember)
    run.pretrain(recipe("egg", options={"carry": carry}), tmp_path / "run")
    corpus = load_corpus(str(text), tokenizer="bytes", sequence_length=16, seed=42)
    whole = torch.tensor(corpus.train["input_ids"])
    lanes = whole[: len(whole) // 8 * 8].view(8, -1)  # the text cut into as many lanes as a batch has rows
    assert torch.equal(torch.cat(seen, dim=1), lanes[:, : 6 * 16]) == carry


def test_members_draw_no_dropout_masks(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise their fitness would differ by the masks."""
    training, call = [], Eggroll.__call__

    def remember(self: Eggroll, fitness: Any) -> Any:
        training.append(self.model.training)
        return call(self, fitness)

    monkeypatch.setattr(Eggroll, "__call__", remember)
    run.pretrain(recipe("float", steps=2, warmup_steps=0), tmp_path / "run")
    assert training == [False, False]


# ---- settings


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("float", {"micro_batch_size": 2}, "eggroll does not accumulate gradients; leave out micro_batch_size.*chunk"),
        ("float", {"options": {"populaton": 4}}, "eggroll has no setting 'populaton'; its settings are: population"),
        ("float", {"options": {"sig": 3}}, "eggroll has no setting 'sig' for a floating-point model"),
        ("float", {"options": {"group_size": 4}, "batch_size": 3}, "batch_size must be a multiple of the 2 groups"),
        ("float", {"compile": True}, "compile must be false with eggroll: members draw their noise inside each layer"),
        ("float", {"optimizer": {"galore": {"in_backward": True}}}, "in_backward must be false with gradient=eggroll"),
        ("float", {"targets": ["q_proj"]}, "eggroll converts no layer and projects no gradient; leave out targets"),
        (
            "float",
            {"optimizer": "votes", "warmup_steps": 0},
            "votes moves the integer weights of EGG, not those of LlamaForCausalLM",
        ),
        ("egg", {"method": "cola"}, "method must be dense with a model of type lorank_egg.*got cola; start from the"),
        ("egg", {"gradient": "autograd"}, "gradient must be eggroll with a model of type lorank_egg"),
        ("egg", {"optimizer": "muon"}, "optimizer must be votes with a model of type lorank_egg.*got muon"),
        ("egg", {"clip": 1.0}, "clip must be 0.0 with a model of type lorank_egg, whose weights are integers, got 1.0"),
        ("egg", {"precision": "bf16"}, "precision must be fp32 with a model of type lorank_egg"),
        ("egg", {"lr": 1e9}, "fall must be a number from 0 to 64, got 1000000000.0"),
        ("egg", {"rank": 2}, "eggroll has no setting 'rank' for an integer model"),
        ("egg", {"batch_size": 6}, "batch_size must be a multiple of the 8 groups of members, got 6"),
        ("egg", {"tokenizer": None, "vocab_size": 300}, "vocab_size must be 256, because EGG reads bytes, got 300"),
    ],
)
def test_refusals(kind: str, changes: dict[str, Any], message: str, recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run.pretrain(recipe(kind, **changes), tmp_path / "run")


def test_egg_reads_packed_text_only(recipe: Any) -> None:
    r = recipe("egg", documents="padded", vocab_size=256)
    with pytest.raises(ValueError, match="documents must be packed with a model of type lorank_egg"):
        build_model(r, build_config(r))


def test_processes_and_streams_that_are_refused(recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    load = run.data.load_corpus
    streamed = lambda *a, **k: dataclasses.replace(c := load(*a, **k), train=c.train.to_iterable_dataset())  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(run.data, "load_corpus", streamed)
        with pytest.raises(
            ValueError, match="is a stream, whose rows do not continue from batch to batch.*carry=false"
        ):
            run.pretrain(recipe("egg"), tmp_path / "stream")
        assert run.pretrain(recipe("egg", options={"carry": False}, steps=1), tmp_path / "not carried") is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    r = recipe("float")
    with pytest.raises(ValueError, match="eggroll runs in one process"):
        build_estimator(r, build_model(r, build_config(r)))


def test_model_egg_of_version_0_1_is_the_recipe() -> None:
    """Its lr was α where it was at most 1, and above 1 how fast α falls; its shape was among the options."""
    ours = Recipe.read("egg")
    assert Recipe.from_dict({"model": "egg"}) == ours
    assert Recipe.from_dict({"model": "egg", "lr": 4.0, "method": "eggroll", "optimizer": "adamw"}) == ours
    constant = Recipe.from_dict({"model": "egg", "lr": 0.25})
    assert (constant.lr, constant.optimizer) == (0.25, {"votes": {"fall": 0.0}})
    slower = Recipe.from_dict({"model": "egg", "lr": 2.5, "steps": 9, "options": {"hidden_size": 8, "sig": 3}})
    assert (slower.lr, slower.optimizer, slower.steps) == (1.0, {"votes": {"fall": 2.5}}, 9)
    assert slower.shape == {"hidden_size": 8, "num_hidden_layers": 1}
    assert slower.gradient == {"eggroll": {"population": 1024, "group_size": 2, "chunk": 512, "sig": 3}}
    assert Recipe.from_dict(yaml.safe_load(slower.to_yaml())) == slower
