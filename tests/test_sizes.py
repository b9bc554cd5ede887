"""Shapes by name, and the parameters they come to."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorank
from lorank.architectures import llama_config
from lorank.sizes import SIZES, find_size

# d, d_ff, layers, heads, r, and the totals of the dense and of the CoLA model (arXiv 2502.10940; the totals re-derived)
PUBLISHED = {
    "60m": (512, 1376, 8, 8, 128, 58_073_600, 42_770_944),
    "130m": (768, 2048, 12, 12, 256, 134_105_856, 93_997_824),
    "350m": (1024, 2736, 24, 16, 256, 367_969_280, 185_222_144),
    "1b": (2048, 5461, 24, 32, 512, 1_339_082_752, 609_310_720),
    "7b": (4096, 11008, 32, 32, 1024, 6_738_415_616, 2_820_935_680),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_the_published_ones(name: str) -> None:
    assert tuple(SIZES[name]) == PUBLISHED[name][:5]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ten_parameter_totals(name: str) -> None:
    """Check 1: counted on real models, dense and converted, without memory for their weights."""
    *_, dense, cola = PUBLISHED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config(name))
    assert sum(p.numel() for p in model.parameters()) == dense
    lorank.convert(model, lorank.CoLA(rank=SIZES[name].rank))
    assert sum(p.numel() for p in model.parameters()) == cola


def test_reloras_own_size_has_its_parameters() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config("250m"))
    assert tuple(SIZES["250m"])[:4] == (768, 2560, 24, 16)
    assert sum(p.numel() for p in model.parameters()) == 247_370_496


def test_cola_60m_holds_9_994_240_numbers_in_its_factors() -> None:
    with torch.device("meta"):
        model = lorank.convert(AutoModelForCausalLM.from_config(llama_config("60m")), lorank.CoLA(rank=128))
    factors = [p for name, p in model.named_parameters() if name.endswith((".A.weight", ".B.weight"))]
    assert sum(p.numel() for p in factors) == 9_994_240


def test_settings_of_the_papers() -> None:
    config = llama_config("60m")
    assert (config.vocab_size, config.rms_norm_eps, config.hidden_act) == (32_000, 1e-6, "silu")
    assert (config.initializer_range, config.pad_token_id, config.tie_word_embeddings) == (0.02, None, False)
    assert config.rope_parameters["rope_theta"] == 10_000
    assert config.num_key_value_heads == config.num_attention_heads and not config.attention_bias
    assert llama_config("60m", sequence_length=4096).max_position_embeddings == 4096


def test_an_unknown_size_names_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match="did you mean '350m'.* 7b"):
        find_size("350mm")
