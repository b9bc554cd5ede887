"""What `convert` refuses after a trial on shapes, and what it then keeps: the model, and the weights that it saves."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BartConfig,
    BartForConditionalGeneration,
    FunnelConfig,
    FunnelModel,
    LlamaConfig,
    OPTConfig,
    OPTForCausalLM,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    RwkvConfig,
    RwkvForCausalLM,
)

from lorank import MASA, SST, CoLA, CRNet, Method, Site, SLTrain, SwitchLoRA, convert
from lorank.methods.crnet import next_output, previous_output
from lorank.trial import _working_inputs


def rwkv() -> nn.Module:
    return RwkvForCausalLM(
        RwkvConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64)
    )


def funnel() -> nn.Module:
    return FunnelModel(FunnelConfig(vocab_size=50, d_model=32, n_head=2, d_head=16, d_inner=64, block_sizes=[2, 2]))


def prophetnet() -> nn.Module:
    sides = {f"num_{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    return ProphetNetForConditionalGeneration(ProphetNetConfig(vocab_size=50, **widths, **sides))


def opt(layerdrop: float) -> nn.Module:
    shape = {"vocab_size": 50, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=32, layerdrop=layerdrop))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Method, str]] = {
    "weights read elsewhere": (rwkv, CoLA(rank=4), "fails in evaluation .*has no attribute 'weight'"),
    "fewer tokens": (funnel, CRNet(rank=4), "crnet does not suit 'funnel': the converted model fails"),
    "more tokens": (prophetnet, CRNet(rank=4), "crnet does not suit 'prophetnet': the converted model fails"),
    "skipped blocks": (lambda: opt(0.1), CRNet(rank=4), "crnet needs every block .* layerdrop is 0.1"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "method", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_fail_later_is_refused_and_unchanged(
    build: Callable[[], nn.Module], method: Method, message: str
) -> None:
    model = build()
    before, random = dict(model.named_modules()), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        convert(model, method)
    assert dict(model.named_modules()) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_code_that_looks_at_values_is_tried_too() -> None:
    """BART asks whether a mask is full."""
    shape = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    with torch.device("meta"):
        twin = BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=16, **shape))
    for training in (False, True):
        found = _working_inputs(twin, training)
        assert found is not None and torch.Size([1, 8, 50]) in found[0]


def test_blocks_are_chained_where_none_is_skipped(tokens: Tensor) -> None:
    model = convert(opt(0.0), CRNet(rank=4)).train()
    assert model(input_ids=tokens % 50).logits.isfinite().all()


def test_what_has_passed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """But another configuration is, even of equal shapes."""
    convert(opt(0.0), CRNet(rank=3))
    with pytest.raises(ValueError, match="layerdrop is 0.1"):
        convert(opt(0.1), CRNet(rank=3))
    monkeypatch.setattr("lorank.trial._twin", lambda model: pytest.fail("tried again"))
    convert(opt(0.0), CRNet(rank=3))


def test_a_shared_weight_is_refused(small: Callable[..., Any]) -> None:
    model = small("llama")
    first, second = model.model.layers[:2]
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(
        ValueError, match=r"model.layers.\*.mlp.up_proj cannot be replaced, because it shares its weight"
    ):
        convert(model, CoLA(rank=4))
    convert(model, CoLA(rank=4), exclude="up_proj")
    model = small("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match=r"q_proj cannot be replaced, because it shares its weight"):
        convert(model, CoLA(rank=4))
    assert second.mlp.up_proj.weight is first.mlp.up_proj.weight


def test_a_name_that_transformers_would_change_is_refused(small: Callable[..., Any]) -> None:
    class Named(nn.Linear):
        def __init__(self, linear: nn.Linear):
            super().__init__(linear.in_features, linear.out_features, device=linear.weight.device)
            self.LayerNorm = nn.ParameterDict({"gamma": nn.Parameter(torch.ones(1, device=linear.weight.device))})

    @dataclass(frozen=True, kw_only=True)
    class Renamed(Method):
        name: ClassVar[str] = "renamed"

        def build(self, site: Site) -> nn.Module:
            return Named(site.linear)

    with pytest.raises(ValueError, match=r"would load the weight .*LayerNorm.gamma as .*LayerNorm.weight"):
        convert(small("llama"), Renamed())


def test_a_layer_that_does_not_start_as_the_dense_one_is_refused(small: Callable[..., Any]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Method):
        name: ClassVar[str] = "wrong"
        keeps_outputs: ClassVar[bool] = True

        def build(self, site: Site) -> nn.Module:
            return nn.Linear(site.d_in, site.d_out, device=site.linear.weight.device, dtype=site.linear.weight.dtype)

    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(
            ValueError, match="wrong must start as the dense model, but its layer for model.layers.0.* exclude it"
        ):
            convert(small("llama").to(dtype), Wrong())


def test_what_rounding_takes_from_the_start_is_told(small: Callable[..., Any]) -> None:
    """W - (α/r) B A in 16 bits keeps little of a W that is much smaller."""
    with pytest.raises(ValueError, match=r"in torch.bfloat16; 16 bits round away .* in float32 or lower alpha$"):
        convert(small("llama").bfloat16(), SwitchLoRA(rank=8, alpha=32.0))
    convert(small("llama"), SwitchLoRA(rank=8, alpha=32.0))
    convert(small("llama").bfloat16(), SwitchLoRA(rank=8, alpha=1.0))


def test_a_quantised_configuration_is_refused(small: Callable[..., Any]) -> None:
    model = small("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=r"got quantization_config \(gptq\); remove this entry"):
        convert(model, CoLA(rank=4))


@pytest.mark.parametrize("kind", ["vit", "beit", "dinov2", "ijepa"])
@pytest.mark.parametrize("method", [MASA(), SLTrain(rank=4), SST(rank=4)], ids=lambda method: method.name)
def test_names_that_vision_models_change_come_back(method: Method, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = convert(AutoModel.from_config(AutoConfig.for_model(kind, **shape, image_size=16, patch_size=8)), method)
    model.eval()
    picture = torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded.eval()(picture).last_hidden_state, model(picture).last_hidden_state)


@pytest.mark.parametrize("method", [SLTrain(rank=4), SST(rank=4)], ids=lambda method: method.name)
def test_a_model_of_text_and_pictures_is_loaded_as_saved(method: Method, tmp_path: Path) -> None:
    """Molmo2, whose parts transformers names anew when it saves them."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 64}
    usual = AutoConfig.for_model("molmo2")
    config = type(usual)(
        text_config={**sizes, "num_key_value_heads": 2, "vocab_size": 64, "num_hidden_layers": 2},
        vision_config={**sizes, "num_key_value_heads": 4},
        adapter_config={**sizes, "num_key_value_heads": 4, "text_hidden_size": 32},
    )
    torch.manual_seed(0)
    model = convert(AutoModelForImageTextToText.from_config(config), method).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize(
    "method", [MASA(), SLTrain(rank=4), CRNet(rank=4), SST(rank=4)], ids=lambda method: method.name
)
def test_blocks_offloaded_to_disk_compute_the_same(method: Method, tokens: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    model = convert(AutoModelForCausalLM.from_config(shape), method).eval()
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= dict.fromkeys(["model.layers", "model.lorank_atoms"], "disk")
    if method.name != "masa":
        del places["model.lorank_atoms"]
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()
    assert next(loaded.model.layers.parameters()).is_meta
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_outputs_follow_the_layer_to_its_device() -> None:
    """The meta device stands for a second one: an operation on tensors of two devices fails there as on two GPUs."""
    y, change, b = torch.ones(2, 3), torch.ones(2, 3, device="meta"), torch.ones(1, device="meta")
    assert previous_output(y, change, b).is_meta
    assert next_output(y, change, b).is_meta
    assert math.isclose(next_output(y, y, torch.ones(1))[0, 0].item(), 2)
