"""`lorank analyze`: any saved model is analyzed, and a suggested recipe trains."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lorank
from lorank.analysis import analyze
from lorank.methods.cola import CoLALinear
from lorank.train import analysis, run
from lorank.train.analysis import analyze_folder
from lorank.train.evaluation import evaluate_folder
from lorank.train.methods import methods_of, title_of
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe
from tests.conftest import ARCHITECTURES, VOCABULARY

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text; models with the same tokenizer: dense, converted (masa), masked, its body, an encoder-decoder and one with a
    broken weight (nan); a masked model without a mask token (maskless) and a model without a tokenizer (wordless)."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "fox.txt").write_text("".join(f"line {i}: the quick fox counts {i * i} lazy dogs\n" for i in range(400)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>", "<mask>"], show_progress=False)
    tokenizer.train_from_iterator([(folder / "fox.txt").read_text()], trainer)
    plain, masking = (
        t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>", bos_token="<s>", **more)
        for more in ({}, {"mask_token": "<mask>"})
    )
    dense, broken = ARCHITECTURES["llama"].dense(), ARCHITECTURES["llama"].dense()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    bert = t.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **SHAPE)
    masked = t.BertForMaskedLM(bert)
    t5 = t.T5ForConditionalGeneration(t.T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1, num_heads=2))
    for name, model, words in (
        ("dense", dense, plain),
        ("masa", lorank.convert(ARCHITECTURES["llama"].dense(), "masa"), plain),
        ("masked", masked, masking),
        ("maskless", masked, plain),
        ("body", t.BertModel(bert), masking),
        ("t5", t5, plain),
        ("nan", broken, plain),
        ("wordless", dense, None),
    ):
        model.save_pretrained(folder / name)
        if words is not None:
            words.save_pretrained(folder / name)
    return folder


def ranks_of(model: nn.Module) -> list[int]:
    return sorted(module.A.out_features for module in model.modules() if isinstance(module, CoLALinear))


@pytest.mark.parametrize("name", ["dense", "masa"])
def test_the_suggested_recipe_has_its_ranks(name: str, saved: Path, tmp_path: Path) -> None:
    found = analyze_folder(
        str(saved / name), tmp_path, data=str(saved / "fox.txt"), sequence_length=32, tokens=2000, budget="0.5"
    )
    assert json.loads((tmp_path / "results.json").read_text()) == found
    suggestion, recipe = found["suggestion"], Recipe.read(tmp_path / "suggested.yaml")
    assert title_of(recipe) == "cola" and methods_of(recipe).method.rank == suggestion["table"]  # type: ignore[attr-defined]
    model = build_model(recipe, build_config(recipe))
    assert ranks_of(model) == sorted(suggestion["ranks"].values())
    factors = [p for module in model.modules() if isinstance(module, CoLALinear) for p in module.parameters()]
    assert sum(p.numel() for p in factors if p.ndim == 2) == suggestion["parameters"]
    assert suggestion["parameters"] / suggestion["dense_parameters"] == pytest.approx(0.5, abs=0.01)


def test_a_runs_recipe_changes_only_its_methods(saved: Path, tmp_path: Path) -> None:
    given = Recipe(
        model=str(saved / "dense"), tokenizer=str(saved / "dense"), vocab_size=VOCABULARY, method="galore", rank=4
    )
    given = dataclasses.replace(given, optimizer="muon", lr=0.02, exclude=["down_proj"], sequence_length=48)
    ARCHITECTURES["llama"].dense().save_pretrained(tmp_path / "run")
    t.AutoTokenizer.from_pretrained(saved / "dense").save_pretrained(tmp_path / "run")
    (tmp_path / "run/recipe.yaml").write_text(given.to_yaml())
    form = {"data": str(saved / "fox.txt"), "sequence_length": 32, "tokens": 500}
    found = analyze_folder(str(tmp_path / "run"), tmp_path / "out", budget="0.5", **form)
    recipe = Recipe.read(tmp_path / "out/suggested.yaml")
    assert title_of(recipe) == "cola" and recipe.optimizer == "muon" and recipe.exclude == []
    assert (recipe.lr, recipe.sequence_length, recipe.model) == (0.02, 48, given.model)
    assert len(found["suggestion"]["ranks"]) == 14


FAMILIES: dict[str, Callable[[], nn.Module]] = {  # their recipe needs more than their own names and defaults
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2)),
    "gemma2": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(vocab_size=VOCABULARY, head_dim=16, num_key_value_heads=2, **SHAPE)
    ),
    "falcon": lambda: t.FalconForCausalLM(
        t.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    ),
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)),
    "classifier": lambda: t.BertForSequenceClassification(t.BertConfig(vocab_size=VOCABULARY, **SHAPE)),
    "electra": lambda: t.ElectraForPreTraining(t.ElectraConfig(vocab_size=VOCABULARY, embedding_size=32, **SHAPE)),
}


@pytest.mark.filterwarnings("ignore:backbone.* each seems to hold several projections")
@pytest.mark.filterwarnings("ignore:cola leaves .* matrices that no linear layer applies")
@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_of_other_families_train(family: str, saved: Path, tmp_path: Path, monkeypatch) -> None:
    """From another folder than that of the analysis, with the same tokenizer and form of text."""
    monkeypatch.chdir(saved)
    FAMILIES[family]().save_pretrained(tmp_path / "model")
    given = {"tokenizer": str(saved / "dense"), "documents": "padded", "seed": 7, "sequence_length": 32}
    found = analyze_folder(str(tmp_path / "model"), tmp_path / "out", data="fox.txt", tokens=500, budget="0.6", **given)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.read(tmp_path / "out/suggested.yaml")
    assert {name: getattr(recipe, name) for name in given} == given and recipe.data == str(saved / "fox.txt")
    model = build_model(recipe, build_config(recipe))
    assert ranks_of(model) == sorted(found["suggestion"]["ranks"].values())
    if family == "classifier":
        assert any("the body of BertForSequenceClassification, was analyzed" in note for note in found["notes"])
        short = {"steps": 2, "warmup_steps": 1, "log_every": 1, "eval_tokens": 200, "save_every": 0}
        recipe = dataclasses.replace(recipe, documents="packed", **short)
        assert run.pretrain(recipe, tmp_path / "run") is not None


def test_a_masked_model_is_analyzed_as_it_is_trained(saved: Path, tmp_path: Path, monkeypatch) -> None:
    """About 15 % of the tokens are masked, the same ones in every pass, and gradients are of predicting them."""
    seen: list[list[dict[str, Tensor]]] = []

    def watched(model: nn.Module, batches: DataLoader, **settings: Any) -> Any:
        seen.append(list(batches))
        assert all(torch.equal(a[k], b[k]) for a, b in zip(batches, seen[0], strict=True) for k in a)
        return analyze(model, batches, **settings)

    monkeypatch.setattr(analysis, "analyze", watched)
    found = analyze_folder(
        str(saved / "masked"), tmp_path, data=str(saved / "fox.txt"), sequence_length=32, tokens=2000
    )
    assert not any("no gradients" in note for note in found["notes"])
    masked = torch.cat([batch["labels"].flatten() for batch in seen[0]]) != -100
    assert 0.1 < masked.float().mean() < 0.2
    model = t.AutoModelForMaskedLM.from_pretrained(saved / "masked").eval()
    model(**seen[0][0]).loss.backward()
    for one in found["projections"]:
        expected = torch.linalg.svdvals(model.get_parameter(f"{one['name']}.weight").grad)
        values = one["gradients"]["W"]["singular_values"]
        torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "reason"), [("body", "body without a head"), ("maskless", "have a mask token")])
def test_without_a_loss_a_note_replaces_gradients(name: str, reason: str, saved: Path, tmp_path: Path) -> None:
    found = analyze_folder(
        str(saved / name), tmp_path, data=str(saved / "fox.txt"), sequence_length=32, tokens=1000, tokenizer=None
    )
    assert any("no gradients" in note and reason in note for note in found["notes"])
    assert len(found["projections"]) == 12 and not any(one["gradients"] for one in found["projections"])


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "an encoder-decoder": ("{saved}/t5", {}, "got an encoder-decoder (t5)"),
    "broken weights": ("{saved}/nan", {}, "weights that are not finite: model.layers.1.mlp.up_proj.weight"),
    "no tokenizer": ("{saved}/wordless", {}, "give one with --tokenizer"),
    "an empty name": ("", {}, "got an empty name"),
    "an unknown name": ("nowhere/at-all", {}, "no model could be loaded"),
    "a folder without a model": ("{saved}", {}, "no config.json"),
    "all energy": ("{saved}/dense", {"alpha": 1.0}, "alpha must be between 0 and 1"),
    "long sequences": ("{saved}/dense", {"sequence_length": 128}, "64 positions"),
    "a large budget": ("{saved}/dense", {"budget": "9M"}, "budget must be between"),
    "a budget in words": ("{saved}/dense", {"budget": "half"}, "such as 10M"),
    "memory that is not a number": ("{saved}/dense", {"memory": math.nan}, "memory must be a positive number of GiB"),
    "no text": ("{saved}/dense", {"data": "no.txt"}, "no.txt"),
    "a file to write to": ("{saved}/dense", {"out": "fox.txt"}, "out must be a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_refused(name: str, saved: Path, tmp_path: Path) -> None:
    model, changes, message = BAD[name]
    given = {"data": "fox.txt", "sequence_length": 32, "budget": "0.5", **changes}
    out = saved / given.pop("out") if "out" in given else tmp_path
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as error:
        analyze_folder(model.format(saved=saved), out, **{**given, "data": str(saved / given["data"])})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# ---- at the command line


def test_without_a_causal_model_there_is_no_recipe(saved: Path, tmp_path: Path, in_this_process) -> None:
    """There are ranks, and an earlier recipe is removed, unless nobody asked for ranks."""
    config = t.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    t.DistilBertForMaskedLM(config).save_pretrained(tmp_path / "model")
    t.AutoTokenizer.from_pretrained(saved / "dense").save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    (out / "suggested.yaml").write_text("method: cola")
    flags = ["--data", saved / "fox.txt", "--sequence-length", 32, "--tokens", 500, "--out", out]
    _, said, _ = in_this_process("analyze", tmp_path / "model", *flags)
    assert (out / "suggested.yaml").exists() and "ranks:" not in said
    _, said, _ = in_this_process("analyze", tmp_path / "model", *flags, "--budget", "0.5")
    said = " ".join(said.split())
    assert (
        "no recipe" in said and "no causal language model of type 'distilbert'" in said and "at the same cost" in said
    )
    assert {one.name for one in out.iterdir()} == {"results.json", "analysis.html"}
    found = json.loads((out / "results.json").read_text())["suggestion"]
    assert len(found["ranks"]) == 12 and "distilbert" in found["no_recipe"]


def test_the_command_prints_a_table_and_names_the_recipe(
    saved: Path, tmp_path: Path, monkeypatch, in_this_process
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--data", saved / "fox.txt", "--sequence-length", 32, "--tokens", 1500, "--budget", 0.5]
    _, said, _ = in_this_process("analyze", saved / "dense", *flags)
    assert "gate_proj" in said and "lorank pretrain runs/analyze-dense/suggested.yaml" in said and "block 1" in said
    assert (tmp_path / "runs/analyze-dense/analysis.html").read_text().startswith("<!doctype html>")


def test_text_is_as_long_as_the_model_can_read(saved: Path, tmp_path: Path) -> None:
    given = {"data": str(saved / "fox.txt")}
    results = analyze_folder(str(saved / "dense"), tmp_path, tokens=100, gradient_batches=0, **given)
    assert results["sequence_length"] == 64  # its positions
    found, wanted = (
        evaluate_folder(str(saved / "dense"), max_tokens=100, **given, **more) for more in ({}, {"sequence_length": 64})
    )
    assert found == wanted
