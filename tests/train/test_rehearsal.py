"""No run is lost for what its training does not need: that is refused before the first step, or does no harm."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorank.plan.dry_run import plan
from lorank.train import run
from lorank.train.data import load_tokenizer
from lorank.train.folder import history
from lorank.train.run import pretrain, sample_of
from lorank.train.saved import rehearse_saving

LEFTOVERS = {
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "is_encoder_decoder": True,
    "temperature": 0.1,
}
"""What other programs left in a config.json."""


def small() -> LlamaForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape))


def test_leftovers_and_names_in_latin_1_do_no_harm(recipe: Any, text: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads(text.with_name("config.json").read_text()), **LEFTOVERS})
    )
    data = tmp_path / os.fsdecode(b"caf\xe9.txt")
    data.write_bytes(text.read_bytes())
    given = recipe(data=str(data), model=str(tmp_path / "config.json"), eval_every=0, save_every=0, steps=3)
    summary = pretrain(given, tmp_path / "run", on_cpu=True)
    assert summary is not None and summary.sample
    assert r"caf\udce9.txt" in (tmp_path / "run/README.md").read_text(encoding="utf-8")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert not any(getattr(saved, name) for name in LEFTOVERS if name not in ("return_dict", "temperature"))


def test_a_folder_that_is_not_utf_8_is_refused(recipe: Any, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(ValueError, match=r"--out must be a name that is UTF-8 in this locale .*caf\\udce9"):
        pretrain(recipe(), out)
    assert not out.exists()


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model, tokenizer = small(), load_tokenizer("bytes")
    rehearse_saving(model, tokenizer, tmp_path)
    model.config._output_attentions = True
    with pytest.raises(ValueError, match="the model's configuration cannot be saved in .*`output_attentions`"):
        rehearse_saving(model, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_sample_that_fails_costs_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise KeyError("past_key_values")

    monkeypatch.setattr(run, "generate_text", fails)
    with caplog.at_level(logging.WARNING):
        assert sample_of(small(), load_tokenizer("bytes"), 0) == ""
    assert "the run has no sample of its text: it has no 'past_key_values'" in caplog.text


def test_a_model_that_cannot_be_counted_is_trained(recipe: Any, tmp_path: Path, caplog: Any) -> None:
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_local_experts": 2,
        "kv_channels": 4,
    }
    given = recipe(model="jetmoe", method="dense", shape={**shape, "num_key_value_heads": 2}, steps=3, eval_every=0)
    summary = pretrain(given, tmp_path / "run", on_cpu=True)
    assert summary is not None and summary.flops_per_token is summary.mfu is None and summary.tokens_per_second > 0
    assert "this run logs no FLOPs: the model cannot be counted without its data" in caplog.text
    assert not any("mfu" in record for record in history(tmp_path / "run"))
    assert "| training FLOPs per token | unknown |" in (tmp_path / "run/README.md").read_text()
    with pytest.raises(ValueError, match=r"the model cannot be counted .* \(with shape.hidden_size=16, .*\)"):
        plan(given)
