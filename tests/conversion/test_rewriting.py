"""`convert`: which projections of which models it rewrites, those of any torch module included."""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from lorank import CoLA, LowRank, Method, ReLoRA, Site, convert
from lorank.fusion import FusedProjections
from lorank.methods.cola import CoLALinear
from lorank.rewriting import converted_with
from tests.conversion.conftest import Plain, Verbatim


def spy() -> tuple[Method, list[list[Site]]]:
    """A verbatim method, and the stacks it is going to be shown."""
    stacks: list[list[Site]] = []

    class Spy(Verbatim):
        def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
            stacks.append(list(sites))
            return super().build_stack(sites)

    return Spy(), stacks


# ---- what is rewritten


def test_every_projection_is_rewritten_with_its_sizes(architecture: Any) -> None:
    dense = architecture.dense()
    biased = {name for name, _ in dense.named_parameters() if name.endswith(".bias")}
    blocks = convert(dense, CoLA(rank=5)).get_submodule(architecture.blocks)
    assert len(blocks) == 2
    for depth, block in enumerate(blocks):
        found = {name: module for name, module in block.named_modules() if isinstance(module, CoLALinear)}
        shapes = {name: (layer.A.in_features, layer.B.out_features) for name, layer in found.items()}
        assert shapes == architecture.projections
        for name, layer in found.items():
            assert layer.A.out_features == layer.B.in_features == 5
            fused = name.rpartition(".")[0]
            had = f"{architecture.blocks}.{depth}.{name}.bias", f"{architecture.blocks}.{depth}.{fused}.bias"
            assert (layer.B.bias is not None) == bool(biased.intersection(had)), name


def test_everything_outside_projections_is_the_same_object(architecture: Any) -> None:
    model = architecture.dense()
    projections = {
        name
        for name, module in model.named_modules()
        if name.startswith(f"{architecture.blocks}.") and isinstance(module, nn.Linear | Conv1D)
    }
    modules = {n: m for n, m in model.named_modules() if not list(m.children()) and n not in projections}
    parameters = {
        n: p for n, p in model.named_parameters(remove_duplicate=False) if n.rpartition(".")[0] not in projections
    }
    values = {name: value.detach().clone() for name, value in parameters.items()}
    assert model.get_output_embeddings() in modules.values()
    assert model.get_input_embeddings() in modules.values()
    assert any("norm" in type(module).__name__.lower() for module in modules.values())

    convert(model, CoLA())

    after, now = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is module for name, module in modules.items())
    assert all(now[name] is value and torch.equal(value, values[name]) for name, value in parameters.items())
    assert {name for name in now if ".A." not in name and ".B." not in name} == set(parameters)


def test_the_model_is_changed_in_place_and_returned(small: Callable[..., Any]) -> None:
    model = small("llama")
    assert convert(model, CoLA()) is model


def test_training_mode_device_and_dtype_are_kept(small: Callable[..., Any]) -> None:
    model = convert(small("llama").to(torch.bfloat16).train(), CoLA())
    assert all(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name in ("llama", "gpt2"):  # of which one has fused, transposed matrices
        assert not any(module.training for module in convert(small(name), CoLA()).modules())


def test_a_method_may_be_called_by_name(small: Callable[..., Any]) -> None:
    assert convert(small("llama"), "low-rank").config.lorank["arguments"]["rank"] == 0.25
    with pytest.raises(ValueError, match=r"unknown method 'colla'; did you mean 'cola'\? The methods are: dense, cola"):
        convert(small("llama"), "colla")


def test_sites_come_in_stacks_in_order_of_depth(architecture: Any) -> None:
    method, stacks = spy()
    convert(architecture.dense(), method)
    assert len(stacks) == 2 * len(architecture.projections)  # the trial on shapes comes first
    stacks = stacks[len(stacks) // 2 :]
    for stack, (inner, sizes) in zip(stacks, sorted_like(stacks, architecture.projections), strict=True):
        assert [site.depth for site in stack] == [0, 1]
        assert {site.role for site in stack} == {f"{architecture.blocks}.*.{inner}"}
        assert [site.name for site in stack] == [f"{architecture.blocks}.{depth}.{inner}" for depth in (0, 1)]
        assert {(site.d_in, site.d_out) for site in stack} == {sizes}


def sorted_like(stacks: list[list[Site]], projections: dict[str, Any]) -> list[tuple[str, Any]]:
    names = [next(inner for inner in projections if stack[0].name.endswith(f".0.{inner}")) for stack in stacks]
    return [(name, projections[name]) for name in names]


# ---- fused matrices and transposed weights


def test_split_and_joined_projections_are_the_model_itself(architecture: Any, tokens: Tensor) -> None:
    """With each part replaced by its own rows of the dense matrix, not a logit moves."""
    dense, model = architecture.dense().double(), convert(architecture.dense().double(), Verbatim())
    fused = [module for module in model.modules() if isinstance(module, FusedProjections)]
    assert len(fused) == {"gpt2": 2, "gpt_neox": 2, "phi3": 4}.get(architecture.name, 0)  # two blocks
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "fused", "order"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn", ["query", "key", "value"]),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value", ["query", "key", "value"]),
        ("phi3", "model.layers.1.self_attn.qkv_proj", ["query", "key", "value"]),
        ("phi3", "model.layers.1.mlp.gate_up_proj", ["gate", "up"]),
    ],
)
def test_each_part_of_a_fused_matrix_reaches_its_outputs_only(
    name: str, fused: str, order: list[str], small: Callable[..., Any]
) -> None:
    """Setting one part to zero silences exactly the outputs that the architecture's own code reads as that part."""
    model = convert(small(name), Verbatim())
    module = model.get_submodule(fused)
    assert [part for part, _ in module.named_children()] == order
    x = torch.randn(3, 32)
    whole = module(x)
    for part in order:
        silenced = copy.deepcopy(module)
        for parameter in silenced.get_submodule(part).parameters():
            nn.init.zeros_(parameter)
        read = split_as_the_architecture_does(name, silenced(x), order)
        untouched = split_as_the_architecture_does(name, whole, order)
        assert torch.equal(read[part], torch.zeros_like(read[part]))
        assert all(torch.equal(read[other], untouched[other]) for other in order if other != part)


def split_as_the_architecture_does(name: str, y: Tensor, order: list[str]) -> dict[str, Tensor]:
    if name == "gpt_neox":  # modeling_gpt_neox: view(..., heads, 3 * head_size), then chunk(3)
        parts = y.view(*y.shape[:-1], 4, 3 * 8).chunk(3, dim=-1)
    elif len(order) == 2:
        parts = y.chunk(2, dim=-1)
    else:  # gpt2: split(hidden_size); phi3: slices of the query's, key's and value's widths
        parts = y.split([32, 32, 32] if name == "gpt2" else [32, 16, 16], dim=-1)
    return dict(zip(order, parts, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_part_of_a_fused_matrix_may_be_converted_alone(name: str, small: Callable[..., Any], tokens: Tensor) -> None:
    dense = small(name).double()
    verbatim = convert(small(name).double(), Verbatim(), targets="query$")
    torch.testing.assert_close(verbatim(tokens).logits, dense(tokens).logits, rtol=1e-12, atol=1e-12)

    model = convert(small(name), CoLA(), targets="query$")
    fused = [module for module in model.modules() if isinstance(module, FusedProjections)]
    assert len(fused) == 2
    for module in fused:
        assert [type(part) for part in module.children()] == [CoLALinear, nn.Linear, nn.Linear]
    assert not any(type(parameter) is not nn.Parameter for parameter in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_the_parts_left_dense_have_memory_of_their_own(name: str, small: Callable[..., Any]) -> None:
    parameters = list(convert(small(name), CoLA(), targets="query$").parameters())
    assert all(parameter.is_contiguous() for parameter in parameters)
    storages = [parameter.untyped_storage() for parameter in parameters]
    assert len({storage.data_ptr() for storage in storages}) == len(parameters)
    assert sum(storage.nbytes() for storage in storages) == sum(parameter.nbytes for parameter in parameters)


def test_a_conv1d_has_the_orientation_of_a_linear_layer(small: Callable[..., Any]) -> None:
    model = small("gpt2")
    conv = model.transformer.h[1].mlp.c_fc  # weight [d_in, d_out]
    method, stacks = spy()
    convert(model, method)
    site = [site for stack in stacks for site in stack if site.name == "transformer.h.1.mlp.c_fc"][
        -1
    ]  # the trial's is first
    assert site.linear.weight.shape == (80, 32)
    x = torch.randn(4, 32)
    torch.testing.assert_close(site.linear(x), conv(x))


# ---- what to rewrite


def converted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, CoLALinear)}


def test_targets_and_exclude_are_searched_and_exclude_wins(small: Callable[..., Any]) -> None:
    mlp = {f"model.layers.{depth}.mlp.{name}_proj" for depth in (0, 1) for name in ("gate", "up", "down")}
    attention = {f"model.layers.{depth}.self_attn.{name}_proj" for depth in (0, 1) for name in "qkvo"}

    def names(**choice: Any) -> set[str]:
        return converted_names(convert(small("llama"), CoLA(), **choice))

    assert names() == names(targets=[]) == names(targets=None, exclude=()) == mlp | attention
    assert names(targets="mlp") == names(targets=["mlp"]) == names(exclude="self_attn") == mlp
    assert names(targets=["mlp", "q_proj$"], exclude=r"layers\.0") == {
        *(name for name in mlp if ".1." in name),
        "model.layers.1.self_attn.q_proj",
    }
    assert names(targets="q_proj|k_proj", exclude=["k_proj"]) == {name for name in attention if name.endswith("q_proj")}


def test_what_is_not_chosen_stays_the_same_dense_layer(small: Callable[..., Any]) -> None:
    model = small("llama")
    kept = model.model.layers[0].self_attn.v_proj
    convert(model, CoLA(), exclude="v_proj")
    assert model.model.layers[0].self_attn.v_proj is kept


def test_a_rank_table_gives_each_module_its_rank(small: Callable[..., Any]) -> None:
    blocks = convert(small("llama"), CoLA(rank={r"layers\.0\..*q_proj": 3, "k_proj": 0.5, ".*": 6})).model.layers
    assert blocks[0].self_attn.q_proj.A.out_features == 3
    assert blocks[1].self_attn.q_proj.A.out_features == 6
    assert blocks[0].self_attn.k_proj.A.out_features == 8  # half of the 16 key dimensions
    assert blocks[1].mlp.down_proj.A.out_features == 6


def test_a_fraction_follows_grouped_query_attention(small: Callable[..., Any]) -> None:
    attention = convert(small("llama"), CoLA(rank=0.25)).model.layers[0].self_attn
    assert {name: getattr(attention, f"{name}_proj").A.out_features for name in "qkvo"} == {
        "q": 8,
        "k": 4,
        "v": 4,
        "o": 8,
    }


def test_convert_warns_exactly_at_the_break_even_rank(small: Callable[..., Any]) -> None:
    square = {"num_key_value_heads": 4}  # attention is 32 x 32: 16 is where two factors are as large
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(small("llama", **square), CoLA(rank=15))
    dense = small("llama", **square)
    with pytest.warns(
        UserWarning, match=r"not smaller than the dense layer in .*q_proj \(rank 16, break-even 16\)"
    ) as caught:
        model = convert(small("llama", **square), LowRank(rank=16), targets="self_attn")
    assert len(caught) == 1
    assert model.num_parameters() == dense.num_parameters()


# ---- any torch module


def test_a_plain_module_with_a_list_of_blocks_converts_too(tokens: Tensor) -> None:
    model = Plain()
    heads = list(model.heads)
    assert convert(model, CoLA(rank=4), exclude=r"2\.fc2") is model
    assert converted_names(model) == {f"layers.{i}.fc{j}" for i in range(3) for j in (1, 2)} - {"layers.2.fc2"}
    assert list(model.heads) == heads
    assert type(model) is Plain
    assert converted_with(model) == {
        "method": "cola",
        "arguments": CoLA(rank=4).to_dict(),
        "targets": None,
        "exclude": [r"2\.fc2"],
    }
    model(tokens).sum().backward()
    with pytest.raises(ValueError, match="already converted"):
        convert(model, CoLA())


def test_one_block_used_at_two_depths_stays_one_block(tokens: Tensor) -> None:
    model = Plain()
    shared = model.layers[0]
    model.layers[2] = shared
    convert(model, CoLA(rank=4))
    assert model.layers[2] is model.layers[0] is shared
    model(tokens)


def test_the_callers_configuration_stays_dense(architectures: Any) -> None:
    from transformers import LlamaForCausalLM

    config = architectures["llama"].config()
    before = config.to_json_string(use_diff=False)
    model = convert(LlamaForCausalLM(config), CoLA())
    assert type(config) is LlamaConfig
    assert config.to_json_string(use_diff=False) == before
    assert not hasattr(config, "lorank")
    assert model.config is not config
    assert type(LlamaForCausalLM(config)) is LlamaForCausalLM
    assert converted_names(LlamaForCausalLM(config)) == set()


# ---- trained weights


@pytest.mark.parametrize("method", [CoLA(rank=4), ReLoRA(rank=4)], ids=lambda method: method.name)
def test_trained_weights_are_not_dropped_without_a_word(method: Method, small: Any, tmp_path: Path) -> None:
    """ReLoRA begins with them. A model that was not loaded has none, also if its configuration was."""
    fresh = small("llama")
    fresh.save_pretrained(tmp_path)
    convert(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)), method)
    convert(fresh, method)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    if method.keeps_outputs:
        convert(trained, method)
        return
    with pytest.warns(
        UserWarning, match="cola drops the trained weights of 14 projections: its new layers do not"
    ) as said:
        convert(trained, method)
    assert len(said) == 1 and said[0].filename == __file__
