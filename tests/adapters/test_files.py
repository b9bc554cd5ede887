"""Adapters without their model: saved alone, on the right weights only, and as a LoRA of peft."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorank
from lorank.testing.structure import TOKENS


def trained(dense: Any, method: Any) -> Any:
    """With factors as after some steps."""
    model = lorank.convert(dense, method).eval()
    torch.manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", ["lora", "smora", "moram", "codyra", "comp-lora"])
def test_an_adapter_is_saved_without_its_model(name: str, small: Any, tmp_path: Path) -> None:
    base = small("gpt2")
    model = trained(copy.deepcopy(base), name)
    if name == "moram":
        lorank.next_task(model)
    lorank.save_adapter(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]
    stored = load_file(tmp_path / "adapter.safetensors")
    assert not any("wte" in key or ".W." in key or "ln_" in key for key in stored)
    loaded = lorank.load_adapter(tmp_path, base)
    assert loaded is base and torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_other_weights_are_refused_and_stay_as_they_are(small: Any, tmp_path: Path) -> None:
    lorank.save_adapter(trained(small("llama"), "lora"), tmp_path)
    other = small("llama")
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    before = copy.deepcopy(other)
    with pytest.raises(
        ValueError, match=r"^base must have the weights that .* was trained on \(SHA-256 \w{12}\.\.\.\), got others"
    ):
        lorank.load_adapter(tmp_path, other)
    assert type(other) is type(before) and not hasattr(other.config, "lorank")
    assert [*map(type, other.modules())] == [*map(type, before.modules())]
    assert all(p.requires_grad for p in other.parameters())
    assert torch.equal(other(TOKENS).logits, before(TOKENS).logits)
    lorank.convert(other, "lora")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arguments": {"rank": 2}}, "adapter.safetensors must fit adapter.json, but .* must have the shape"),
        ({"arguments": None}, "adapter.json must be as lorank.save_adapter wrote it, but its settings cannot be used"),
        (
            {"trained_too": ["model.head"]},
            "adapter.json must name parameters of the model as trained, got 'model.head'",
        ),
        ({"base": {"sha256": "0", "architecture": 3}}, "folder must be one that lorank.save_adapter wrote"),
        ({"convolutions": {"names": ["x"], "kind": 1}}, "its settings cannot be used"),
    ],
)
def test_a_damaged_file_changes_no_model(change: Any, words: str, small: Any, tmp_path: Path) -> None:
    base = small("llama", num_hidden_layers=1)
    lorank.save_adapter(lorank.convert(copy.deepcopy(base), lorank.LoRA(rank=4)), tmp_path)
    file = tmp_path / "adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        lorank.load_adapter(tmp_path, base)
    assert "Lorank" not in type(base).__name__ and type(base.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert all(p.requires_grad for p in base.parameters())


def test_half_precision_weights_are_the_same_weights(small: Any, tmp_path: Path) -> None:
    base = small("llama").bfloat16()
    lorank.save_adapter(trained(copy.deepcopy(base), "lora"), tmp_path)
    lorank.load_adapter(tmp_path, base.float())


def test_a_head_that_was_trained_goes_with_it(small: Any, tmp_path: Path) -> None:
    base = small("llama")
    model = lorank.convert(copy.deepcopy(base), "lora").eval()
    model.lm_head.weight.requires_grad_()
    model.lm_head.weight.data.mul_(2)
    lorank.save_adapter(model, tmp_path)
    loaded = lorank.load_adapter(tmp_path, base)
    assert loaded.lm_head.weight.requires_grad and torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "codyra"])
def test_peft_gets_factors_of_the_merged_update(name: str, architecture: str, small: Any, tmp_path: Path) -> None:
    """B A of each file entry against the difference of two dense models; with peft installed, against its outputs too."""
    base = small(architecture)
    method = lorank.LoRA(rank={"attn": 4, ".*": 2}) if name == "lora" else lorank.CoDyRA(rank=4)
    model = trained(copy.deepcopy(base), method)
    if name == "codyra":
        for module in model.modules():
            if hasattr(module, "gamma"):
                module.gamma.data[1] = 0
    lorank.export_peft(model, tmp_path)
    about, stored = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    merged = lorank.merge(model)
    seen = set()
    for target in about["target_modules"]:
        A, B = (stored.pop(f"base_model.model.{target}.lora_{side}.weight") for side in "AB")
        rank = about["rank_pattern"].get(target, about["r"])
        assert A.shape[0] == B.shape[1] == rank and about["alpha_pattern"].get(target, about["lora_alpha"]) == rank
        seen.add(rank)
        update = merged.get_submodule(target).weight - base.get_submodule(target).weight
        torch.testing.assert_close(B @ A, update.T if about["fan_in_fan_out"] else update, rtol=1e-4, atol=1e-5)
    assert not stored and about["fan_in_fan_out"] is (architecture == "gpt2")
    assert (
        seen == ({2, 4} if name == "lora" else {3})
        if architecture == "llama"
        else max(seen) == (12 if name == "lora" else 9)
    )
    peft = pytest.importorskip("peft")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about names that peft uses
        found = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()(TOKENS).logits
    torch.testing.assert_close(found, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_lora_trains_as_pefts(small: Any) -> None:
    """Five steps of AdamW from equal factors."""
    peft = pytest.importorskip("peft")
    base = small("llama", num_hidden_layers=1).double()
    ours = lorank.convert(copy.deepcopy(base), lorank.LoRA(rank=4, alpha=8.0))
    names = [name for name, module in ours.named_modules() if hasattr(module, "stands_for_linear")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=names))
    theirs.double()
    for name in names:
        module = theirs.base_model.model.get_submodule(name)
        module.lora_A["default"].weight.data.copy_(ours.get_submodule(name).A.weight)
    ends = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model(input_ids=TOKENS).logits)
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_separated_is_refused(small: Any, tmp_path: Path) -> None:
    osft, smora = lorank.convert(small("llama"), "osft"), lorank.convert(small("llama"), "smora")
    codyra = lorank.convert(small("llama"), "codyra")
    lorank.next_task(codyra)
    with pytest.raises(ValueError, match="osft cannot be saved alone, because it changes all of W"):
        lorank.save_adapter(osft, tmp_path / "a")
    with pytest.raises(ValueError, match="codyra cannot be saved alone, because what earlier tasks left is in W"):
        lorank.save_adapter(codyra, tmp_path / "a")
    with pytest.raises(ValueError, match="smora cannot be written as two factors: its gate depends on the input"):
        lorank.export_peft(smora, tmp_path / "a")
    with pytest.raises(
        ValueError, match="model must be a model of transformers with an adapter such as lora, got one with cola"
    ):
        lorank.save_adapter(lorank.convert(small("llama"), "cola"), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "adapter.json").write_text("{")
    with pytest.raises(ValueError, match="folder must be one that lorank.save_adapter wrote"):
        lorank.load_adapter(tmp_path, small("llama"))
