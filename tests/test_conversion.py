"""`convert`: what it rewrites, what it leaves alone, and what it refuses without having changed anything."""

import copy
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorank import CoLA, CoLAM, LowRank, Method, Site, convert
from lorank.conversion import merge
from lorank.fusion import FusedProjections
from lorank.methods.cola import CoLALinear
from lorank.rewriting import converted_with
from lorank.sites import find_sites


@dataclass(frozen=True, kw_only=True)
class Verbatim(Method):
    """A method that changes nothing: every projection is replaced by a copy of itself."""

    name: ClassVar[str] = "verbatim"

    def build(self, site: Site) -> nn.Module:
        return copy.deepcopy(site.linear)


def spy() -> tuple[Method, list[list[Site]]]:
    """A verbatim method, and the stacks it is going to be shown."""
    stacks: list[list[Site]] = []

    class Spy(Verbatim):
        def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
            stacks.append(list(sites))
            return super().build_stack(sites)

    return Spy(), stacks


class Block(nn.Module):
    """A residual MLP of plain torch."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class Plain(nn.Module):
    """A network that transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 32)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))  # a list of heads is no list of blocks

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.layers:
            x = block(x)
        return self.heads[0](x)


class Unchanged:
    """Everything a refusal must not touch: classes, weights, configuration, checkpointing."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.before = self.look()
        self.weights = copy.deepcopy(model.state_dict())

    def look(self) -> Any:
        config = getattr(self.model, "config", None)
        return (
            type(self.model),
            type(config),
            config and config.to_json_string(use_diff=False),
            [(name, id(module), type(module)) for name, module in self.model.named_modules()],
            [(name, id(parameter)) for name, parameter in self.model.named_parameters()],
            getattr(self.model, "is_activation_checkpointing", None),
        )

    def check(self) -> None:
        assert self.look() == self.before
        after = self.model.state_dict()
        assert after.keys() == self.weights.keys()
        assert all(torch.equal(after[name], value) for name, value in self.weights.items())
        assert converted_with(self.model) is None


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
    assert not any(module.training for module in convert(small("llama"), CoLA()).modules())


def test_a_method_may_be_called_by_name(small: Callable[..., Any]) -> None:
    assert convert(small("llama"), "low-rank").config.lorank["arguments"] == {"rank": 0.25}
    with pytest.raises(ValueError, match=r"unknown method 'colla'; did you mean 'cola'\? The methods are: dense, cola"):
        convert(small("llama"), "colla")


def test_sites_come_in_stacks_in_order_of_depth(architecture: Any) -> None:
    method, stacks = spy()
    convert(architecture.dense(), method)
    assert len(stacks) == len(architecture.projections)
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
    site = next(site for stack in stacks for site in stack if site.name == "transformer.h.1.mlp.c_fc")
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
        "arguments": {"rank": 4, "nonlinearity": "both", "activation": "silu"},
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


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": "c_attn"},
            r"targets must match linear layers of the blocks, got 'c_attn'; they are: model\.layers\.\*\.self_attn",
        ),
        ({"targets": "lm_head"}, r"targets must match linear layers of the blocks, got 'lm_head'"),
        ({"targets": ["q_proj", "nothing"]}, "targets must match linear layers of the blocks, got 'nothing'"),
        ({"exclude": "nothing"}, "exclude must match linear layers of the blocks, got 'nothing'"),
        (
            {"targets": "q_proj", "exclude": "self_attn"},
            "exclude must leave a linear layer to convert, got 'self_attn'",
        ),
        ({"targets": "("}, r"targets must hold regular expressions as strings, got '\('"),
        ({"exclude": ["q_proj", "["]}, r"exclude must hold regular expressions as strings, got '\['"),
        (
            {"method": CoLA(rank={"q_proj": 4})},
            r"rank table must have a pattern for model\.layers\.0\.self_attn\.k_proj",
        ),
        (
            {"method": CoLA(nonlinearity="low-rank"), "exclude": "gate_proj"},
            "the name of no converted projection is known",
        ),
        (
            {"method": CoLAM(nonlinearity="reduced"), "exclude": "gate_proj"},
            "the name of no converted projection is known",
        ),
    ],
)
def test_a_refusal_is_one_sentence_and_changes_nothing(
    options: dict[str, Any], message: str, small: Callable[..., Any]
) -> None:
    model = small("llama")
    unchanged = Unchanged(model)
    with pytest.raises(ValueError, match=message) as refusal:
        convert(model, options.pop("method", CoLA()), **options)
    assert "\n" not in str(refusal.value)
    unchanged.check()
    convert(model, CoLA())  # and can still be converted


def test_a_model_is_converted_only_once(small: Callable[..., Any]) -> None:
    model = convert(small("llama"), CoLA(rank=8))
    weights, kind = copy.deepcopy(model.state_dict()), type(model)
    for again in (model, model.model, nn.ModuleDict({"inside": model})):
        with pytest.raises(
            ValueError, match=r"model must be dense, got one that is already converted \(method 'cola'\)"
        ):
            convert(again, LowRank(rank=4))
    assert type(model) is kind
    assert model.config.lorank["method"] == "cola"
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_model_with_a_converted_part_is_refused() -> None:
    model = Plain()
    outer = nn.ModuleDict({"inside": model})
    convert(model, CoLA(rank=4))
    with pytest.raises(ValueError, match="already converted"):
        convert(outer, CoLA(rank=4))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        nn.Linear(8, 8),
        nn.ModuleList([nn.Embedding(8, 8)]),
        nn.Module(),
    ],
    ids=["sequential", "linear", "embeddings", "empty"],
)
def test_a_model_without_blocks_is_refused(model: nn.Module) -> None:
    unchanged = Unchanged(model)
    with pytest.raises(ValueError, match="must have linear layers .* inside repeated blocks"):
        convert(model, CoLA())
    unchanged.check()


def test_cola_m_without_blocks_to_checkpoint_changes_nothing() -> None:
    for choice in ("both", "low-rank"):
        model = Plain()
        unchanged = Unchanged(model)
        with pytest.raises(ValueError, match="must have blocks that transformers can checkpoint, got Plain"):
            convert(model, CoLAM(rank=4, nonlinearity=choice))  # type: ignore[arg-type]
        unchanged.check()


def test_an_activation_that_cannot_be_found_is_a_refusal() -> None:
    model = Plain()
    for block in model.layers:
        block.act = nn.Bilinear(1, 1, 1)  # nothing known as an activation
    unchanged = Unchanged(model)
    with pytest.raises(
        ValueError, match=r"layers\.0 must have an activation module to remove, got none; use nonlinearity='both'"
    ):
        convert(model, CoLA(rank=4, nonlinearity="low-rank"))
    unchanged.check()


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
def test_a_method_that_fails_at_the_end_changes_nothing(error: type[BaseException], small: Callable[..., Any]) -> None:
    class Failing(CoLA):
        name = "failing"

        def finish(self, model: nn.Module) -> None:
            super().finish(model)
            raise error("too late")

    for name in ("llama", "gpt2"):
        model = small(name)
        unchanged = Unchanged(model)
        with pytest.raises(error, match="too late"):
            convert(model, Failing(nonlinearity="low-rank"))
        unchanged.check()


def test_an_unknown_architecture_is_refused_before_any_change() -> None:
    class HomeMadeConfig(PretrainedConfig):
        model_type = "home_made"

    class HomeMade(PreTrainedModel):
        config_class = HomeMadeConfig

        def __init__(self, config: HomeMadeConfig):
            super().__init__(config)
            self.layers = nn.ModuleList(Block() for _ in range(2))
            self.post_init()

    model = HomeMade(HomeMadeConfig())
    unchanged = Unchanged(model)
    with pytest.raises(
        ValueError, match="must be known to transformers, .* got 'home_made'; register it with AutoConfig.register"
    ):
        convert(model, CoLA(rank=4))
    unchanged.check()


def test_what_was_done_is_recorded_as_json(small: Callable[..., Any]) -> None:
    model = convert(small("llama"), CoLA(rank={"q_proj": 4, ".*": 8}), targets=("q_proj", "mlp"), exclude="up_proj")
    recorded = json.loads(json.dumps(converted_with(model)))
    assert recorded["method"] == "cola"
    assert recorded["targets"] == ["q_proj", "mlp"]
    assert recorded["exclude"] == ["up_proj"]
    assert CoLA.from_dict(recorded["arguments"]) == CoLA(rank={"q_proj": 4, ".*": 8})


def test_a_class_stands_for_its_defaults(small: Callable[..., Any]) -> None:
    model = convert(small("llama"), LowRank)
    assert model.config.lorank["method"] == "low-rank" and model.config.lorank["arguments"] == {"rank": 0.25}


# ---- models that could not work afterwards


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
@pytest.mark.parametrize(
    "wrap", [torch.compile, lambda model: nn.Sequential(model), lambda model: nn.ModuleDict({"m": model})]
)
def test_a_wrapper_around_a_model_of_transformers_is_refused(wrap: Any, small: Callable[..., Any]) -> None:
    model = small("llama")
    unchanged = Unchanged(model)
    with pytest.raises(ValueError, match="model must be the LlamaForCausalLM inside this .*, which could not be saved"):
        convert(wrap(model), "cola")
    unchanged.check()


def test_a_projection_whose_weight_other_code_reads_is_refused() -> None:
    shape = {"d_model": 32, "d_ff": 80, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=96, **shape))
    with pytest.raises(
        ValueError, match="wo cannot be replaced, because the code of T5DenseActDense reads its weight; .*exclude='wo'"
    ):
        convert(t5, "cola")
    convert(t5, "cola", exclude="wo")  # the way out that the sentence names
    ids = torch.randint(3, 96, (2, 5))
    t5(input_ids=ids, decoder_input_ids=ids).logits.sum().backward()

    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(ValueError, match="the code of MambaMixer reads its weight"):
        convert(mamba, "cola")


def test_a_map_to_a_single_number_is_no_site() -> None:
    """Qwen2-MoE weighs its shared expert by one number per token."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, num_experts=2
    )
    with torch.device("meta"):
        model = transformers.Qwen2MoeForCausalLM(config)
    assert any("shared_expert_gate" in name for name, _ in model.named_modules())
    assert not any("shared_expert_gate" in site.name for site in find_sites(model))


@pytest.mark.parametrize("patterns", [re.compile("q_proj"), ["q_proj", 3]])
def test_patterns_are_strings(patterns: Any, small: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="patterns must be strings"):
        convert(small("llama"), "cola", targets=patterns)


_narrow = {"vocab_size": 96, "n_layer": 2, "n_head": 4}
FURTHER_FUSED = {
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, **_narrow),
    "mpt": lambda: transformers.MptConfig(d_model=32, vocab_size=96, n_layers=2, n_heads=4, max_seq_len=64),
    "glm": lambda: _glm(transformers.GlmConfig),
    "glm4": lambda: _glm(transformers.Glm4Config),
}


def _glm(config: Any) -> Any:
    return config(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("name", FURTHER_FUSED)
def test_parts_of_other_fused_matrices_do_what_they_say(name: str, tokens: Tensor) -> None:
    """Silencing the values (or what the gate multiplies) by hand silences the block; silencing another part does not."""
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(FURTHER_FUSED[name]()).double().eval()
    model = convert(copy.deepcopy(dense), Verbatim()).eval()
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-10, atol=1e-10)
    module = next(module for module in model.modules() if isinstance(module, FusedProjections))
    caller = next(parent for parent in model.modules() if module in parent.children())
    outputs: list[Tensor] = []
    last = [child for child in caller.children() if isinstance(child, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0].detach()))
    silent = {}
    for part, layer in module.named_children():
        kept = {p: p.detach().clone() for p in layer.parameters()}
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        outputs.clear()
        model(tokens)
        silent[part] = not outputs[0].any()
        for parameter, value in kept.items():
            parameter.data.copy_(value)
    # silu(0) = 0, so that a silent gate silences too; a silent query or key only makes attention uniform
    expected = {"query": False, "key": False, "value": True, "gate": True, "up": True}
    assert silent == {part: expected[part] for part in silent}


def test_gpt2_cross_attention_has_a_key_and_a_value() -> None:
    config = transformers.GPT2Config(n_embd=32, add_cross_attention=True, **_narrow)
    with torch.device("meta"):
        sites = [site.name for site in find_sites(transformers.GPT2LMHeadModel(config))]
    assert {name.rpartition("crossattention.")[2] for name in sites if "crossattention" in name} == {
        "c_attn.key", "c_attn.value", "q_attn", "c_proj"
    }  # fmt: skip


def test_a_class_with_another_forward_for_x_w_is_converted(tmp_path: Path) -> None:
    """Falcon's; what is saved and loaded, and what is merged, gives the same outputs. What does more is left alone."""
    from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = convert(FalconForCausalLM(config), LowRank(rank=4)).eval()
    assert not [m for m in model.transformer.h.modules() if type(m).__name__ == "FalconLinear"]
    ids = torch.arange(3, 20)[None]
    model.save_pretrained(tmp_path)
    loaded, merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), merge(model).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Routed(nn.Linear):
        def forward(self, input: Tensor, expert: int) -> Tensor:
            return super().forward(input)

    class Kept(nn.Linear):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)

    for kind in (Scaled, Routed, Kept):
        assert not find_sites(nn.Sequential(nn.ModuleList([nn.ModuleDict({"up": kind(4, 4)})])))
