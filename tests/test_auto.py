"""`import lorank` is cheap, and its promises to the Auto classes are kept whatever is imported first."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.auto import configuration_auto

from lorank import CoLA, SLTrain, convert
from lorank.pretrained import config_class, model_class


def test_import_order_and_repetition_do_not_matter(fresh_python: Callable[..., str]) -> None:
    """transformers' table imported by someone else, looked for without being imported, or imported long after lorank."""
    said = fresh_python(
        """
        import importlib.util, sys
        before = set(sys.modules)
        import lorank
        assert not {"torch", "transformers", "numpy"} & set(sys.modules)
        assert not any(name.startswith("transformers") for name in set(sys.modules) - before)
        assert importlib.util.find_spec("transformers.models.auto.configuration_auto")  # a look, not an import
        from transformers import AutoConfig, PreTrainedModel
        print(type(AutoConfig.for_model("lorank_llama", lorank=None)).__name__)
        finders = [type(finder).__module__ for finder in sys.meta_path if not isinstance(finder, type)]
        print("lorank.auto" in finders)
        """
    )
    assert said.split() == ["LorankLlamaConfig", "False"]


def test_every_architecture_of_transformers_has_a_promise() -> None:
    promised = {"lorank_" + name for name in configuration_auto.CONFIG_MAPPING_NAMES}
    assert len(promised) > 200
    assert all(name in configuration_auto.CONFIG_MAPPING for name in promised)


def test_the_dense_types_are_not_touched() -> None:
    assert configuration_auto.CONFIG_MAPPING["llama"] is LlamaConfig
    config = AutoConfig.for_model("llama", vocab_size=8, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    assert type(AutoModelForCausalLM.from_config(config)) is LlamaForCausalLM


def test_a_promise_becomes_one_subclass_of_the_dense_class() -> None:
    real = config_class("llama")
    assert issubclass(real, LlamaConfig)
    assert real.model_type == "lorank_llama"
    assert config_class("llama") is real
    assert type(AutoConfig.for_model("lorank_llama")) is real
    generated = model_class(LlamaForCausalLM, real)
    assert issubclass(generated, LlamaForCausalLM)
    assert model_class(LlamaForCausalLM, real) is generated
    assert generated.config_class is real


def test_an_unknown_architecture_has_no_class() -> None:
    with pytest.raises(ValueError, match="must be known to transformers, .* got 'lama'"):
        config_class("lama")


def test_a_dense_class_does_not_read_a_converted_model(small: Callable[..., Any], tmp_path: Path) -> None:
    """It would find no weight of its layers and only warn."""
    model = convert(small("llama"), CoLA(rank=4))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^LlamaConfig must not read a model of type 'lorank_llama'"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    for build in (LlamaForCausalLM, partial(LlamaForCausalLM.from_pretrained, tmp_path)):
        with pytest.raises(
            ValueError, match="^LlamaForCausalLM must have a dense configuration, got a LorankLlamaConfig"
        ):
            build(config=AutoConfig.from_pretrained(tmp_path))
    assert type(type(model).from_pretrained(tmp_path)) is type(AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("door", ["class", "auto", "body", "folder", "other method", "dense weights"])
def test_a_configuration_of_another_model_is_refused(door: str, small: Callable[..., Any], tmp_path: Path) -> None:
    """Layers whose weights have other names would be drawn at random, with a warning."""
    dense = small("llama")
    dense.save_pretrained(tmp_path / "dense")
    other = convert(small("llama"), SLTrain(rank=4)).config
    convert(small("llama"), CoLA(rank=4)).save_pretrained(tmp_path / "cola")
    kind: Any = {"class": LlamaForCausalLM, "body": LlamaModel, "folder": LlamaForCausalLM}.get(
        door, AutoModelForCausalLM
    )
    config: Any = {"folder": str(tmp_path / "dense"), "other method": other, "dense weights": other}.get(
        door, dense.config
    )
    saved = "'llama', got" if door == "dense weights" else r"'lorank_llama' \(method 'cola'\), got"
    with pytest.raises(
        ValueError, match=f"must get the configuration of the weights in .* is of type {saved} one of type"
    ):
        kind.from_pretrained(tmp_path / ("dense" if door == "dense weights" else "cola"), config=config)
    same = copy.deepcopy(AutoConfig.from_pretrained(tmp_path / "cola"))
    same._name_or_path = ""
    AutoModelForCausalLM.from_pretrained(tmp_path / "cola", config=same)
    LlamaForCausalLM.from_pretrained(tmp_path / "dense", config=dense.config)


def test_import_lorank_suffices_to_refuse_another_configuration(
    small: Callable[..., Any], tmp_path: Path, fresh_python: Callable[..., str]
) -> None:
    convert(small("llama"), CoLA(rank=4)).save_pretrained(tmp_path)
    said = fresh_python(
        f"""
        import lorank
        from transformers import LlamaConfig, LlamaForCausalLM
        try:
            LlamaForCausalLM.from_pretrained({str(tmp_path)!r}, config=LlamaConfig())
        except ValueError as error:
            print(error)
        """
    )
    assert said.startswith("LlamaForCausalLM must get the configuration of the weights")
