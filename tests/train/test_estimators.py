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
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from lorank import accounting
from lorank.accelerators import Fleet, find_accelerator
from lorank.cli import cli
from lorank.evolution import egg
from lorank.optim import Eggroll
from lorank.plan.dry_run import plan
from lorank.plan.forecast import fit_all, forecast_all
from lorank.train import run
from lorank.train.data import byte_tokenizer, load_corpus
from lorank.train.estimators import EggEggroll, build_estimator
from lorank.train.folder import history, read_run
from lorank.train.model import build_config, build_model
from lorank.train.recipe import EGG_SETTINGS, Recipe
from lorank.train.saved import evaluate_folder

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
    return [tuple(r[name] for name in names) for r in history(folder) if "loss_nats_per_token" in r]


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
        resumed = run.pretrain(read_run(out), out, resume=True)
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
    last = [r for r in history(out) if "eval_bits_per_byte" in r][-1]
    assert last["eval_bits_per_byte"] == pytest.approx(losses[-1] / 0.6931, abs=0.5)
    assert evaluate_folder(str(out), data=str(text), sequence_length=32, max_tokens=500).tokens >= 500
    assert Recipe.read(out / "recipe.yaml").to_dict() | EGG_SETTINGS | {"batch_size": 128} == read_run(out).to_dict()


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
        (FLOAT, {"compile": True}, "changes what torch's functions do, which compile does not see"),
        (FLOAT, {"targets": ["q_proj"]}, "eggroll moves every matrix; drop targets"),
        (EGG, {"method": "cola"}, "model=egg has no gradient, so method=cola cannot train it"),
        (EGG, {"clip": 1.0}, "clip=1.0 has no meaning for model=egg; leave it at 0.0"),
        (EGG, {"optimizer": "muon"}, "optimizer=muon has no meaning for model=egg"),
        (EGG, {"lr": 1e9}, "the flag of α, which is lr, is 1000000000.0; give a part of the weights up to 1"),
        (EGG, {"options": {"rank": 2}}, "eggroll has no field 'rank'; it has population, sig"),
        (EGG, {"batch_size": 6}, "6 sequences are not dealt evenly to 8 groups"),
        (EGG, {"tokenizer": None, "vocab_size": 300}, "vocab_size"),
    ],
)
def test_refusals(kind: dict[str, Any], changes: dict[str, Any], message: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run.pretrain(recipe(text, kind, **changes), tmp_path / "run")


def test_several_processes_and_streams_that_cannot_be_carried_on_are_refused(
    text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    load = run.data.load_corpus
    streamed = lambda *a, **k: dataclasses.replace(c := load(*a, **k), train=c.train.to_iterable_dataset())  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(run.data, "load_corpus", streamed)
        with pytest.raises(
            ValueError, match="is a stream, whose rows do not go on from batch to batch; give --option carry=false"
        ):
            run.pretrain(recipe(text, EGG), tmp_path / "stream")
        options = {**EGG["options"], "carry": False}
        assert run.pretrain(recipe(text, EGG, options=options, steps=1), tmp_path / "not carried") is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    r = recipe(text, FLOAT)
    with pytest.raises(ValueError, match="eggroll runs in one process"):
        build_estimator(r, build_model(r, build_config(r)))


@pytest.mark.parametrize("carry", [True, False])
def test_rows_of_egg_go_on_from_batch_to_batch(text: Path, tmp_path: Path, monkeypatch: Any, carry: bool) -> None:
    seen: list[torch.Tensor] = []
    call = EggEggroll.__call__
    monkeypatch.setattr(
        EggEggroll, "__call__", lambda self, b, step: seen.append(b["input_ids"]) or call(self, b, step)
    )
    run.pretrain(recipe(text, EGG, options={**EGG["options"], "carry": carry}), tmp_path / "run")
    corpus = load_corpus(str(text), tokenizer="bytes", sequence_length=16, seed=42)
    whole = torch.tensor(corpus.train["input_ids"])
    lanes = whole[: len(whole) // 8 * 8].view(8, -1)  # the text cut into as many lanes as a batch has rows
    assert torch.equal(torch.cat(seen, dim=1), lanes[:, : 6 * 16]) == carry


# ---- before anything is trained


def test_every_parameter_has_its_treatment(text: Path) -> None:
    options = {"population": 8, "freeze_others": True, "rank": 2, "sigma": 0.5, "group_size": 4}
    config = {"model": "gpt2", "vocab_size": 100, "options": options}
    found = plan(recipe(text, FLOAT, **config))
    how = {row.role: (row.depths, row.treatment) for row in found.treatments}
    assert how["transformer.wte.weight"] == (1, "rank-2 noise, σ = 0.5, also as lm_head.weight; adamw")
    assert how["transformer.h.*.attn.c_attn.weight"] == (12, "rank-2 noise, σ = 0.5; adamw")
    assert how["transformer.h.*.ln_1.bias"] == (12, "no noise, not stepped")
    assert found.dense is not None and sum(depths for depths, _ in how.values()) == 148
    vectors = found.model.parameters.total - (768 * (1024 + 100) + 12 * 12 * 768**2)
    assert (
        f"noise on {found.model.parameters.total - vectors:,} of {found.model.parameters.total:,}" in found.population
    )
    numbers = 2 * (1024 + 768 + 100 + 768 + 12 * 768 * (4 + 2 + 5 + 5))
    assert found.population.startswith("8 members, 8 at a time, each group of 4 on 2 sequences of 16")
    assert found.population.endswith(f"of {numbers:,} numbers a pair")

    found = plan(recipe(text, EGG))
    how = {row.role: (row.depths, row.treatment) for row in found.treatments}
    assert how["head"] == (1, "rank-1 int8 noise, σ = 2^-4; votes")
    assert how["layers.*.bf"] == (1, "full int8 noise, σ = 2^-4; votes")
    assert found.dense is None and len(how) == 13
    assert found.population.startswith(
        "16 members, 16 at a time, each group of 2 on 1 sequence of 16; noise on 4,904 of"
    )


@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize("kind", [FLOAT, EGG], ids=["float", "egg"])
def test_a_planned_step_costs_what_a_real_one_does(kind: dict[str, Any], group_size: int, text: Path) -> None:
    """Operations to the number; bytes nearly, for a plan looks at one chunk of members."""
    options = {**kind["options"], "population": 16, "chunk": 4, "group_size": group_size}
    r = recipe(text, {**kind, "options": options}, **({"rank": 2} if kind is FLOAT else {}))
    found = plan(r).model
    torch.manual_seed(0)
    model = build_model(r, build_config(r))
    estimator = build_estimator(r, model)
    assert estimator is not None
    ids = torch.randint(1, 256, (r.batch_size, r.sequence_length))
    batch = {"input_ids": ids, "labels": ids}
    meter = accounting.Meter([*model.parameters(), *model.buffers(), ids])
    with FlopCounterMode(display=False, custom_mapping=accounting.MORE_FLOPS) as counter, meter:
        estimator(batch, 0)
    assert found.flops.total == counter.get_total_flops()
    state = found.memory.optimizer_bytes
    held = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    assert found.memory.peak_bytes - state - held == pytest.approx(meter.most, rel=0.05)
    assert found.memory.activations_bytes == 0
    assert found.memory.gradients_bytes == sum(p.grad.numel() * p.grad.element_size() for p in model.parameters())  # type: ignore[union-attr]


def test_the_flops_of_a_transformers_members_in_closed_form(text: Path) -> None:
    r = recipe(text, FLOAT, rank=2)  # 8 members of 4 sequences of 16
    found = plan(r).model
    d, d_ff, layers, tokens = 256, 688, 2, 8 * 4 * 16
    projections = [(d, d)] * 4 + [(d, d_ff)] * 2 + [(d_ff, d)]
    forward = layers * sum(2 * a * b for a, b in projections) + 2 * d * 300 + layers * 4 * 16 * d
    noise = 2 * 2 * (layers * sum(a + b for a, b in projections) + d + 300) + 2 * 2 * d  # the last is the lookup's
    assert found.flops.forward == tokens * (forward + noise)
    matrices = layers * sum(a * b for a, b in projections) + 2 * 300 * d
    assert found.flops.backward == 2 * 4 * (2 * matrices + (2 * layers + 1) * d)


def test_what_lorank_plan_says_of_eggroll() -> None:
    fleet = Fleet(accelerator=find_accelerator("h100"), devices=1)
    shape = Recipe(size="20m", batch_size=4, micro_batch_size=2, sequence_length=32)
    dense, eggroll = forecast_all([shape], ["dense", "eggroll"], fleet=fleet, tokens=10_000)
    assert eggroll.counts.flops.forward / 4 > 64 * dense.counts.flops.forward / 2, "64 members, each on the whole batch"
    assert eggroll.counts.memory.activations_bytes == 0 and eggroll.checkpoint == "none"
    assert eggroll.to_dict()["flops_per_token"] == eggroll.counts.flops_per_token
    with pytest.raises(ValueError, match="eggroll runs in one process; give --devices 1"):
        forecast_all([shape], ["eggroll"], fleet=dataclasses.replace(fleet, devices=2), tokens=10_000)
    with pytest.raises(ValueError, match="memory of method=eggroll goes by --option chunk"):
        fit_all([eggroll], 10.0)
    with pytest.raises(ValueError, match="EGG is a model of its own with no dense twin"):
        forecast_all([dataclasses.replace(shape, model="egg")], ["eggroll"], fleet=fleet)


def test_dry_runs_from_the_command_line(text: Path) -> None:
    for flags, line in [
        ("--model egg", "rank-1 int8 noise, σ = 2^-4; votes"),
        ("--method eggroll --vocab-size 300 --sequence-length 16", "rank-1 noise, σ = 0.01; adamw"),
    ]:
        done = CliRunner().invoke(cli, ["pretrain", *flags.split(), "--dry-run"], env={"COLUMNS": "150"})
        assert done.exit_code == 0, done.output
        assert line in done.output and "memory at the peak of a step" in done.output and " members, " in done.output


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_egg_is_compiled_where_the_recipe_says_so(text: Path) -> None:
    for asked in (False, True):
        r = recipe(text, EGG, compile=asked)
        estimator: Any = build_estimator(r, build_model(r, build_config(r)))
        assert (estimator.estimate.score is not egg.score) == asked


def test_egg_reads_packed_text_only(text: Path) -> None:
    with pytest.raises(ValueError, match="documents=padded has no meaning for model=egg; leave it at packed"):
        plan(recipe(text, EGG, documents="padded"))


def test_settings_of_egg_are_defaults_which_a_user_can_change(text: Path) -> None:
    assert Recipe.from_dict({"model": "egg"}).method == "eggroll"
    assert Recipe.from_dict({"model": "egg", "lr": 0.25}).lr == 0.25
    assert dataclasses.replace(Recipe(), steps=90).method == "cola"


def test_members_draw_no_dropout_masks(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their differences would be those of the masks."""
    training, call = [], Eggroll.__call__

    def remember(self: Eggroll, fitness: Any) -> Any:
        training.append(self.model.training)
        return call(self, fitness)

    monkeypatch.setattr(Eggroll, "__call__", remember)
    run.pretrain(recipe(text, FLOAT, steps=2, warmup_steps=0), tmp_path / "run")
    assert training == [False, False]
