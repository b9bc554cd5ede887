"""Code that lies beside a model is never run, and nobody is asked whether it may."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations import hub_kernels

import lorank
from lorank.kernels import check_kernels, implementations
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
    monkeypatch.setattr(hub_kernels, "get_kernel", ask)


SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def saved(folder: Path, change: Callable[[PreTrainedModel], Any] = lambda model: None) -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, **SHAPE, bos_token_id=256, eos_token_id=256))
    change(model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_a_model_type_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": AUTO_MAP}))
    (tmp_path / "mine.py").write_text(CODE)
    for act in (lambda: build_config(Recipe(model=str(tmp_path))), lambda: load_model(str(tmp_path))):
        with pytest.raises(ValueError, match="needs code from its folder .* which lorank never runs"):
            act()


def test_of_a_known_type_only_the_weights_are_read(tmp_path: Path) -> None:
    model = saved(tmp_path)
    edit(tmp_path / "config.json", auto_map=AUTO_MAP)
    edit(tmp_path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (tmp_path / "custom_generate").mkdir()
    for name in ("mine.py", "custom_generate/generate.py"):
        (tmp_path / name).write_text(CODE)
    loaded, tokenizer = load_model(str(tmp_path))
    assert type(loaded) is LlamaForCausalLM and torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert generate_text(loaded, tokenizer, "abc", max_new_tokens=1, seed=0).startswith("abc")
    recipe = Recipe(model=str(tmp_path), method="dense", sequence_length=8)
    assert not hasattr(build_model(recipe, build_config(recipe, tokenizer)).config, "auto_map")


EVIL = "evil/kernel"


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"attn_implementation": EVIL}, "attn_implementation"),
        ({"_attn_implementation": EVIL}, "_attn_implementation"),
        ({"_attn_implementation_internal": EVIL}, "_attn_implementation_internal"),
        ({"attn_implementation": f"flash|{EVIL}@main:run"}, "attn_implementation"),
        ({"attn_implementation": f"paged|{EVIL}"}, "attn_implementation"),
        ({"attn_implementation": {"": "sdpa", "text_config": EVIL}}, "attn_implementation"),
        ({"text_config": {"attn_implementation": EVIL}}, "text_config.attn_implementation"),
        ({"per_layer_config": [{"attn_implementation": EVIL}]}, "per_layer_config.0.attn_implementation"),
        ({"attn_implementation": "flash_attention_9"}, "attn_implementation"),
        ({"attn_implementation": 3}, "attn_implementation"),
        ({"experts_implementation": EVIL}, "experts_implementation"),
        ({"_experts_implementation": {"": "sonicmoe"}}, "_experts_implementation"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value)[:40],
)
def test_kernels_that_a_file_names_are_refused(entries: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} in mine must be one of eager, .* lorank downloads no code$"):
        check_kernels({"model_type": "llama", **entries}, "mine")


def test_installed_implementations_may_be_named() -> None:
    names = ["eager", "sdpa", "flex_attention", None]
    check_kernels({"attn_implementation": dict(enumerate(names)), "experts_implementation": "grouped_mm"}, "mine")
    flash = torch.cuda.is_available()  # without a GPU its package does not count as installed
    if not flash:
        with pytest.raises(ValueError, match="got 'flash_attention_2', which is not in the installed packages"):
            check_kernels({"attn_implementation": "flash_attention_2"}, "mine")


@pytest.mark.parametrize("converted", [False, True])
def test_every_door_refuses_kernels(tmp_path: Path, converted: bool) -> None:
    saved(tmp_path, (lambda model: lorank.convert(model, lorank.CoLA(rank=4))) if converted else lambda model: None)
    edit(tmp_path / "config.json", attn_implementation=EVIL)
    here = str(tmp_path)
    refused = f"attn_implementation in the configuration of {here} must be one of .*, got {EVIL!r}"
    for act in (lambda: build_config(Recipe(model=here)), lambda: load_model(here)):
        with pytest.raises(ValueError, match=refused):
            act()
    if converted:  # transformers asks the generated class
        for auto in (AutoConfig, AutoModelForCausalLM):
            with pytest.raises(ValueError, match=f"attn_implementation in this config.json .* got {EVIL!r}"):
                auto.from_pretrained(tmp_path)


def test_a_recipe_names_no_kernels() -> None:
    with pytest.raises(ValueError, match=f"^attention must be one of eager, .*, got {EVIL!r}$"):
        build_config(Recipe(attention=EVIL))
    with pytest.raises(ValueError, match="^_attn_implementation in shape must be one of eager"):
        build_config(Recipe(shape={"_attn_implementation": EVIL}))


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("how", ["one file", "an index", "a named file", "an index of safetensors"])
def test_weights_that_may_hold_code_are_refused(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = saved(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    file = {"a named file": "adapter_model.bin", "one file": "pytorch_model.bin"}.get(how, "pytorch_model-1.bin")
    torch.save({**model.state_dict(), "x": Bomb()}, tmp_path / "m" / file)
    if "index" in how:
        index = "model.safetensors" if "safetensors" in how else "pytorch_model.bin"
        weights = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), file)})
        (tmp_path / f"m/{index}.index.json").write_text(weights)
    if how == "a named file":
        edit(tmp_path / "m/config.json", transformers_weights=file)
    with pytest.raises(ValueError, match=f"^the weights of m?.* must be safetensors, got {file}, which may hold code;"):
        load_model("m" if how == "one file" else str(tmp_path / "m"))
    assert not (tmp_path / "ran").exists()


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
    with pytest.raises(ValueError, match="must have all weights of its model, got an adapter"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("converted", [False, True])
def test_code_of_another_machine_is_forgotten(tmp_path: Path, converted: bool) -> None:
    missing = {"flash_attention_2", "flash_attention_3"} - {*implementations("attn_implementation")}
    saved(tmp_path, (lambda model: lorank.convert(model, lorank.CoLA(rank=4))) if converted else lambda model: None)
    edit(tmp_path / "config.json", _attn_implementation=min(missing, default=None), _experts_implementation="sonicmoe")
    model, tokenizer = load_model(str(tmp_path))
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert generate_text(model, tokenizer, "abc", max_new_tokens=1, seed=0).startswith("abc")
    if not converted:
        assert build_config(Recipe(model=str(tmp_path)))._attn_implementation is None
    if converted:
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
