"""Code that lies beside a model is never run, and nobody is asked whether it may."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorank.train.data import byte_tokenizer
from lorank.train.generation import generate_text
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe
from lorank.train.saved import load_model

CODE = "raise SystemExit('this code ran')\n"
AUTO_MAP = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}


@pytest.fixture(autouse=True)
def _no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: Any) -> str:
        raise SystemExit(f"asked {args}")

    monkeypatch.setattr(builtins, "input", ask)


def test_a_model_type_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": AUTO_MAP}))
    (tmp_path / "mine.py").write_text(CODE)
    for act in (lambda: build_config(Recipe(model=str(tmp_path))), lambda: load_model(str(tmp_path))):
        with pytest.raises(ValueError, match="names code of its own .* which lorank never runs"):
            act()


def test_of_a_known_type_only_the_weights_are_read(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, **shape, bos_token_id=256, eos_token_id=256))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for name, entry in (("config.json", AUTO_MAP), ("tokenizer_config.json", {"AutoTokenizer": ["mine.Mine", None]})):
        file = tmp_path / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": entry}))
    (tmp_path / "custom_generate").mkdir()
    for name in ("mine.py", "custom_generate/generate.py"):
        (tmp_path / name).write_text(CODE)
    loaded, tokenizer = load_model(str(tmp_path))
    assert type(loaded) is LlamaForCausalLM and torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert generate_text(loaded, tokenizer, "abc", max_new_tokens=1, seed=0).startswith("abc")
    recipe = Recipe(model=str(tmp_path), method="dense", sequence_length=8)
    assert not hasattr(build_model(recipe, build_config(recipe, tokenizer)).config, "auto_map")
