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
    "gpt-2 in another model": lambda: in_a_decoder(),
}  # fmt: skip
SILENT = {"query": False, "key": False, "value": True, "gate": True, "up": True, "latent": True, "rope": False}
"""Whether the input of a layer's last projection is zero without the part: silu(0) and gelu(0) are 0."""


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_what_they_are_called(name: str, tokens: Tensor) -> None:
    torch.manual_seed(0)
    dense = MODELS[name]().double().eval()
    given = {"input_ids": tokens}
    if name == "gpt-2 in another model":
        given = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64), "decoder_input_ids": tokens}
    model = convert(copy.deepcopy(dense), Verbatim()).eval()
    torch.testing.assert_close(model(**given)[0], dense(**given)[0], rtol=1e-10, atol=1e-10)
    fused = {n: module for n, module in model.named_modules() if isinstance(module, FusedProjections)}
    assert fused
    for place, module in fused.items():
        around = model.get_submodule(place.rpartition(".")[0])
        inputs: list[Tensor] = []
        last = [child for child in around.children() if isinstance(child, nn.Linear)][-1]
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


def test_a_matrix_that_may_be_fused_is_named(small: Callable[..., Any]) -> None:
    model = small("llama")
    for block in model.model.layers:
        block.mlp.qkv_proj = nn.Linear(32, 64)
        block.self_attn.mixed = nn.Linear(32, 96)
    with pytest.warns(UserWarning, match=r"self_attn.mixed, .*mlp.qkv_proj: each seems to hold several projections"):
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
