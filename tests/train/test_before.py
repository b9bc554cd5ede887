"""What version 0.1.0 left on disk is read as before: runs resume with the same losses, and models load.

tests/golden/before/NAME is the folder of a run of commit 924cce9 that was killed after step 3 of 6, without the files that
resuming does not read. `HERE` stands for the folder that holds the text and the model's shape. A run without rng_state.pth
shares the one next to it. losses.json has the losses of the same runs without interruption (training, validation) and the
loss of the checkpoint's model on `TOKENS` (loaded).
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from lorank.conversion import method_of
from lorank.methods.relora import ReLoRA
from lorank.train.folder import history, read_run
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain
from lorank.train.text import limits_of, recipe_of_run

BEFORE = Path(__file__).parents[1] / "golden/before"
LOSSES = json.loads((BEFORE / "losses.json").read_text())
TOKENS = torch.arange(32, 64).view(2, 16)


@pytest.mark.parametrize("name", LOSSES)
def test_an_older_run_resumes_with_the_same_losses(name: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(BEFORE / name, tmp_path / "run"))
    for file in ("recipe.yaml", "run.json"):
        (run / file).write_text((BEFORE / name / file).read_text().replace("HERE", str(BEFORE)))
    if not (random := run / "checkpoint-3/rng_state.pth").exists():
        shutil.copy(BEFORE / "rng_state.pth", random)
    summary = pretrain(read_run(run), run, resume=True, on_cpu=True)
    losses = [record["loss_nats_per_token"] for record in history(run) if "loss_nats_per_token" in record]
    assert losses == pytest.approx(LOSSES[name]["training"], rel=1e-5)
    assert summary is not None
    assert summary.validation_loss_nats_per_token == pytest.approx(LOSSES[name]["validation"], rel=1e-5)


def test_a_resumed_run_keeps_defaults_that_have_changed() -> None:
    folder = BEFORE / "relora"
    recipe = Recipe.from_dict(yaml.safe_load((folder / "recipe.yaml").read_text().replace("HERE", str(BEFORE))))
    saved = AutoConfig.from_pretrained(folder / "checkpoint-3")
    method = method_of(build_model(recipe, build_config(recipe), saved))
    assert isinstance(method, ReLoRA) and method.reset_masks == "repo" != ReLoRA().reset_masks


def test_an_older_run_holds_out_as_much_as_it_did() -> None:
    assert recipe_of_run(str(BEFORE / "relora")).validation_tokens is None  # type: ignore[union-attr]
    assert Recipe.read("cola-60m").validation_tokens == 10_000_000


def test_an_older_run_evaluates_on_all_at_its_end() -> None:
    """Its recipe names eval_tokens, which were for evaluations during training."""
    settings = yaml.safe_load((BEFORE / "relora/recipe.yaml").read_text())
    assert limits_of(Recipe.from_dict(settings)) == limits_of(Recipe()) == (100_000, None)
    assert limits_of(Recipe.from_dict({**settings, "eval_tokens": 60})) == (60, None)
    assert limits_of(Recipe.from_dict({"eval_tokens": 60})) == (60, 60)


@pytest.mark.parametrize("name", LOSSES)
def test_an_older_model_loads(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(BEFORE / name / "checkpoint-3").eval()
    with torch.no_grad():
        loss = model(input_ids=TOKENS, labels=TOKENS).loss.item()
    assert loss == pytest.approx(LOSSES[name]["loaded"], rel=1e-5)
