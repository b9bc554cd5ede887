"""Weights whose short rows are stored as long columns: the same model, in memory and in files."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorank
from lorank.layers import LowRankLinear


def test_only_short_rows_are_stored_by_columns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64}
    dense = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, tie_word_embeddings=True))
    model: Any = lorank.convert(dense, lorank.CoLA(rank=8)).eval()
    ids = torch.arange(6)[None]
    expected, before = model(ids).logits, {name: value.clone() for name, value in model.state_dict().items()}

    assert lorank.fast_decoding(model) is model
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert all(layer.B.weight.stride() == (1, layer.B.out_features) for layer in layers)
    assert all(layer.A.weight.is_contiguous() for layer in layers), "A has d_in numbers in a row"
    assert model.lm_head.weight.is_contiguous(), "its rows are looked up as embeddings"
    torch.testing.assert_close(model(ids).logits, expected)

    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        load_file(tmp_path / "model.safetensors"),
        {k: before[k] for k in load_file(tmp_path / "model.safetensors")},
        rtol=0,
        atol=0,
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, expected)
