"""Runs that start from trained weights: dense, converted, and with an adapter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorank
from lorank.fit import SVD, fit
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain
from lorank.train.start import Start, started
from lorank.train.watching import watched_by


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of one step on the bytes of a short text."""
    folder = tmp_path_factory.mktemp("start") / "dense"
    text = folder.with_suffix(".txt")
    text.write_text("".join(f"the {i}th brown fox counts {i * i} lazy dogs\n" for i in range(200)))
    flags = {"method": "dense", "data": str(text), "tokenizer": "bytes", "sequence_length": 32, "batch_size": 2}
    from_scratch = Recipe(**flags, steps=1, warmup_steps=0, eval_every=0, save_every=0)  # type: ignore[arg-type]
    pretrain(from_scratch, folder, on_cpu=True)
    return folder


@pytest.fixture(scope="module")
def small(dense: Path) -> Path:
    model = fit(AutoModelForCausalLM.from_pretrained(dense), SVD(), budget=0.5, exclude="down_proj")
    model.save_pretrained(dense.with_name("small"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (dense / name).exists():
            (dense.with_name("small") / name).write_bytes((dense / name).read_bytes())
    return dense.with_name("small")


@pytest.mark.parametrize(("which", "method"), [("dense", "dense"), ("dense", "lora"), ("small", "low-rank")])
def test_a_run_begins_with_the_saved_weights(dense: Path, small: Path, which: str, method: str) -> None:
    folder = {"dense": dense, "small": small}[which]
    recipe = started(Recipe(start_from=str(folder), method=method, sequence_length=32))
    assert recipe.tokenizer == str(folder)
    model = build_model(recipe, build_config(recipe), start=Start(recipe)).eval()
    ids = torch.arange(30)[None]
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(ids).logits, saved(ids).logits)
    assert started(recipe) == recipe
    empty = build_model(recipe, build_config(recipe))
    assert [p.shape for p in empty.parameters()] == [p.shape for p in model.parameters()]


def test_a_compressed_model_is_trained_on(
    small: Path, in_this_process: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    flags = ("--data", small.with_name("dense.txt"), "--sequence-length", 32, "--batch-size", 2, "--steps", 2)
    code, _, error = in_this_process(
        "pretrain", "--start-from", small, *flags, "--lr", "1e-9", "--warmup-steps", 0, "--out", tmp_path / "healed"
    )
    assert code == 0, error
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (small, tmp_path / "healed"))
    assert type(after) is type(before)
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-7)
    assert lorank.merge(after).config.model_type == "llama"


def test_a_method_with_new_factors_is_fitted_first(dense: Path) -> None:
    """To the training text, with the recipe's ranks."""
    for kind in ("cola", "cola-m"):
        assert started(Recipe(start_from=str(dense), method=kind, rank=0.4)).method == kind
    recipe = started(Recipe(start_from=str(dense), method="low-rank", rank=0.4, sequence_length=32, batch_size=4))
    rows = [{"input_ids": torch.randint(250, (32,)).tolist()} for _ in range(40)]
    ids = torch.tensor([row["input_ids"] for row in rows[:8]])
    wanted = AutoModelForCausalLM.from_pretrained(dense)(ids).logits
    heard: list[tuple[int, int | None]] = []
    with watched_by(lambda what, done, total, unit: heard.append((done, total))):
        model = build_model(recipe, build_config(recipe), start=Start(recipe, rows)).eval()
    assert (
        heard[0] == (0, None) and heard[-1][0] == heard[-1][1] == len(heard) - 1
    )  # nobody waits before a blank screen
    assert model.config.lorank["arguments"]["rank"] == 0.4 and model.config.lorank["method"] == "low-rank"
    fresh = build_model(recipe, build_config(recipe)).eval()
    errors = [torch.linalg.norm(one(ids).logits - wanted) / torch.linalg.norm(wanted) for one in (model, fresh)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    ("which", "settings", "message"),
    [
        ("dense", {"method": "sltrain"}, "method must keep the trained weights of start_from='.*', got sltrain"),
        ("dense", {"method": "dense", "model": "gpt2"}, "model must be left out with start_from"),
        ("dense", {"method": "dense", "shape": {"hidden_size": 8}}, "shape must be left out with start_from"),
        (
            "small",
            {"method": "cola"},
            r"is converted \(low-rank\) and keeps its settings; leave out cola; if low-rank can",
        ),
        (
            "small",
            {"method": "lora"},
            r"keeps its settings; leave out lora, or put a LoRA of peft on the loaded model; if",
        ),
        (
            "small",
            {"method": "low-rank", "rank": 3},
            r"is converted \(low-rank\) and keeps its settings; leave out rank",
        ),
    ],
)
def test_what_the_weights_do_not_allow_is_refused(
    dense: Path, small: Path, which: str, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        started(Recipe(start_from=str({"dense": dense, "small": small}[which]), **settings))
