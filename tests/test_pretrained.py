"""Saving and loading with transformers' own methods, in this process and in one that starts from nothing."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForCausalLM,
    LlamaForCausalLM,
    pipeline,
)

from lorank import CoLA, CoLAM, LowRank, convert
from lorank.pretrained import config_class
from tests.conftest import same_weights

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


def test_a_converted_body_gives_hidden_states(small: Callable[..., Any], tokens: Tensor) -> None:
    """Of a class that was never built before."""
    body = small("bert", num_hidden_layers=3).base_model
    body.__class__ = type("OtherBertModel", (type(body),), {})
    found = convert(body, CoLA(rank=8))(tokens, output_hidden_states=True).hidden_states
    assert found is not None and len(found) == 4


def test_parts_that_a_table_of_ranks_does_not_name_stay_dense(tokens: Tensor, tmp_path: Path) -> None:
    """A decoder alone, whose file AutoModel reads as a whole encoder-decoder."""
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 64))}
    shape = BartConfig(vocab_size=96, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, **sizes)
    ranks = {r"decoder.*fc1$": 7, r"decoder.*self_attn": 5, r"decoder.*fc2$": 6}
    model = convert(BartForCausalLM(shape).eval(), LowRank(rank=ranks), exclude="encoder_attn")
    model.save_pretrained(tmp_path)
    whole = AutoModel.from_pretrained(tmp_path)
    assert isinstance(whole.encoder.layers[0].fc1, torch.nn.Linear)
    found = whole.decoder(tokens).last_hidden_state
    assert torch.equal(found, model.model.decoder(tokens).last_hidden_state)


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
