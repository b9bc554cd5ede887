"""Every method in whole runs: it learns, it resumes bit by bit, and it combines with what else a run may ask for."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from lorank.table import find, method_names
from lorank.train import run
from lorank.train.data import byte_tokenizer, load_corpus
from lorank.train.data.sources import embedded_files
from lorank.train.folder import history, read_run
from lorank.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick")
TEXT = "".join(f"line {i}: the {'quick' if i % 3 else 'slow'} brown fox counts {i * i} lazy dogs\n" for i in range(400))
TRAINED = [
    name
    for key in ("method", "optimizer")
    for name in method_names(key)
    if name not in ("cola-m", "adamw", "votes") and not find(name).adapts
]
"""CoLA-M is CoLA with a policy, which `test_it_combines` sets; AdamW is what dense trains with; votes train EGG; adapters need a
trained model."""
RESUMED = [name for name in TRAINED if name != "apollo-mini"] + ["codyra"]
"""APOLLO-Mini is APOLLO with one row; of the adapters, one whose hook keeps what the next step needs."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and beside it the shape that learns it, and a model to adapt."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2}
    path.with_name("config.json").write_text(json.dumps({**shape, "num_attention_heads": 2, "num_key_value_heads": 2}))
    tokenizer = byte_tokenizer()
    config = LlamaConfig.from_pretrained(path.parent, vocab_size=len(tokenizer))
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(path.with_name("trained"))
    return path


def recipe(text: Path, method: str, **changes: Any) -> Recipe:
    settings = {"data": str(text), "vocab_size": 300, "sequence_length": 32, "batch_size": 4, "steps": 8, "lr": 1e-2}
    if find(method).adapts:
        del settings["vocab_size"]
        settings |= {"start_from": str(text.with_name("trained")), "precision": "bf16-pure"}
    else:
        settings["model"] = str(text.with_name("config.json"))
    quick = {"warmup_steps": 1, "log_every": 1, "eval_every": 0, "save_every": 1, "keep": 20}
    return Recipe(**{**settings, **quick, "method": with_factors(method), "options": options_of(method), **changes})


def with_factors(method: str) -> str:
    """The method, on a model that it accepts."""
    structure = getattr(find(method), "structure", None)
    return f"{structure}+{method}" if structure else method


def options_of(method: str, **changes: Any) -> dict[str, Any]:
    """Settings with which the method acts within a run of eight steps, at rank 8 unless it says otherwise."""
    kind = find(method)
    rank = {"rank": 8} if "rank" in {field.name for field in dataclasses.fields(kind)} else {}
    return {**rank, **kind.soon, **changes}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss_nats_per_token"]) for r in history(folder) if "loss_nats_per_token" in r]


class KillAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise MemoryError("killed by the test")


class KillAtTheEnd(TrainerCallback):
    """After the last checkpoint, before the model is saved."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        raise MemoryError("killed by the test")


@pytest.mark.parametrize("method", RESUMED)
def test_killed_after_any_step_it_resumes_exactly(method: str, text: Path, tmp_path: Path) -> None:
    """What acts between steps three times one after another, so that what was resumed is resumed again."""
    r, out = recipe(text, method), tmp_path / "killed"
    run.pretrain(dataclasses.replace(r, save_every=0), tmp_path / "whole")
    # with `Method.soon` right before and right after ReLoRA's merges at 3, 5 and 7, SST's swap at 2 and decomposition at 4, and
    # exchanges of some of SwitchLoRA's 8 vectors at every step
    for step in (2, 3, 4) if find(method).answers() & {"hook"} else (3,):
        with pytest.raises(MemoryError):
            run.pretrain(r, out, resume=out.exists(), callbacks=[KillAfter(step)])
    run.pretrain(read_run(out), out, resume=True)
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_crnet_rebuilds_by_its_present_betas(precision: Any, text: Path, tmp_path: Path) -> None:
    """PyTorch's fused AdamW moves them without leaving a trace in their version counters."""
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "num_attention_heads": 2, "num_key_value_heads": 2}))
    changes = {"model": str(tmp_path / "config.json"), "options": {"beta": 0.6}, "lr": 0.1, "rank": 8}
    r = recipe(text, "crnet", **{**changes, "precision": precision, "checkpoint": "recurrence"})
    whole = run.pretrain(r, tmp_path / "whole")
    for step in (4, 8):
        out = tmp_path / f"killed-{step}"
        with pytest.raises(MemoryError):
            run.pretrain(r, out, callbacks=[KillAfter(step) if step < 8 else KillAtTheEnd()])
        again = run.pretrain(read_run(out), out, resume=True)
        assert losses(out) == losses(tmp_path / "whole")
        assert whole is not None and again is not None
        assert again.validation_loss_nats_per_token == whole.validation_loss_nats_per_token
    if precision == "fp32":
        run.pretrain(dataclasses.replace(r, checkpoint="none"), tmp_path / "plain")
        kept, rebuilt = (dict(losses(tmp_path / name)[:5]) for name in ("plain", "whole"))
        assert rebuilt == pytest.approx(kept, rel=1e-3)  # at this rate rounding errors grow later on


@pytest.mark.parametrize("method", TRAINED)
def test_it_combines(method: str, text: Path, tmp_path: Path) -> None:
    """Accumulation and recomputing bottlenecks change nothing but the order of sums; the others train to a finite, lower loss."""
    dropout = {"dropout": 0.0} if method == "relora" else {}
    plain = recipe(text, method, save_every=0, options=options_of(method, **dropout))

    def curve(**changes: Any) -> list[float]:
        folder = tmp_path / ("-".join(f"{name}={value}" for name, value in changes.items()) or "plain")
        run.pretrain(dataclasses.replace(plain, **changes), folder)
        found = [loss for _, loss in losses(folder)]
        assert len(found) == plain.steps and found[-1] < found[0], folder.name
        return found

    alone = pytest.approx(curve(), rel=2e-4)
    assert curve(checkpoint="bottlenecks", micro_batch_size=2) == alone
    curve(checkpoint="blocks", micro_batch_size=2, precision="bf16-pure")


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_clipping_sees_what_is_projected_in_backward(micro_batch_size: int | None, text: Path, tmp_path: Path) -> None:
    """At full rank that is the whole gradient, so the run is the same."""
    plain = recipe(text, "galore", save_every=0, clip=0.05, micro_batch_size=micro_batch_size, targets=["q_proj"])
    whole = {"rank": 32, "update_gap": 100}
    run.pretrain(dataclasses.replace(plain, options=whole), tmp_path / "plain")
    run.pretrain(dataclasses.replace(plain, options={**whole, "in_backward": True}), tmp_path / "projected")
    gradients = [
        [r["gradient_norm"] for r in history(tmp_path / name) if "gradient_norm" in r]
        for name in ("plain", "projected")
    ]
    assert gradients[1][0] == pytest.approx(gradients[0][0], rel=1e-4)
    if micro_batch_size is None:  # else the basis is that of the first half of the batch
        assert gradients[1][:3] == pytest.approx(gradients[0][:3], rel=1e-3)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the embedded corpus: whole modules of the standard library, until they are 200,000 characters."""
    folder = tmp_path_factory.mktemp("library")
    size = 0
    for file in embedded_files():
        text = file.read_text(encoding="utf-8")
        (folder / f"{len(list(folder.iterdir()))}-{file.name}").write_text(text)
        size += len(text)
        if size > 200_000:
            return folder
    return folder


@pytest.mark.parametrize("method", TRAINED)
def test_it_learns_more_than_token_frequencies(method: str, library: Path, tmp_path: Path) -> None:
    layers = 2 if method == "masa" else 1  # blocks share its atoms
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "num_attention_heads": 4, "num_key_value_heads": 4}))
    options = {
        "relora": {"warm_start": 24, "cycle": 28, "restart_warmup_steps": 5},
        "sst": {"interval": 15, "restart_warmup_steps": 5},
        "galore": {"scale": 1.0},
        "trion": {"adamw_lr": 1e-2},
        "apollo-mini": {"scale": 128**0.5 / 4},  # for a sketch of 16 rows
    }
    settings: dict[str, Any] = {
        "method": with_factors(method),
        "model": str(tmp_path / "config.json"),
        "data": str(library),
        "vocab_size": 300,
        "sequence_length": 32,
        "batch_size": 8,
        "steps": 120 if method == "spectron" else 80,
        "warmup_steps": 12,
        # Adafactor's steps are relative to the size of the weights, Spectron's are bounds on those of a product
        "lr": {"adafactor": 0.3, "spectron": 0.1, "adamw-8bit": 5e-3, "dense": 5e-3, "factor-lr": 5e-3}.get(
            method, 1e-2
        ),
        # which moves factors faster
        "optimizer": "muon" if method in ("cola", "low-rank", "sltrain", "crnet", "masa") else "adamw",
        "eval_every": 0,
        "save_every": 0,
        "options": options.get(method, {}),
    }
    if "rank" in options_of(method):
        settings["rank"] = 16
    found = run.pretrain(Recipe(**settings), tmp_path / "run")
    corpus = load_corpus(str(library), vocab_size=300, sequence_length=32, seed=42)
    ids = np.concatenate(corpus.validation["input_ids"])
    share = np.bincount(ids) / len(ids)
    entropy = -sum(p * np.log(p) for p in share if p)  # of the validation text itself: no unigram model does better
    assert found is not None
    assert found.validation_loss_nats_per_token < entropy
