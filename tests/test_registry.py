"""`import lorank` is cheap, and its promises to the Auto classes are kept whatever is imported first."""

from collections.abc import Callable

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto import configuration_auto

import lorank
from lorank.pretrained import config_class, model_class
from lorank.table import METHODS, find, method_names


def test_the_package_offers_what_it_lists_and_nothing_else() -> None:
    for name in lorank.__all__:
        assert getattr(lorank, name) is not None
        assert name in dir(lorank)
    with pytest.raises(AttributeError, match="module 'lorank' has no attribute 'colla'"):
        lorank.colla  # noqa: B018


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
        from transformers import AutoConfig
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


def test_a_promise_turns_into_one_real_class_that_is_a_subclass_of_the_dense_one() -> None:
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
    with pytest.raises(ValueError, match="transformers has no model type 'lama'"):
        config_class("lama")


def test_every_method_of_the_table_is_found_under_its_own_name() -> None:
    assert set(METHODS) <= set(method_names())
    for name in METHODS:
        method = find(name)
        assert method.name == name
        assert method().name == name  # every hyper-parameter has a default


def test_an_unknown_method_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(
        ValueError, match=r"unknown method 'lowrank'; did you mean 'low-rank'\? The methods are: dense, cola, cola-m"
    ):
        find("lowrank")
    with pytest.raises(ValueError, match=r"^unknown method 'zzz'\. The methods are: dense, cola"):
        find("zzz")


def test_methods_of_other_packages_join_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorank.table._registered", {})
    from importlib.metadata import EntryPoint

    points = [
        EntryPoint("theirs", "lorank.methods.low_rank:LowRank", "lorank.methods"),
        EntryPoint("cola", "lorank.methods.low_rank:LowRank", "lorank.methods"),  # must not displace ours
    ]
    monkeypatch.setattr("lorank.table._entry_points", lambda: points)
    assert method_names() == [*METHODS, "theirs"]
    assert find("theirs") is lorank.LowRank
    assert find("cola") is lorank.CoLA
