"""Saving and loading with transformers' own methods, in this process and in one that starts from nothing."""

import copy
import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from lorank import CoLA, CoLAM, LowRank, convert, merge
from lorank.layers import entry_std
from lorank.methods.cola import CoLALinear
from lorank.pretrained import config_class


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def relative_deviation(model: torch.nn.Module) -> dict[str, float]:
    """Root mean square of all factor entries, each divided by the standard deviation it should have been drawn with."""
    entries: dict[str, list[Tensor]] = {"A": [], "B": []}
    for layer in model.modules():
        if isinstance(layer, CoLALinear):
            s = entry_std(layer.A.in_features, layer.B.out_features, layer.A.out_features)
            entries["A"].append(layer.A.weight.detach().flatten() / s)
            entries["B"].append(layer.B.weight.detach().flatten() / s)
    return {name: torch.cat(drawn).square().mean().sqrt().item() for name, drawn in entries.items()}


# ---- a process that starts from nothing


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, architectures: Any) -> Path:
    """A folder with one converted model of every architecture in small shards, and the logits each should give."""
    folder = tmp_path_factory.mktemp("saved")
    tokens = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = {}
    for name, architecture in architectures.items():
        model = convert(architecture.dense(), CoLA(rank={"q|query": 4, ".*": 6}, nonlinearity="low-rank"))
        model.save_pretrained(folder / name, max_shard_size="20KB")
        with torch.no_grad():
            logits[name] = model(tokens).logits
    save_file({"tokens": tokens, **logits}, folder / "expected.safetensors")
    return folder


def test_import_lorank_suffices_to_load_every_architecture(saved: Path, fresh_python: Callable[..., str]) -> None:
    said = fresh_python(
        """
        import sys
        import lorank
        assert not {"torch", "transformers"} & set(sys.modules), "import lorank is to be cheap"
        import torch
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
        folder = sys.argv[1]
        expected = load_file(f"{folder}/expected.safetensors")
        tokens = expected.pop("tokens")
        for name, logits in expected.items():
            auto = AutoModelForMaskedLM if "bert" in name else AutoModelForCausalLM
            model, report = auto.from_pretrained(f"{folder}/{name}", output_loading_info=True)
            assert not any(report.values()), report
            assert model.config.model_type == AutoConfig.from_pretrained(f"{folder}/{name}").model_type == f"lorank_{name}"
            with torch.no_grad():
                assert torch.equal(model.eval()(tokens).logits, logits), name
            base = AutoModel.from_pretrained(f"{folder}/{name}")
            assert any(type(module).__name__ == "CoLALinear" for module in base.modules())
            print(name, type(model).__name__)
        """,
        str(saved),
    )
    assert said.split() == [
        *("bert", "LorankBertForMaskedLM", "gpt2", "LorankGPT2LMHeadModel", "gpt_neox", "LorankGPTNeoXForCausalLM"),
        *("llama", "LorankLlamaForCausalLM", "mistral", "LorankMistralForCausalLM", "opt", "LorankOPTForCausalLM"),
        *("phi3", "LorankPhi3ForCausalLM", "qwen3", "LorankQwen3ForCausalLM", "roberta", "LorankRobertaForMaskedLM"),
    ]


def test_without_lorank_nothing_is_loaded_by_itself(saved: Path, fresh_python: Callable[..., str]) -> None:
    said = fresh_python(
        """
        import sys
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        folder = sys.argv[1]
        try:
            AutoModelForCausalLM.from_pretrained(f"{folder}/llama")
        except ValueError as refusal:
            assert "trust_remote_code=True" in str(refusal), refusal  # the file next to the weights
            print("refused")
        import lorank
        print(type(AutoModelForCausalLM.from_pretrained(f"{folder}/llama")).__name__)
        lorank.auto.promise_auto_classes()  # as importlib.reload would
        print(type(AutoModelForCausalLM.from_pretrained(f"{folder}/gpt2")).__name__)
        print(type(AutoConfig.for_model("lorank_opt", lorank=None)).__name__)
        """,
        str(saved),
    )
    told = said.split()[-4:]  # before them is transformers' question about the file next to the weights
    assert told == ["refused", "LorankLlamaForCausalLM", "LorankGPT2LMHeadModel", "LorankOPTConfig"]


def test_only_safetensors_and_json_are_written(saved: Path) -> None:
    for folder in saved.iterdir():
        if folder.is_dir():
            files = [file.name for file in folder.iterdir() if file.name != "modeling_lorank.py"]
            assert all(name.endswith((".safetensors", ".json")) for name in files), files
            assert sum(name.endswith(".safetensors") for name in files) > 1, files
            assert "model.safetensors.index.json" in files


def test_config_json_records_the_method(saved: Path) -> None:
    written = json.loads((saved / "llama" / "config.json").read_text())
    assert written["model_type"] == "lorank_llama"
    assert written["architectures"] == ["LorankLlamaForCausalLM"]
    assert written["lorank"] == {
        "method": "cola",
        "arguments": {
            "rank": {"in_order": [["q|query", 4], [".*", 6]]},
            "nonlinearity": "low-rank",
            "activation": "silu",
            "init": "cola",
            "reuse_scale": 1.0,
            "decay_to": "zero",
            "carry": "none",
            "carry_norm": True,
        },
        "targets": None,
        "exclude": None,
        "names": "own",
        "prefix": "model.",
    }


# ---- what survives


def test_the_order_of_a_rank_table_survives(small: Callable[..., Any], tmp_path: Path) -> None:
    """Sorted, '.*' would come first and take every projection."""
    model = convert(small("llama"), CoLA(rank={"q_proj": 4, "up_proj": 5, ".*": 6}))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].self_attn.q_proj.A.out_features == 4
    assert same_weights(model, loaded)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_a_partly_converted_model_survives(
    name: str, small: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    model = convert(
        small(name), CoLA(), targets=["query$", r"1\.mlp"], exclude=r"mlp\.(c_proj|dense_4h_to_h|gate_up_proj\.up)$"
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert same_weights(model, loaded)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert loaded.config.lorank == model.config.lorank


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_tied_embeddings_survive(name: str, architectures: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = convert(architectures[name].dense(tie_word_embeddings=True), CoLA())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = architectures[name].auto.from_pretrained(tmp_path).eval()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.num_parameters() == model.num_parameters()
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_the_dtype_survives(small: Callable[..., Any], tmp_path: Path) -> None:
    model = convert(small("llama").to(torch.bfloat16), CoLA())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert same_weights(model, loaded)


def test_a_loaded_model_can_be_saved_and_loaded_again(small: Callable[..., Any], tmp_path: Path) -> None:
    model = convert(small("llama"), LowRank(rank=4), exclude="v_proj")
    model.save_pretrained(tmp_path / "once")
    AutoModelForCausalLM.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert same_weights(model, again)
    assert (tmp_path / "once" / "config.json").read_text() == (tmp_path / "twice" / "config.json").read_text()


def test_cola_m_comes_back_with_its_checkpointing(small: Callable[..., Any], tmp_path: Path) -> None:
    convert(small("llama"), CoLAM()).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).is_activation_checkpointing


def test_a_loaded_model_is_converted_already(small: Callable[..., Any], tmp_path: Path) -> None:
    convert(small("llama"), CoLA()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already converted"):
        convert(AutoModelForCausalLM.from_pretrained(tmp_path), CoLA())


def test_a_converted_model_can_be_copied_and_pickled(small: Callable[..., Any], tokens: Tensor) -> None:
    model = convert(small("llama"), CoLA())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert torch.equal(copied(tokens).logits, model(tokens).logits)


# ---- other doors of the Auto classes


def test_from_config_of_a_saved_model_draws_a_new_one(small: Callable[..., Any], tmp_path: Path) -> None:
    model = convert(small("llama"), CoLA(rank=8), exclude="v_proj")
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config) is config_class("llama")
    assert isinstance(config, LlamaConfig)
    assert config.lorank == model.config.lorank
    torch.manual_seed(7)
    fresh = AutoModelForCausalLM.from_config(config)
    assert type(fresh) is type(model)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert not same_weights(fresh, model)
    assert relative_deviation(fresh) == pytest.approx({"A": 1, "B": 1}, rel=0.04)


def test_a_body_without_head_converts_saves_and_loads(
    small: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    body = convert(AutoModel.from_config(small("llama").config), CoLA()).eval()
    body.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(body)
    assert type(body).__name__ == "LorankLlamaModel"
    assert torch.equal(body(tokens).last_hidden_state, loaded(tokens).last_hidden_state)


def test_a_pretrained_body_gets_a_new_head(small: Callable[..., Any], tmp_path: Path) -> None:
    model = convert(small("bert"), CoLA(rank=6))
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert same_weights(model.bert.encoder, classifier.bert.encoder)
    assert classifier.classifier.out_features == 3
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)).__name__ == "LorankBertForMaskedLM"


def test_a_dense_model_of_the_same_configuration_stays_dense(
    architectures: Any, tokens: Tensor, tmp_path: Path
) -> None:
    config = architectures["llama"].config()
    convert(LlamaForCausalLM(config), CoLA()).save_pretrained(tmp_path / "converted")
    dense = LlamaForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(loaded(tokens).logits, dense(tokens).logits)


def test_a_configuration_that_does_not_say_how_is_refused(architectures: Any) -> None:
    config = config_class("llama")(**architectures["llama"].settings)
    with pytest.raises(ValueError, match="must have the entry 'lorank', which records how to build its model"):
        AutoModelForCausalLM.from_config(config)


def test_a_method_that_is_not_installed_is_named(small: Callable[..., Any], tmp_path: Path) -> None:
    convert(small("llama"), CoLA()).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["lorank"]["method"] = "colla"
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="unknown method 'colla'; did you mean 'cola'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_text_generation_pipeline_takes_a_saved_model(small: Callable[..., Any], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator(["the low road and the high road", "a rank is a rank is a rank"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    convert(small("llama"), CoLA(nonlinearity="low-rank")).save_pretrained(tmp_path)

    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(write.model).__name__ == "LorankLlamaForCausalLM"
    (answer,) = write("the low rank", max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert answer["generated_text"].startswith("the low rank")
    assert len(answer["generated_text"]) > len("the low rank")


# ---- initial values belong to the method


@pytest.mark.parametrize("door", ["head", "body"])
def test_init_weights_draws_the_methods_initial_values(door: str, small: Callable[..., Any]) -> None:
    model = small("llama", hidden_size=128, intermediate_size=320, attention_bias=True)
    model = convert(model if door == "head" else model.model, CoLA(rank=32))
    before = copy.deepcopy(model.state_dict())
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)  # transformers' mark that a module has been drawn
    torch.manual_seed(11)
    model.init_weights()
    assert relative_deviation(model) == pytest.approx({"A": 1, "B": 1}, rel=0.02)
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items() if "norm" not in name)
    bias = (model.model if door == "head" else model).layers[0].self_attn.q_proj.B.bias
    assert bias.std().item() == pytest.approx(1 / math.sqrt(3 * 128), rel=0.2)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_model_from_meta_gets_the_same_initial_values(small: Callable[..., Any]) -> None:
    with torch.device("meta"):
        model = convert(small("llama", hidden_size=128, intermediate_size=320), CoLA(rank=32))
    model.to_empty(device="cpu")
    torch.manual_seed(11)
    model.init_weights()
    assert relative_deviation(model) == pytest.approx({"A": 1, "B": 1}, rel=0.02)


def test_a_factor_missing_from_the_file_is_drawn(small: Callable[..., Any], tmp_path: Path) -> None:
    model = convert(small("llama", hidden_size=128, intermediate_size=320), CoLA(rank=32))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = "model.layers.0.mlp.up_proj.A.weight"  # [32, 128]
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {missing}
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert state[missing].std().item() == pytest.approx(entry_std(128, 320, 32), rel=0.05)


def test_a_head_around_a_converted_body_is_converted_once(small: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    convert(small("llama"), CoLA(rank=4)).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert [type(module).__name__ for module in model.model.layers[0].self_attn.q_proj.children()] == [
        "Linear",
        "Linear",
    ]


@pytest.mark.parametrize(("saved_with", "loaded_with"), [("head", "body"), ("body", "head")])
def test_anchored_patterns_hold_for_the_other_form_of_a_model(
    saved_with: str, loaded_with: str, architectures: Any, tmp_path: Path
) -> None:
    auto = {"head": transformers.AutoModelForCausalLM, "body": transformers.AutoModel}
    first = {"head": r"^model\.layers\.0\.", "body": r"^layers\.0\."}[saved_with]
    model = auto[saved_with].from_config(architectures["llama"].config())
    convert(model, CoLA(rank={f"{first}mlp": 5, ".*": 3}), targets=first).save_pretrained(tmp_path)
    loaded = auto[loaded_with].from_pretrained(tmp_path)
    ranks = {
        name.removeprefix("model."): m.A.out_features for name, m in loaded.named_modules() if isinstance(m, CoLALinear)
    }
    assert len(ranks) == 7
    assert all(rank == (5 if ".mlp." in name else 3) for name, rank in ranks.items())


def test_a_pickled_model_opens_in_a_fresh_process(small: Callable[..., Any], tmp_path: Path, fresh_python: Any) -> None:
    """As multiprocessing with spawn wants it."""
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(convert(small("llama"), "cola")))
    program = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))).__name__)"
    assert fresh_python(program, str(tmp_path / "model.pickle")).strip() == "LorankLlamaForCausalLM"


def test_the_break_even_warning_is_not_repeated_on_loading(small: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="lower the rank"):
        convert(small("llama"), CoLA(rank=20)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_loaded_model_is_merged_and_converted_again(small: Callable[..., Any], tmp_path: Path) -> None:
    convert(small("llama"), "sltrain").save_pretrained(tmp_path / "first")
    dense = merge(AutoModelForCausalLM.from_pretrained(tmp_path / "first"))
    assert dense.config.model_type == "llama" and type(dense.config) is LlamaConfig
    convert(dense, "relora").save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second/config.json").read_text())["model_type"] == "lorank_llama"


def test_buffers_that_are_not_in_the_file_are_computed_again(tmp_path: Path) -> None:
    """Falcon-H1's body computes a buffer of each of its layers, and has no parameters of its own."""
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    state = {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "ssm_multipliers": [2.0, 3.0, 4.0, 5.0, 6.0],
    }
    model = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**shape, **state, num_key_value_heads=2))
    convert(model, CoLA(rank=4), targets="self_attn").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    found, expected = (dict(one.named_buffers()) for one in (loaded, model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
