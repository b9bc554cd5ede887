"""Singular values of what was learned: every method's projections are found, and rank is counted as it should be."""

from pathlib import Path

import pytest
import torch

import lorank
from lorank.comparison.spectra import POINTS, effective_rank, learned_spectra, projections
from lorank.table import method_names
from tests.conftest import LLAMA_BLOCK


def test_the_rank_that_holds_95_percent_of_the_energy() -> None:
    assert effective_rank(torch.tensor([1.0, 1.0, 1.0, 1.0])) == 1.0
    assert effective_rank(torch.tensor([10.0, 1.0, 1.0, 1.0])) == 0.25  # 100 of 103
    assert effective_rank(torch.tensor([3.0, 1.0, 0.1, 0.0])) == 0.5  # 9 of 10.01 are 90 %
    assert effective_rank(torch.zeros(4)) == 0.0


@pytest.mark.parametrize("method", method_names("method"))
def test_the_projections_of_every_method_are_found(method: str, small) -> None:
    model = small("llama")
    if method != "dense":
        lorank.convert(model, method)
    found = list(projections(model))
    expected = [(name.rpartition(".")[2], (d_out, d_in)) for name, (d_in, d_out) in LLAMA_BLOCK.items()] * 2
    assert sorted((name, tuple(weight.shape)) for name, weight in found) == sorted(expected)


def test_a_saved_model_shows_its_rank(small, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = lorank.convert(small("llama"), lorank.CoLA(rank=4))
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(tmp_path)
    found = learned_spectra(tmp_path)
    assert set(found) == {name.rpartition(".")[2] for name in LLAMA_BLOCK}
    for name, one in found.items():
        width = min(LLAMA_BLOCK[next(key for key in LLAMA_BLOCK if key.endswith(name))])
        assert 0 < one["effective_rank"] <= 4 / width and len(one["spectrum"]) == POINTS
        assert one["spectrum"][0] == pytest.approx(1) and one["spectrum"][-1] == pytest.approx(0, abs=1e-5)
    (tmp_path / "model.safetensors").unlink()
    assert learned_spectra(tmp_path) == found  # kept next to the model
