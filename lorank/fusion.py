"""Projections that an architecture keeps in one matrix: GPT-2's query, key and value, Phi-3's gate and up.

    fused [sum of sizes, d_in]  ->  one projection [size, d_in] each  ->  outputs joined again

Each of them is a separate site, because one bottleneck for all three would be another method. `FUSED` lists the fused
matrices; their layouts were read in transformers' code. Where a name or a shape says "fused" and the table does not,
`unknown_fusion` finds it, and `lorank.convert` warns.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorank.architectures import as_linear, copied, dense_layer, is_linear, projection_type
from lorank.method import Method

QKV = ("query", "key", "value")
MODULATION = ("attn_shift", "attn_scale", "attn_gate", "mlp_shift", "mlp_scale", "mlp_gate")


class Fusion(NamedTuple):
    """How one matrix [sum of sizes, d_in] consists of the rows of several projections."""

    sizes: dict[str, int]
    """Rows of each projection, by name."""
    heads: int = 1
    """Groups in which the rows alternate: 1 means one projection after another, h means that each head has all of them."""

    def rows(self, fused: Tensor) -> dict[str, Tensor]:
        """Each projection's rows of a tensor with one row for each output: a weight, a bias, outputs [d_out, n]."""
        grouped = fused.unflatten(0, (self.heads, -1)).split([n // self.heads for n in self.sizes.values()], dim=1)
        return dict(zip(self.sizes, (part.flatten(0, 1) for part in grouped), strict=True))

    def split(self, linear: nn.Linear) -> dict[str, nn.Linear]:
        """One dense layer per projection, with that projection's rows of the fused weight and bias."""
        biases = dict.fromkeys(self.sizes) if linear.bias is None else self.rows(linear.bias)
        return {
            name: dense_layer(weight, biases[name], linear.training)
            for name, weight in self.rows(linear.weight).items()
        }


# ---- layouts: from the configuration and the number of rows to the parts


Layout = Callable[[Any, int], Fusion | None]
"""None: with that many rows it is a single projection, or the layout is not known."""


def equal(*parts: str, by_head: bool = False) -> Callable[[Any, int], Fusion]:
    """Parts of the same size, one after another, or all of them within each head."""

    def layout(config: Any, rows: int) -> Fusion:
        return Fusion(dict.fromkeys(parts, rows // len(parts)), config.num_attention_heads if by_head else 1)

    return layout


def grouped_query(config: Any, rows: int) -> Fusion:
    """Fewer keys and values than queries, one after another."""
    queries = getattr(config, "num_attention_heads", None) or config.num_heads
    head = rows // (queries + 2 * config.num_key_value_heads)
    kv = config.num_key_value_heads * head
    return Fusion({"query": queries * head, "key": kv, "value": kv})


def gpt_bigcode(config: Any, rows: int) -> Fusion:
    kv = config.hidden_size // config.num_attention_heads
    parts = Fusion({"query": rows - 2 * kv, "key": kv, "value": kv})
    return parts if config.multi_query else equal(*QKV, by_head=True)(config, rows)


def falcon(config: Any, rows: int) -> Fusion:
    heads, kv = config.num_attention_heads, config.num_kv_heads
    head = config.hidden_size // heads
    if config.new_decoder_architecture:  # each key has its queries before it
        return Fusion({"query": heads * head, "key": kv * head, "value": kv * head}, heads=kv)
    parts = Fusion({"query": heads * head, "key": head, "value": head})
    return parts if config.multi_query else equal(*QKV, by_head=True)(config, rows)


def dbrx(config: Any, rows: int) -> Fusion:
    kv = config.attn_config.kv_n_heads * (config.d_model // config.n_heads)
    return Fusion({"query": rows - 2 * kv, "key": kv, "value": kv})


def query_and_gate(config: Any, rows: int) -> Fusion:
    """A gate for each head's output after its query."""
    query = getattr(config, "qk_head_dim", None) or rows // (2 * config.num_attention_heads)
    query *= config.num_attention_heads
    return Fusion({"query": query, "gate": rows - query}, config.num_attention_heads)


def index_query_key(config: Any, rows: int) -> Fusion:
    query = config.index_n_heads * config.index_head_dim
    return Fusion({"query": query, "key": rows - query})


def moonshine(config: Any, rows: int) -> Fusion | None:
    """The decoder's MLP has a gate; the encoder's of the same name has none."""
    return equal("up", "gate")(config, rows) if rows == 2 * config.intermediate_size else None


def esmfold_attention(config: Any, rows: int) -> Fusion:
    head = config.esmfold_config.trunk.sequence_head_width
    return Fusion(dict.fromkeys(QKV, rows // 3), heads=rows // (3 * head))


def levit(config: Any, rows: int) -> Fusion | None:
    for heads, key, ratio in zip(config.num_attention_heads, config.key_dim, config.attention_ratio, strict=True):
        if rows == heads * key * (2 + ratio):
            return Fusion({"query": heads * key, "key": heads * key, "value": heads * key * ratio}, heads)
    return None


def levit_between_stages(config: Any, rows: int) -> Fusion | None:
    for _, key, heads, ratio, *_ in config.down_ops:
        if rows == heads * key * (1 + ratio):
            return Fusion({"key": heads * key, "value": heads * key * ratio}, heads)
    return None


def focalnet(config: Any, rows: int) -> Fusion | None:
    """Query and context as wide as the stage, and one gate for each level of focus."""
    for stage, levels in enumerate(config.focal_levels):
        width = config.embed_dim * 2**stage
        if rows == 2 * width + levels + 1:
            return Fusion({"query": width, "context": width, "gates": levels + 1})
    return None


def selective(config: Any, rows: int) -> Fusion:
    """Mamba's step size, and what goes into its state and out of it."""
    state = config.mamba_d_state
    return Fusion({"dt": rows - 2 * state, "B": state, "C": state})


def xlstm(config: Any, rows: int) -> Fusion:
    query = config.qk_dim
    return Fusion({"query": query, "key": query, "value": rows // 2 - query, "output": rows // 2 - query})


def codegen(config: Any, rows: int) -> Fusion:
    return Fusion(dict.fromkeys(("query", "value", "key"), rows // 3), heads=4)  # it was trained on four devices


def latent(config: Any, rows: int) -> Fusion:
    return Fusion({"latent": config.kv_lora_rank, "rope": rows - config.kv_lora_rank})


def from_latent(config: Any, rows: int) -> Fusion:
    heads = config.num_attention_heads
    key = heads * config.qk_nope_head_dim
    return Fusion({"key": key, "value": rows - key}, heads)


def gated_delta(config: Any, rows: int) -> Fusion:
    key = config.linear_num_key_heads * config.linear_key_head_dim
    return Fusion({"query": key, "key": key, "value": rows - 2 * key})


def gated_delta_pair(config: Any, rows: int) -> Fusion:
    return Fusion({"b": rows // 2, "a": rows // 2}, heads=config.linear_num_key_heads)


def gated_delta_by_head(config: Any, rows: int) -> Fusion:
    heads = config.linear_num_key_heads
    key = heads * config.linear_key_head_dim
    return Fusion({"query": key, "key": key, "value": rows // 2 - key, "gate": rows // 2 - key}, heads)


# ---- the table


EARLY = {"gpt2", "gpt_neox", "bloom", "mpt", "phi3", "glm", "glm4"}
"""The types that versions 0.1 and 0.2 knew, and only as the outermost model."""
LATENT = (
    "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm5_next_text glm_moe_dsa hy_v4 "
    "kimi_linear longcat_flash minicpm3 mistral4 mistral_large4_text youtu"
)
"""The types with multi-head latent attention."""
FUSED: tuple[tuple[str, Layout, str], ...] = (
    ("attn.c_attn", equal(*QKV), "gpt2 decision_transformer imagegpt openai-gpt"),
    ("attn.c_attn", gpt_bigcode, "gpt_bigcode"),
    ("crossattention.c_attn", equal("key", "value"), "gpt2"),
    ("attention.query_key_value", equal(*QKV, by_head=True), "gpt_neox gpt_neox_japanese"),
    ("self_attention.query_key_value", equal(*QKV, by_head=True), "bloom"),
    ("self_attention.query_key_value", falcon, "falcon"),
    ("self_attn.query_key_value", equal(*QKV, by_head=True), "persimmon fuyu"),
    ("attn.Wqkv", equal(*QKV), "mpt modernbert"),
    ("attn.Wqkv", dbrx, "dbrx"),
    ("self.qkv_linear", equal(*QKV), "layoutlmv2"),
    ("seq_attention.proj", esmfold_attention, "esm"),
    ("sequence_to_pair.proj", equal("query", "key"), "esm"),
    ("attn.qkv_proj", codegen, "codegen"),
    ("attn.att_proj", equal(*QKV), "bark semantic coarse_acoustics fine_acoustics"),
    ("self_attn.qkv_proj", grouped_query, "phi3 phi4_multimodal"),
    ("self_attn.qkv_proj", equal(*QKV, by_head=True), "minimax"),
    ("self_attn.q_proj", query_and_gate, "qwen3_next qwen3_5_text qwen3_5_moe_text qwen4_exp_text"),
    ("self_attn.q_gate_proj", query_and_gate, "axk2"),
    ("indexer.index_qk_proj", index_query_key, "qwen4_exp_text"),
    ("attn.qkv", grouped_query, "exaone4_5_vision"),
    (
        "attn.qkv",
        equal(*QKV),
        "cohere_compass_vision deepseek_ocr2_sam_vision_model dots3_note_vision_encoder ernie4_5_vl_moe_vision "
        "glm4v_moe_vision glm4v_vision glm5_next_vision glm_image_vision glm_ocr_vision got_ocr2_vision hiera "
        "pp_chart2table_vision pp_formulanet_vision qwen2_5_vl_vision qwen2_vl_vision "
        "qwen3_5_moe_vision qwen3_5_vision qwen3_omni_moe_vision_encoder qwen3_vl_moe_vision qwen3_vl_vision qwen4_exp_vision "
        "sam2_hiera_det_model sam_hq_vision_model slanext_vision sam_vision_model unlimited_ocr_sam_vision_model",
    ),
    ("window_attn.qkv", equal(*QKV), "florence_vision"),
    ("channel_attn.qkv", equal(*QKV), "florence_vision"),
    ("attention.qkv", equal(*QKV), "seggpt timesformer vitdet"),
    (
        "self_attn.qkv",
        equal(*QKV),
        "blip_vision_model blip_2_vision_model instructblip_vision_model instructblipvideo_vision_model",
    ),
    ("self_attention.kv_proj", equal("key", "value"), "jetmoe"),
    ("queries_keys_values.linear", levit, "levit"),
    ("keys_values.linear", levit_between_stages, "levit"),
    ("attn.to_kv", equal("key", "value"), "granite_speech_encoder granite_speech_plus_encoder"),
    ("to_kv", equal("key", "value"), "evolla"),
    (
        "mlp.gate_up_proj",
        equal("gate", "up"),
        "phi3 phi4_multimodal glm glm4 glm4v_text glm_image_text glm_ocr_text dia_encoder dia_decoder",
    ),
    ("mlp.gate_up_proj", equal("gate", "up"), "dots3_note_audio_encoder"),
    ("mlp.fc1", equal("gate", "up"), "moshi moshi_depth kyutai_speech_to_text"),
    ("mlp.fc1", moonshine, "moonshine moonshine_streaming"),
    ("fc1.proj", equal("up", "gate"), "clvp_encoder"),
    ("ffn.proj_up_gate_z", equal("gate", "up"), "xlstm"),
    ("lconv1d.linear_start", equal("up", "gate"), "gemma3n_audio"),
    ("lconv1d.linear_start.linear", equal("up", "gate"), "gemma4_audio"),
    ("conv.pointwise_lin1", equal("up", "gate"), "granite_speech5_encoder"),
    ("feed_forward_in.gate_up_proj", equal("up", "gate"), "phi4_multimodal_audio"),
    ("feed_forward_out.gate_up_proj", equal("up", "gate"), "phi4_multimodal_audio"),
    ("shared_experts.gate_up_proj", equal("gate", "up"), "minimax_m3_vl_text"),
    ("shared_mlp.input_linear", equal("gate", "up"), "granitemoehybrid granitemoeshared granitemoe_swa"),
    ("mlp.Wi", equal("gate", "up"), "modernbert modernbert-decoder"),
    ("conv.in_proj", equal("B", "C", "x"), "lfm2 lfm2_moe lfm3 lfm3_vl_vision"),
    ("linear_attn.in_proj_qkv", gated_delta, "qwen3_5_text qwen3_5_moe_text qwen4_exp_text"),
    ("linear_attn.in_proj_qkvz", gated_delta_by_head, "qwen3_next"),
    ("linear_attn.in_proj_ba", gated_delta_pair, "qwen3_next"),
    ("mamba.in_proj", equal("x", "gate"), "jamba"),
    ("mamba.x_proj", selective, "jamba"),
    ("mlstm_layer.qkv_opreact", xlstm, "xlstm"),
    ("mlstm_layer.ifgate_preact", equal("input", "forget"), "xlstm"),
    ("modulation.projection_in", focalnet, "focalnet"),
    ("attention.gru_rel_pos_linear", equal("gate_a", "gate_b"), "wavlm"),
    ("gateway.gate", equal("gate1", "gate2"), "d_fine deimv2"),
    ("linear", equal("shift", "scale", "gate"), "vibevoice"),
    ("adaln_proj", equal("shift", "scale", "gate"), "pocket_tts gradium_phonon_tts"),
    ("attn_norm.linear", equal(*MODULATION), "qwen2_5_omni_dit"),
    ("adaln_linear", equal(*MODULATION), "esmfold2"),
    ("gate_up_proj", equal("gate", "up"), "esmfold2"),
    ("proj_bundle", equal("left", "right", "left_gate", "right_gate"), "esmfold2"),
    ("outer_product_mean.input_proj", equal("left", "right"), "esmfold2"),
    ("kv_a_proj_with_mqa", latent, LATENT),
    ("kv_b_proj", from_latent, LATENT),
)
"""End of a module's name, its parts, and the types of the pretrained model around it (the innermost one)."""
_LAYOUTS = {(model_type, end): layout for end, layout, types in FUSED for model_type in types.split()}
_LAST = {end.rpartition(".")[2] for _, end in _LAYOUTS}
SAYS_FUSED = re.compile(
    r"(?:qkv|query_key_value|queries_keys|keys_values|to_kv|kv_b_proj|kv_a_proj_with_mqa|gate_up|gate_and_up|c_attn|att_proj)[^.]*(?:\.linear)?$"
    r"|(?:mamba|mixer|attn|conv)\.in_proj$|(?:mamba|mixer)\.x_proj$|adaln_[^.]*$"
)
"""Names of matrices that usually hold several projections."""


def fusion_of(model: nn.Module, name: str) -> Fusion | None:
    """How the projections of a module of that name are fused; None if it is a single projection."""
    if name.rpartition(".")[2] not in _LAST:
        return None
    module = model.get_submodule(name)
    if isinstance(module, FusedProjections):
        return module.fusion
    if not isinstance(getattr(module, "weight", None), Tensor):
        return None
    config, inner = _nearest_config(model, name)
    # a converted model's own type is "lorank_" + the architecture's
    model_type = getattr(config, "model_type", "").removeprefix("lorank_")
    if getattr(model, "early_fusions", False) and (
        model_type not in EARLY or config is not getattr(model, "config", None)
    ):
        return None
    for (known, end), layout in _LAYOUTS.items():
        if known == model_type and f".{name}".endswith(f".{end}"):
            return layout(_config_of_block(config, inner), as_linear(module).out_features)
    return None


def _nearest_config(model: nn.Module, name: str) -> tuple[Any, str]:
    """The configuration of the innermost pretrained model around a module, and the module's name in that model."""
    outer = name
    while outer:
        outer = outer.rpartition(".")[0]
        around = model.get_submodule(outer)
        if isinstance(around, PreTrainedModel):
            return around.config, name.removeprefix(f"{outer}.")
    return None, name


def _config_of_block(config: Any, name: str) -> Any:
    """The configuration of the block that a module is in, where blocks have different ones (dots3_note)."""
    depth = re.search(r"\.(\d+)\.", name)
    return config.per_layer_config[int(depth[1])] if depth and getattr(config, "is_heterogeneous", False) else config


def unknown_fusion(model: nn.Module, name: str) -> bool:
    """Whether a projection looks as if it held several: by its name, by an attention's shape [3 d, d], or because the layers after it
    take half of what it gives, which no other layer gives them (a gate and what it multiplies)."""
    linear = as_linear(model.get_submodule(name))
    attention = re.search(r"att(?:n|ention)", name) is not None and projection_type(name) is None
    thrice = attention and linear.out_features == 3 * linear.in_features
    return thrice or SAYS_FUSED.search(name) is not None or _gives_twice(model, name, linear.out_features)


def _gives_twice(model: nn.Module, name: str, rows: int) -> bool:
    parent, _, own = name.rpartition(".")
    siblings = {n: as_linear(m) for n, m in model.get_submodule(parent).named_children() if is_linear(m)}
    after = list(siblings)[list(siblings).index(own) + 1 :]
    others = [linear for n, linear in siblings.items() if n != own]
    explained = any(2 * other.out_features == rows or other.in_features == rows for other in others)
    return not explained and any(2 * siblings[n].in_features == rows for n in after)


class FusedProjections(nn.Module):
    """Several projections with one joint output [..., sum of sizes], which the architecture's code splits again."""

    def __init__(self, parts: Mapping[str, nn.Module], fusion: Fusion):
        super().__init__()
        self.fusion, self.heads = fusion, fusion.heads
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x).unflatten(-1, (self.heads, -1)) for part in self.children()]
        return torch.cat(outputs, dim=-1).flatten(-2)

    def standalone(self) -> tuple[str, dict[str, Any]]:
        return "Joined", {"heads": self.heads, "parts": dict(self.named_children())}


def joined(method: Method, fused: FusedProjections) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the one matrix that several projections are in the dense model."""
    parts = [(p.weight, p.bias) if isinstance(p, nn.Linear) else method.merged(p) for p in fused.children()]
    biases = [bias for _, bias in parts if bias is not None]
    weight = join_rows([weight for weight, _ in parts], fused.heads)
    return weight, join_rows(biases, fused.heads) if biases else None


def join_rows(rows: Sequence[Tensor], heads: int) -> Tensor:
    """The rows of several projections as those of their one matrix."""
    return torch.cat([part.unflatten(0, (heads, -1)) for part in rows], dim=1).flatten(0, 1)


def with_fused(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The replacements, with those of a fused matrix gathered in one module; projections without replacement stay dense."""
    gathered = set()
    for name, module in replacements.items():
        fused_name = name.rpartition(".")[0]
        fusion = fusion_of(model, fused_name)
        if fusion is None:
            yield name, module
        elif fused_name not in gathered:
            gathered.add(fused_name)
            dense = fusion.split(as_linear(model.get_submodule(fused_name)))
            names = {part: f"{fused_name}.{part}" for part in dense}
            parts = {
                part: replacements[names[part]] if names[part] in replacements else copied(linear)
                for part, linear in dense.items()
            }
            yield fused_name, FusedProjections(parts, fusion)
