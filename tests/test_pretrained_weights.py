"""Weights of saved and new models: initial values belong to the method, whichever door a model comes through."""

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
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
)

from lorank import CoLA, convert, merge
from lorank.layers import entry_std
from lorank.methods.cola import CoLALinear
from lorank.pretrained import config_class
from tests.conftest import same_weights


def relative_deviation(model: torch.nn.Module) -> dict[str, float]:
    """Root mean square of all factor entries, each divided by the standard deviation it should have been drawn with."""
    entries: dict[str, list[Tensor]] = {"A": [], "B": []}
    for layer in model.modules():
        if isinstance(layer, CoLALinear):
            s = entry_std(layer.A.in_features, layer.B.out_features, layer.A.out_features)
            entries["A"].append(layer.A.weight.detach().flatten() / s)
            entries["B"].append(layer.B.weight.detach().flatten() / s)
    return {name: torch.cat(drawn).square().mean().sqrt().item() for name, drawn in entries.items()}


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
