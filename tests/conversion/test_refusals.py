"""`convert`: what it refuses without having changed anything."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lorank import CoLA, CoLAM, LowRank, convert
from lorank.conversion import merge
from lorank.fusion import FusedProjections
from lorank.rewriting import converted_with
from lorank.sites import find_sites
from tests.conversion.conftest import Block, Plain, Verbatim


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
            "no converted projection has a name that lorank knows",
        ),
        (
            {"method": CoLAM(nonlinearity="reduced"), "exclude": "gate_proj"},
            "no converted projection has a name that lorank knows",
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


@pytest.mark.parametrize("name", ["dense", "galore", "muon", "eggroll"])
def test_what_leaves_the_weights_alone_is_refused(name: str, small: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=f"^{name} does not decide what the weights are, so there is nothing to convert"
    ):
        convert(small("llama"), name)


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
    assert model.config.lorank["method"] == "low-rank"
    assert model.config.lorank["arguments"] == dataclasses.asdict(LowRank())


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


def test_patterns_are_a_string_or_several(small: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="patterns must be a string or several strings, got 5"):
        convert(small("llama"), "cola", targets=5)  # type: ignore[arg-type]


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
