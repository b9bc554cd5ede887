"""The shipped recipes: the settings as they are published, the models they build, and first steps with each of them."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from lorank import accounting
from lorank.plan import dry_run
from lorank.sizes import SIZES
from lorank.table import METHODS, find
from lorank.train.best import best_for
from lorank.train.methods import schedule_of
from lorank.train.recipe import Recipe
from tests.contract.test_published import own_test

FOLDER = Path(__file__).parents[1] / "recipes"
BEST = sorted(path.stem for path in FOLDER.glob("*-best.yaml"))
NAMES = sorted({path.stem for path in FOLDER.glob("*-*.yaml")} - {*BEST})
OURS = [name for name in NAMES if not name.startswith("cola-")]  # CoLA's are in tests/train/test_recipe.py

# rank, options, lr, clip, epsilon, steps, warm-up, sequences of a micro-batch, perplexity, as each paper or its code has it
IN_FULL: dict[str, tuple[int, dict[str, float], float, float, float, int, int, int, str]] = {
    "sltrain-60m": (128, {"alpha": 32, "density": 0.03}, 3e-3, 0, 1e-8, 11_000, 1_100, 256, "34.15"),
    "sltrain-130m": (256, {"alpha": 16, "density": 0.03}, 3e-3, 0, 1e-8, 22_000, 2_200, 256, "26.04"),
    "sltrain-350m": (256, {"alpha": 16, "density": 0.03}, 3e-3, 0, 1e-8, 65_000, 6_500, 128, "19.42"),
    "sltrain-1b": (512, {"alpha": 8, "density": 0.03}, 3e-3, 0, 1e-8, 140_000, 10_000, 32, "16.14"),
    "galore-60m": (128, {"update_gap": 200, "scale": 0.25}, 1e-2, 0, 1e-8, 10_000, 1_000, 256, "34.88"),
    "galore-130m": (256, {"update_gap": 200, "scale": 0.25}, 1e-2, 0, 1e-8, 20_000, 2_000, 256, "25.36"),
    "galore-350m": (256, {"update_gap": 200, "scale": 0.25}, 1e-2, 0, 1e-8, 60_000, 6_000, 128, "18.95"),
    "galore-1b": (512, {"update_gap": 200, "scale": 0.25}, 1e-2, 0, 1e-8, 100_000, 10_000, 16, "15.64"),
    "fira-60m": (
        128,
        {"update_gap": 200, "scale": 0.25, "residual": "repo"},
        1e-2,
        0,
        1e-6,
        10_000,
        1_000,
        256,
        "31.06",
    ),
    "fira-130m": (
        256,
        {"update_gap": 200, "scale": 0.25, "residual": "repo"},
        1e-2,
        0,
        1e-6,
        20_000,
        2_000,
        256,
        "22.73",
    ),
    "fira-350m": (
        256,
        {"update_gap": 200, "scale": 0.25, "residual": "repo"},
        1e-2,
        0,
        1e-6,
        60_000,
        6_000,
        128,
        "16.85",
    ),
    "fira-1b": (
        512,
        {"update_gap": 200, "scale": 0.0625, "residual": "repo"},
        1e-2,
        0,
        1e-6,
        100_000,
        10_000,
        16,
        "14.31",
    ),
}
# Of the others what is printed; what is not is the library's default.
IN_PART: dict[str, dict[str, Any]] = {
    "dense-60m": {"steps": 10_000, "warmup_steps": 1_000, "weight_decay": 0.0, "batch_size": 512},
    "low-rank-60m": {"rank": 128, "steps": 10_000, "warmup_steps": 1_000, "weight_decay": 0.0, "batch_size": 512},
    "crnet-60m": {"rank": 104, "steps": 10_000, "warmup_steps": 1_000, "batch_size": 512},
    "relora-60m": {"rank": 128, "options": {"alpha": 32, "dropout": 0.1}, "steps": 10_000, "weight_decay": 0.0},
    "relora-250m": {
        "rank": 128,
        "options": {
            "alpha": 32,
            "dropout": 0.1,
            "warm_start": 5_000,
            "warm_start_lr_ratio": 0.5,
            "cycle": 5_000,
            "restart_warmup_steps": 100,
        },
        "lr": 1e-3,
        "steps": 20_000,
        "warmup_steps": 500,
        "betas": [0.9, 0.999],
        "weight_decay": 0.0,
        "clip": 1.0,
        "batch_size": 1_152,
        "micro_batch_size": 24,
        "sequence_length": 512,
        "documents": "packed",
    },
    "sltrain-7b": {
        "rank": 1024,
        "options": {"alpha": 8, "density": 0.05},
        "optimizer": "adamw-8bit",
        "lr": 3e-3,
        "steps": 150_000,
        "warmup_steps": 15_000,
        "weight_decay": 0.0,
        "clip": 1.0,
        "precision": "bf16-pure",
        "batch_size": 512,
        "micro_batch_size": 8,
        "documents": "padded",
    },
    "switchlora-60m": {"clip": 1.0, "weight_decay": 0.0, "warmup_steps": 100, "min_lr_ratio": 0.0, "seed": 0},
    "switchlora-350m": {
        "rank": 256,
        "options": {"interval": 40, "ratio": 0.1, "freeze_steps": 5},
        "lr": 2e-2,
        "clip": 1.0,
        "weight_decay": 0.0,
        "steps": 40_000,
        "warmup_steps": 100,
        "min_lr_ratio": 0.0,
        "batch_size": 1_152,
        "micro_batch_size": 72,
        "sequence_length": 512,
        "documents": "packed",
        "seed": 0,
    },
    "sst-60m": {"rank": None, "lr": Recipe.lr, "precision": "fp32"},
    "masa-60m": {"rank": None, "lr": Recipe.lr, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip": 1.0},
    "dct-adamw-60m": {"rank": None, "lr": Recipe.lr, "eps": 1e-8, "sequence_length": 512, "batch_size": 512},
    "trion-60m": {"lr": 0.02, "betas": [0.9, 0.95], "eps": 1e-10, "sequence_length": 512, "batch_size": 512},
}
APOLLO = {
    "lr": 1e-2,
    "steps": 10_000,
    "warmup_steps": 1_000,
    "weight_decay": 0.0,
    "precision": "bf16-pure",
    "batch_size": 512,
}
IN_PART["apollo-60m"] = {"rank": 128, "options": {"update_gap": 200, "scale": 1.0, "growth": 1.01}, **APOLLO}
IN_PART["apollo-mini-60m"] = {"rank": None, "options": {"update_gap": 200, "growth": 1.01}, **APOLLO}
IN_PART["factor-lr-60m"] = {"rank": 128, "lr": 2e-3, "steps": 10_000, "warmup_steps": 1_000, "batch_size": 512}
IN_PART["spectron-60m"] = {
    "rank": 128,
    "options": {"momentum": 0.95, "adamw_lr": 3e-3},
    "steps": 10_000,
    "warmup_steps": 500,
}
IN_PART["loro-60m"] = {
    "rank": 128,
    "options": {"update_gap": 500, "restart_warmup_steps": 5},
    "lr": 1e-2,
    "eps": 1e-6,
    "steps": 10_000,
    "warmup_steps": 1_000,
    "clip": 0.0,
    "precision": "bf16-pure",
}
# Total and trained parameters; None where they are not known. Those of other recipes are in their methods' own tests.
COUNTS = {
    "cola-60m": (42_770_944, 42_770_944),
    "cola-130m": (93_997_824, 93_997_824),
    "cola-350m": (185_222_144, 185_222_144),
    "cola-1b": (609_310_720, 609_310_720),
    "cola-7b": (2_820_935_680, 2_820_935_680),
    "dense-60m": (58_073_600, 58_073_600),
    "low-rank-60m": (42_770_944, 42_770_944),
    "sltrain-60m": (43_529_832, 43_529_832),
    "sltrain-130m": (96_545_796, 96_545_796),
    "sltrain-350m": (194_293_544, 194_293_544),
    "sltrain-1b": (645_547_960, 645_547_960),
    "sltrain-7b": (3_144_735_808, 3_144_735_808),
    "crnet-60m": (43_044_145, 43_044_145),
    "relora-60m": (None, 42_770_944),
    "relora-250m": (296_915_712, 296_915_712),  # 49,545,216 in factors; in the warm start all are trained
    "switchlora-60m": (None, 42_770_944),
    "switchlora-350m": (None, 185_222_144),
    "sst-60m": (None, None),
    "masa-60m": (None, None),
}
COUNTS |= dict.fromkeys(
    ("factor-lr-60m", "spectron-60m", "loro-60m"), COUNTS["low-rank-60m"]
)  # they train a plain factorisation
DENSE = {"60m": 58_073_600, "130m": 134_105_856, "350m": 367_969_280, "1b": 1_339_082_752}
for name in OURS:
    if name.startswith(("galore", "fira", "dct-adamw", "trion", "apollo")):
        COUNTS[name] = (DENSE[name.rpartition("-")[2]],) * 2


def read(name: str) -> Recipe:
    return Recipe.read(FOLDER / f"{name}.yaml")


WITHOUT = ("cola-m", "votes", "self-guided", "sparse-codes", "codebook")
"""CoLA-M has CoLA's recipe; votes train EGG, whose recipe is egg; of self-guided training no run of a Llama is published; sparse codes
are fitted to trained weights."""


def test_every_paper_has_a_recipe_at_60m() -> None:
    of_papers = [n for n in METHODS if "\nSource: " in str(sys.modules[find(n).__module__].__doc__)]
    of_papers = [name for name in of_papers if find(name).key != "gradient" and not find(name).adapts]
    assert {f"{method}-60m" for method in of_papers if method not in WITHOUT} <= set(NAMES)
    for name in set(OURS) - {*IN_FULL, *IN_PART}:  # its settings are typed again in its method's own test
        assert f'"{name}"' in own_test(name.rpartition("-")[0])
    assert set(IN_FULL) | set(IN_PART) <= set(OURS) and set(COUNTS) <= set(NAMES)


@pytest.mark.parametrize("name", IN_FULL)
def test_settings_that_are_published_in_full(name: str) -> None:
    r = read(name)
    rank, options, lr, clip, eps, steps, warmup, micro, perplexity = IN_FULL[name]
    assert (r.rank, r.options, r.lr, r.clip, r.eps) == (rank, options, lr, clip, eps)
    assert (r.steps, r.warmup_steps, r.min_lr_ratio, r.micro_batch_size) == (steps, warmup, 0.1, micro)
    assert (r.weight_decay, r.betas, r.precision, r.optimizer) == (0, [0.9, 0.999], "bf16-pure", "adamw")
    assert (r.batch_size, r.sequence_length, r.documents) == (512, 256, "padded")
    assert r.seed == (0 if r.method == "galore" else 42)
    assert f"perplexity is {perplexity}," in comment(name)


@pytest.mark.parametrize("name", IN_PART)
def test_settings_that_are_published_in_part(name: str) -> None:
    r = read(name)
    assert {key: getattr(r, key) for key in IN_PART[name]} == IN_PART[name]
    assert "Unconfirmed" in comment(name)


def test_reloras_warm_start_has_half_its_learning_rate() -> None:
    recipe = read("relora-250m")
    multiplier = schedule_of(recipe)
    assert recipe.lr * max(map(multiplier, range(5_000))) == pytest.approx(5e-4)
    assert recipe.lr * max(map(multiplier, range(5_000, 20_000))) == pytest.approx(1e-3)
    assert [step for step in range(1, 20_000) if multiplier(step) == 0] == [5_000, 10_000, 15_000]
    assert multiplier(10_100) == pytest.approx(0.794406, abs=1e-6)  # 5,100 steps into the second stage


def comment(name: str) -> str:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    return " ".join(line[2:] for line in lines if line.startswith("# "))


@pytest.mark.parametrize("name", BEST)
def test_a_best_recipe_has_what_the_study_found(name: str) -> None:
    r = read(name)
    method, _, size = name.removesuffix("-best").rpartition("-")
    found = best_for(method, SIZES[size].hidden_size)
    assert found is not None and (r.method, r.size) == (method, size)
    chosen = {name: getattr(found, name) for name in ("optimizer", "lr", "zero_outputs")}
    assert Recipe(size=size, method=method, vocab_size=4096, warmup_steps=80, **chosen) == r
    assert f"Run: lorank pretrain {name}" in comment(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_where_it_comes_from(name: str) -> None:
    r = read(name)
    method = r.method if r.optimizer.startswith("adamw") else r.optimizer
    assert name.rpartition("-")[::2] == (method.removesuffix("-m"), r.size)
    assert (r.data, r.tokenizer, r.vocab_size) == ("allenai/c4:en", "google-t5/t5-base", 32_000)
    for part in ("arXiv 2", "erplexity", f"Run: lorank pretrain {name}"):
        assert part in comment(name)


@pytest.mark.parametrize("name", NAMES)
def test_it_builds_the_published_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "count", lambda _, model: accounting.count_parameters(model))  # FLOPs take long
    found: Any = dry_run.plan(dataclasses.replace(read(name), tokenizer=None)).model
    total, trained = COUNTS.get(name, (None, None))
    assert total in (None, found.total) and trained in (None, found.trainable)
