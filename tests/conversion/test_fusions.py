"""The parts of fused matrices, wherever these stand, checked by what falls silent without them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

from lorank import CoLA, convert
from lorank.fusion import FUSED, FusedProjections
from lorank.layers import LowRankLinear
from tests.conversion.conftest import Verbatim

WIDE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
MLP = {**WIDE, "intermediate_size": 48}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 4}
DEEPSEEK = {
    "kv_lora_rank": 12,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}


LINEAR = {**MLP, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPEECH = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
}  # fmt: skip


def in_a_decoder() -> Any:
    vision = tf.ViTConfig(**{**MLP, "num_attention_heads": 2}, image_size=16, patch_size=8)
    both = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, tf.GPT2Config(**GPT2))
    return tf.VisionEncoderDecoderModel(both)


MODELS: dict[str, Callable[[], Any]] = {
    "falcon old": lambda: tf.FalconModel(tf.FalconConfig(**WIDE, multi_query=False, new_decoder_architecture=False)),
    "falcon 7b": lambda: tf.FalconModel(tf.FalconConfig(**WIDE, multi_query=True, new_decoder_architecture=False)),
    "falcon 40b": lambda: tf.FalconModel(tf.FalconConfig(**WIDE, num_kv_heads=2, new_decoder_architecture=True)),
    "bigcode": lambda: tf.GPTBigCodeModel(tf.GPTBigCodeConfig(**GPT2, multi_query=True)),
    "bigcode by head": lambda: tf.GPTBigCodeModel(tf.GPTBigCodeConfig(**GPT2, multi_query=False)),
    "codegen": lambda: tf.CodeGenModel(tf.CodeGenConfig(**GPT2, rotary_dim=4)),
    "persimmon": lambda: tf.PersimmonModel(tf.PersimmonConfig(**MLP)),
    "modernbert": lambda: tf.ModernBertModel(tf.ModernBertConfig(**MLP, pad_token_id=0)),
    "deepseek": lambda: tf.DeepseekV3Model(tf.DeepseekV3Config(**MLP, **DEEPSEEK)),
    "kimi": lambda: tf.KimiLinearModel(tf.KimiLinearConfig(**LINEAR, **DEEPSEEK, layer_types=["full_attention"])),
    "bailing": lambda: tf.BailingHybridModel(tf.BailingHybridConfig(**LINEAR, **DEEPSEEK, layer_types=["full_attention"])),
    "moshi": lambda: tf.MoshiModel(tf.MoshiConfig(**WIDE, ffn_dim=64, head_dim=8, max_position_embeddings=64)),
    "moonshine": lambda: tf.MoonshineModel(tf.MoonshineConfig(**SPEECH)),
    "gpt-2 in another model": lambda: in_a_decoder(),
}  # fmt: skip
SILENT = {"query": False, "key": False, "value": True, "gate": True, "up": True, "latent": True, "rope": False}
"""Whether the input of a layer's last projection is zero without the part: silu(0) and gelu(0) are 0."""


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_what_they_are_called(name: str, tokens: Tensor) -> None:
    torch.manual_seed(0)
    dense = MODELS[name]().double().eval()
    given = {"input_ids": tokens}
    if name == "moonshine":
        given = {"input_values": torch.randn(2, 2000, dtype=torch.float64), "decoder_input_ids": tokens}
    if name == "gpt-2 in another model":
        given = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64), "decoder_input_ids": tokens}
    model = convert(copy.deepcopy(dense), Verbatim()).eval()
    torch.testing.assert_close(model(**given)[0], dense(**given)[0], rtol=1e-10, atol=1e-10)
    fused = {n: module for n, module in model.named_modules() if isinstance(module, FusedProjections)}
    assert fused
    for place, module in fused.items():
        around = model.get_submodule(place.rpartition(".")[0])
        inputs: list[Tensor] = []
        linear = {name: child for name, child in around.named_children() if isinstance(child, nn.Linear)}
        last = [child for name, child in linear.items() if name != "g_proj"][-1]  # Bailing's gate after attention
        hook = last.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0]))
        for layer in module.children():
            kept = [p.detach().clone() for p in layer.parameters()]
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
            model(**given)
            for parameter, value in zip(layer.parameters(), kept, strict=True):
                parameter.data.copy_(value)
        hook.remove()
        without = dict(zip([part for part, _ in module.named_children()], inputs, strict=True))
        assert {part: not x.any() for part, x in without.items()} == {part: SILENT[part] for part in without}, place
        if "query" in without and not without["query"].equal(without["key"]):  # without either, attention is uniform
            torch.testing.assert_close(without["query"], without["key"])


def test_each_head_of_qwen_has_a_query_and_a_gate(tokens: Tensor) -> None:
    """Without both, attention takes the mean of the values so far, and the gate lets half of it pass."""
    torch.manual_seed(0)
    shape = tf.Qwen3_5TextConfig(**LINEAR | {"num_key_value_heads": 2, "layer_types": ["full_attention"]})
    model = convert(tf.Qwen3_5TextModel(shape).double().eval(), Verbatim()).eval()
    attention = model.layers[0].self_attn
    seen: dict[str, Tensor] = {}
    attention.v_proj.register_forward_hook(lambda _, __, output: seen.update(value=output))
    attention.o_proj.register_forward_pre_hook(lambda _, given: seen.update(output=given[0]))
    model(input_ids=tokens)
    whole = seen["output"]
    nn.init.zeros_(attention.q_proj.gate.weight)
    model(input_ids=tokens)
    assert not torch.allclose(seen["output"], whole)
    nn.init.zeros_(attention.q_proj.query.weight)
    model(input_ids=tokens)
    length = torch.arange(1, tokens.shape[1] + 1).view(-1, 1, 1)
    mean = seen["value"].unflatten(-1, (2, 8)).cumsum(1) / length
    torch.testing.assert_close(seen["output"], mean.repeat_interleave(2, dim=2).flatten(2) / 2)


def test_a_name_that_is_fused_in_one_place_alone() -> None:
    """Moonshine's decoder has a gate in the matrix that its encoder has without one."""
    model = convert(MODELS["moonshine"](), Verbatim())
    assert isinstance(model.encoder.layers[0].mlp.fc1, nn.Linear)
    assert [name for name, _ in model.decoder.layers[0].mlp.fc1.named_children()] == ["up", "gate"]


def test_a_matrix_that_may_be_fused_is_named(small: Callable[..., Any]) -> None:
    model = small("llama")
    for block in model.model.layers:
        block.mlp.qkv_proj = nn.Linear(32, 64)
        block.self_attn.mixed = nn.Linear(32, 96)
        block.gated = nn.ModuleDict({"into": nn.Linear(32, 80), "out": nn.Linear(40, 32)})
    with pytest.warns(
        UserWarning, match=r"self_attn.mixed, .*mlp.qkv_proj, .*gated.into: each seems to hold several projections"
    ):
        convert(model, CoLA(rank=4))


def test_no_pair_of_a_type_and_a_name_is_there_twice() -> None:
    pairs = [(model_type, end) for end, _, types in FUSED for model_type in types.split()]
    assert len(pairs) == len(set(pairs))


def test_a_model_saved_before_the_table_grew_still_loads(tmp_path: Path) -> None:
    """Version 0.2 gave Falcon's fused matrix one bottleneck."""
    torch.manual_seed(0)
    new = convert(MODELS["falcon 7b"](), CoLA(rank=4), targets="dense")
    new.config.lorank["targets"] = None
    del new.config.lorank["names"]
    for block in new.h:
        block.self_attention.query_key_value = LowRankLinear(32, 48, 4)
    new.config.save_pretrained(tmp_path)
    save_file(new.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = tf.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not any(isinstance(module, FusedProjections) for module in loaded.modules())
