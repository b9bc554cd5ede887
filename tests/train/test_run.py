"""Whole runs: the files that they leave, the same losses for the same seed, and errors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, TrainerCallback, get_scheduler

from lorank import accounting
from lorank.train.build import build_trainer
from lorank.train.data import load_corpus
from lorank.train.evaluation import evaluate_folder
from lorank.train.folder import history, read_run
from lorank.train.methods import resolved
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain
from lorank.train.trainer import PretrainTrainer


@pytest.fixture(scope="module")
def finished(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Summary and folder of a run of eight steps that saved after each second."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounting, "achievable_flops", lambda: (1e3, "measured while others computed"))
        return pretrain(recipe(save_every=2, keep=2), out), out


def test_a_run_leaves_everything_it_promises(finished: Any, recipe: Any) -> None:
    summary, out = finished
    assert summary.steps == 8 and summary.tokens == 8 * 4 * 32
    assert json.loads((out / "summary.json").read_text()) == dataclasses.asdict(summary)
    assert Recipe.read(out / "recipe.yaml") == resolved(recipe(save_every=2, keep=2))
    assert set(yaml.safe_load((out / "recipe.yaml").read_text())) == {f.name for f in dataclasses.fields(Recipe)}
    assert json.loads((out / "run.json").read_text())["packages"]["torch"] == torch.__version__
    assert not list(out.glob(".*")), "temporary files are gone"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.lorank["method"] == "cola"
    assert sum(p.numel() for p in model.parameters()) == summary.parameters
    assert 0 < summary.peak_memory_gib < 4 and summary.tokens_per_second > 0
    assert 0 < summary.mfu <= 1, "a rate that was reached raises the peak"
    assert f"{summary.validation_perplexity:.2f}" in (out / "README.md").read_text()
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}, "two are kept"


@pytest.mark.parametrize("all_at_end", [False, True])
def test_eval_tokens_hold_for_the_last_evaluation(all_at_end: bool, recipe: Any, tmp_path: Path) -> None:
    asked = recipe(steps=2, warmup_steps=1, eval_every=2, save_every=0, eval_tokens=100, eval_all_at_end=all_at_end)
    summary = pretrain(asked, tmp_path / "run")
    [found] = [record for record in history(tmp_path / "run") if "eval_perplexity" in record]
    assert summary is not None and 100 <= found["eval_tokens"] < 200
    if all_at_end:
        assert summary.evaluated_tokens > 200
    else:
        assert summary.evaluated_tokens == found["eval_tokens"]
        assert evaluate_folder(str(tmp_path / "run")).loss == pytest.approx(found["eval_loss_nats_per_token"], rel=1e-6)
        assert summary.validation_loss_nats_per_token == found["eval_loss_nats_per_token"]


def test_what_training_switches_off_is_not_saved(finished: Any) -> None:
    """The next token needs one position of the first block, not all of them again; from a checkpoint as well."""
    for folder in (finished[1], finished[1] / "checkpoint-8"):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert model.config.use_cache and model.generation_config.use_cache is not False
        seen: list[int] = []
        model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))  # noqa: B023
        model.generate(torch.arange(1, 9)[None], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert seen == [8, 1, 1, 1, 1]


def test_others_may_read_what_they_may_read_of_any_file(finished: Any, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    assert {file.stat().st_mode for file in finished[1].rglob("*") if file.is_file()} == {usual}


def test_a_finished_run_is_not_changed(finished: Any, recipe: Any) -> None:
    out = finished[1]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already contains a run"):
        pretrain(recipe(steps=4), out)
    with pytest.raises(ValueError, match="is finished"):
        pretrain(read_run(out), out, resume=True)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_too_short_to_log_ends_well(recipe: Any, tmp_path: Path) -> None:
    summary = pretrain(recipe(steps=1, warmup_steps=0, log_every=10, eval_every=0), tmp_path / "run")
    assert summary is not None and summary.tokens_per_second is None and not list(history(tmp_path / "run"))


@pytest.mark.usefixtures("quick")
def test_a_seed_decides_the_run(recipe: Any, losses: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain(recipe(steps=3, seed=seed), tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


@pytest.mark.usefixtures("quick")
def test_accumulation_is_one_large_batch(finished: Any, recipe: Any, losses: Any, tmp_path: Path) -> None:
    pretrain(recipe(micro_batch_size=1), tmp_path / "four")
    for (_, one, norm), (_, four, other_norm) in zip(losses(finished[1]), losses(tmp_path / "four"), strict=True):
        assert one == pytest.approx(four, rel=1e-4) and norm == pytest.approx(other_norm, rel=1e-3)


def trainer_of(recipe: Recipe, out: Path) -> Any:
    corpus = load_corpus(
        recipe.data, vocab_size=recipe.vocab_size, sequence_length=recipe.sequence_length, seed=recipe.seed
    )
    return build_trainer(recipe, out, build_model(recipe, build_config(recipe, corpus.tokenizer)), corpus)


def test_the_logged_loss_is_that_of_evaluation(recipe: Any, tmp_path: Path) -> None:
    """Whatever transformers' classes call their loss: BART's looks at its answer, GPT-2's is divided by all tokens. A mixture's
    balance is logged apart, and is no mean over micro-batches."""
    (tmp_path / "same.txt").write_text("abcdefg " * 4000)
    tiny = {
        "data": str(tmp_path / "same.txt"),
        "tokenizer": "bytes",
        "vocab_size": None,
        "sequence_length": 8,
        "eval_every": 1,
    }
    tiny |= {"lr": 1e-9, "steps": 1, "warmup_steps": 0, "save_every": 0, "method": "dense"}
    bart = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "dropout": 0.0}
    gpt2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    mixture = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    mixture |= {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    for kind, shape, micro in (("bart", bart, 2), ("gpt2", gpt2, 2), ("mixtral", mixture, None)):
        pretrain(recipe(model=kind, shape=shape, micro_batch_size=micro, **tiny), tmp_path / kind)
        [trained, evaluated] = history(tmp_path / kind)
        assert trained["loss_nats_per_token"] == pytest.approx(evaluated["eval_loss_nats_per_token"], rel=1e-3), kind
        assert (trained.get("auxiliary_loss", 0) >= 1) == (kind == "mixtral")
    with pytest.raises(ValueError, match="must be one batch of one process .2. for a model that balances its experts"):
        pretrain(recipe(model="mixtral", shape=mixture, micro_batch_size=2, **tiny), tmp_path / "parts")


def test_the_learning_rate_follows_the_paper(recipe: Any, tmp_path: Path) -> None:
    """Warm-up from 0 and a cosine to a tenth: multipliers of 10,000 steps with a warm-up of 2,000."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(
        "cosine_with_min_lr", optimizer, 2_000, 10_000, scheduler_specific_kwargs={"min_lr_rate": 0.1}
    ).lr_lambdas[0]
    trainer = trainer_of(recipe(steps=10_000, warmup_steps=2_000, lr=6e-3), tmp_path / "run")
    trainer.create_optimizer_and_scheduler(10_000)
    ours = trainer.lr_scheduler.lr_lambdas[0]
    for step, expected in ((0, 0), (1, 0.0005), (1_000, 0.5), (2_000, 1.0), (6_000, 0.55), (10_000, 0.1)):
        assert ours(step) == pytest.approx(expected) == pytest.approx(theirs(step))


def test_pure_bf16_keeps_six_bytes_per_parameter(recipe: Any, tmp_path: Path) -> None:
    """Two for the weight and four for AdamW's moments; nothing else persists."""
    trainer = trainer_of(recipe(precision="bf16-pure", steps=3), tmp_path / "run")
    trainer.train()
    parameters = list(trainer.model.parameters())
    count = sum(p.numel() for p in parameters)
    assert sum(p.numel() * p.element_size() for p in parameters) == 2 * count
    state = [t for s in trainer.optimizer.optimizer.state.values() for name, t in s.items() if name != "step"]
    assert sum(t.numel() * t.element_size() for t in state) == 4 * count
    assert all(t.device == trainer.model.device for t in state)


@pytest.mark.usefixtures("quick")
def test_a_loss_that_is_not_finite_ends_the_run(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="lower lr"):
        pretrain(recipe(lr=1e20, clip=0.0, warmup_steps=0), tmp_path / "run")


@pytest.mark.usefixtures("quick")
def test_a_failing_last_evaluation_costs_no_model(recipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = recipe(steps=2, warmup_steps=1, save_every=2, eval_every=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainTrainer, "evaluation", lambda *_, **__: pytest.fail("out of memory"))
        with pytest.raises(pytest.fail.Exception):
            pretrain(asked, out)
    weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert pretrain(read_run(out), out, resume=True) is not None and (out / "summary.json").exists()
    again = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_settings_are_judged_before_text_is_read(recipe: Any, tmp_path: Path) -> None:
    for changes, message in (
        ({"report_to": ["nobody"]}, "report_to must name installed trackers"),
        ({"gradient": "eggroll", "distil": "nowhere"}, "distil must be left out with gradient=eggroll"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain(recipe(data=str(tmp_path / "no.txt"), **changes), tmp_path / "run")


def test_a_run_is_not_written_into_its_text(recipe: Any, text: Path) -> None:
    with pytest.raises(ValueError, match=r"--out must be outside of the text, .* got .*/run in "):
        pretrain(recipe(data=[str(text.parent), f"{text.parent}/other:0.5"]), text.parent / "run")
    assert not (text.parent / "run").exists()


def test_a_batch_larger_than_the_corpus_is_refused(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at most .* got 100000"):
        pretrain(recipe(batch_size=100_000, micro_batch_size=1), tmp_path / "run")


@pytest.mark.usefixtures("quick")
def test_padding_is_not_counted_as_tokens(recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": f"fox {i} counts"}) + "\n" for i in range(400)))
    r = recipe(data=str(path), documents="padded")
    corpus = load_corpus(r.data, documents="padded", vocab_size=300, sequence_length=32, seed=r.seed)
    summary = pretrain(r, tmp_path / "run")
    real = np.mean([sum(row["attention_mask"]) for row in corpus.train])
    assert summary is not None and summary.tokens == round(8 * 4 * real) < 8 * 4 * 32


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "muon", "micro_batch_size": 2}, {"method": "galore", "clip": 0.0}], ids=str
)
def test_a_bad_step_is_left_out(
    settings: dict[str, Any], recipe: Any, poison: Any, tmp_path: Path, caplog: Any
) -> None:
    """Weights and moments stay, the next steps go on, and the mean of a log line is over the others."""
    asked = recipe(on_nan="skip", log_every=2, eval_every=0, save_every=0, **settings)
    seen: dict[int, Any] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen[state.global_step] = [p.detach().clone() for p in model.parameters()]

    summary = pretrain(asked, tmp_path / "run", callbacks=[poison(4, 7, 8), Keep()])
    assert summary is not None and summary.validation_loss_nats_per_token < 6
    same = [all(map(torch.equal, seen[step - 1], seen[step])) for step in range(2, 9)]
    assert same == [False, False, True, False, False, True, True]
    records = list(history(tmp_path / "run"))
    assert [(one["step"], one.get("skipped_steps")) for one in records] == [(2, None), (4, 1), (6, None), (8, 2)]
    assert all(4 < one["loss_nats_per_token"] < 6 for one in records[:3]), "one step's loss, not half of it"
    assert "step 4 is left out: its gradient is not finite" in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_bad_step_ends_the_run_before_weights_move(recipe: Any, poison: Any, tmp_path: Path) -> None:
    asked = recipe(log_every=8, eval_every=0, save_every=3, steps=8)
    with pytest.raises(
        FloatingPointError, match=r"^the gradient of step 5 is not finite; lower lr=0\.01, .*--set on_nan=skip"
    ):
        pretrain(asked, tmp_path / "run", callbacks=[poison(*range(5, 9))])
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3"}
    with pytest.raises(FloatingPointError, match="^the gradients of steps 2 to 12 are not finite"):
        pretrain(recipe(steps=20, on_nan="skip", eval_every=0), tmp_path / "long", callbacks=[poison(*range(2, 20))])


def test_checkpoints_remember_the_last_records_alone(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorank.train.trainer.RECORDS", 2)
    pretrain(recipe(steps=4, log_every=1, save_every=4), tmp_path / "run", on_cpu=True)
    state = json.loads((tmp_path / "run/checkpoint-4/trainer_state.json").read_text())
    assert len(state["log_history"]) == 2 and len([*history(tmp_path / "run")]) > 3
