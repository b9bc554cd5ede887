"""lorank finetune: a saved model trained on, with other defaults than a new one."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorank as library
from lorank.train.data.tokenizers import byte_tokenizer

QUICK = ["--sequence-length", 16, "--batch-size", 2, "--set", "eval_tokens=100"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that reads bytes, and next to it a text of some 40 sequences."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = byte_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=64)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"text": f"{i} and {i} is {2 * i}"} for i in range(36)]
    folder.with_name("new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_lora_is_trained_for_three_epochs_and_saved_alone_too(lorank, base: Path, tmp_path: Path) -> None:
    code, out, err = lorank("finetune", base, "--data", base.with_name("new.jsonl"), *QUICK, "--set", "log_every=1")
    assert code == 0, err
    folder = tmp_path / "runs/lora-model"
    assert ", 3 epochs" in out and "the adapter alone is in runs/lora-model/adapter" in " ".join(out.split())
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (recipe["method"], recipe["lr"], recipe["warmup_steps"], recipe["clip"]) == ("lora", 1e-3, 0.1, 1.0)
    code, _, err = lorank("generate", folder / "adapter")
    assert code == 2 and "it is an adapter alone: lorank.load_adapter puts it on its model" in err
    tuned, old = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(base)
    kept = {name.replace(".W.", "."): p for name, p in tuned.named_parameters()}
    assert all(torch.equal(kept[name], p) for name, p in old.named_parameters())
    ids, before = torch.arange(20)[None], old(torch.arange(20)[None]).logits
    alone = library.load_adapter(folder / "adapter", old)
    assert torch.equal(alone(ids).logits, tuned(ids).logits) and not torch.equal(tuned(ids).logits, before)


def test_full_trains_all_weights_and_a_run_becomes_longer(lorank, base: Path, tmp_path: Path) -> None:
    flags = ["--data", base.with_name("new.jsonl"), *QUICK, "--set", "save_every=1", "--steps", 1, "--out", "run"]
    code, _, err = lorank("finetune", base, "--method", "full", *flags)
    assert code == 0, err
    recipe = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert (recipe["method"], recipe["lr"]) == ("dense", 1e-4) and not (tmp_path / "run/adapter").exists()
    code, out, err = lorank("finetune", "--resume", "run", "--steps", 2)
    assert code == 0 and "2 steps: " in out, err


def test_a_recipe_may_name_the_model_it_starts_from(lorank, base: Path, tmp_path: Path) -> None:
    """Without a flag that does."""
    recipe = {"start_from": str(base), "data": str(base.with_name("new.jsonl")), "method": "dense"}
    (tmp_path / "start.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = lorank("pretrain", "start.yaml", *QUICK, "--steps", 1, "--out", "run")
    assert code == 0 and (tmp_path / "run/model.safetensors").exists(), err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("MODEL", "a model and a text must be given: lorank finetune MODEL --data TEXT"),
        ("nowhere --data TEXT", "start_from must be a run, a folder with a model or a hub name, got 'nowhere'"),
        ("MODEL --data TEXT --method sltrain", "method must keep the trained weights of start_from="),
        ("MODEL --data TEXT --method full,lora", "got 'full,lora'; run finetune for each, or lorank continual for all"),
        ("MODEL --data TEXT --method full+lora", "method must be full or lora, got 'full+lora'"),
        ("MODEL --data TEXT --model gpt2", "no such option: --model; use MODEL"),
        ("MODEL --data TEXT --set method=lora", "--set method=... is not possible here; use --method"),
        ("MODEL --resume run", "--resume continues a run exactly as it began, or to more steps; leave out MODEL"),
    ],
)
def test_bad_input_is_one_sentence(lorank, base: Path, flags: str, said: str) -> None:
    words = {"MODEL": str(base), "TEXT": str(base.with_name("new.jsonl"))}
    code, _, err = lorank("finetune", *(words.get(word, word) for word in flags.split()))
    assert code == 2 and said in err and len(err.splitlines()) == 1
