"""What the papers take at each size: every number as it is printed, and what a run of that size then gets."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorank.plan import dry_run
from lorank.sizes import SIZES
from lorank.table import find, method_names
from lorank.train.methods import methods_of
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe

# Typed from the papers and the authors' scripts, also where a number is the default of its field.
PRINTED: dict[str, dict[str, dict[str, Any]]] = {
    "cola": {
        "60m": {"rank": 128, "nonlinearity": "both"},
        "130m": {"rank": 256, "nonlinearity": "both"},
        "350m": {"rank": 256, "nonlinearity": "low-rank"},
        "1b": {"rank": 512, "nonlinearity": "low-rank"},
        "7b": {"rank": 1024, "nonlinearity": "low-rank"},
    },
    "low-rank": {
        "60m": {"rank": 128},
        "130m": {"rank": 256},
        "350m": {"rank": 256},
        "1b": {"rank": 512},
        "7b": {"rank": 1024},
    },
    "sltrain": {
        "60m": {"rank": 128, "density": 0.03, "alpha": 32},
        "130m": {"rank": 256, "density": 0.03, "alpha": 16},
        "350m": {"rank": 256, "density": 0.03, "alpha": 16},
        "1b": {"rank": 512, "density": 0.03, "alpha": 8},
        "7b": {"rank": 1024, "density": 0.05, "alpha": 8},
    },
    "crnet": {"60m": {"rank": 104}, "1b": {"rank": 448}, "7b": {"rank": 512}},
    "relora": {size: {"rank": 128, "alpha": 32, "dropout": 0.1} for size in ("60m", "130m", "250m", "350m", "1b")},
    "switchlora": {size: {"rank": r, "interval": 40, "ratio": 0.1} for size, r in (("350m", 256), ("1b", 512))},
    "sst": {"130m": {"rank": 64}, "350m": {"rank": 64}, "1b": {"rank": 128}},
    "masa": {},
    "galore": {
        "60m": {"rank": 128, "update_gap": 200, "scale": 0.25},
        "130m": {"rank": 256, "update_gap": 200, "scale": 0.25},
        "350m": {"rank": 256, "update_gap": 200, "scale": 0.25},
        "1b": {"rank": 512, "update_gap": 200, "scale": 0.25},
        "7b": {"rank": 1024, "update_gap": 500, "scale": 0.25},
    },
    "fira": {
        "60m": {"rank": 128, "update_gap": 200, "scale": 0.25},
        "130m": {"rank": 256, "update_gap": 200, "scale": 0.25},
        "350m": {"rank": 256, "update_gap": 200, "scale": 0.25},
        "1b": {"rank": 512, "update_gap": 200, "scale": 0.0625},
        "7b": {"rank": 64, "update_gap": 500, "scale": 0.0625},
    },
    "dct-adamw": {},
    "apollo": {
        size: {"rank": r, "update_gap": 200}
        for size, r in (("60m", 128), ("130m", 192), ("350m", 256), ("1b", 512), ("7b", 256))
    },
    "apollo-mini": {},
    "loro": {
        "60m": {"update_gap": 500, "late_steps": None},
        "130m": {"update_gap": 500, "late_steps": None},
        "350m": {"update_gap": 500, "late_steps": 6_000},
        "1b": {"update_gap": 200, "late_steps": None},
    },
    "trion": {"350m": {"rank": 256, "momentum": 0.95}, "1b": {"rank": 256, "momentum": 0.95}},
}
PRINTED["cola-m"] = PRINTED["cola"]
ROWS = [(method, size, fields) for method, sizes in PRINTED.items() for size, fields in sizes.items()]


def settings_of(recipe: Recipe, fields: Iterable[str]) -> dict[str, Any]:
    found = methods_of(recipe)
    owner = next(one for one in (found.method, found.optimizer) if all(hasattr(one, name) for name in fields))
    return {name: getattr(owner, name) for name in fields}


@pytest.mark.parametrize(("name", "size", "fields"), ROWS, ids=[f"{method}-{size}" for method, size, _ in ROWS])
def test_a_size_gets_the_printed_numbers(name: str, size: str, fields: dict[str, Any]) -> None:
    structure = getattr(find(name), "structure", None)
    assert settings_of(Recipe(method=f"{structure}+{name}" if structure else name, size=size), fields) == fields


@pytest.mark.parametrize("name", [*method_names("method"), *method_names("optimizer")])
def test_published_numbers_are_printed_ones(name: str) -> None:
    published = find(name).published
    assert set(published) <= set(SIZES)
    ours = {"tiny", "20m", *({"250m"} if name != "relora" else ())}  # of no paper but ReLoRA's
    if name not in PRINTED:  # they are typed again in its own test
        assert not set(published) - ours or "published" in own_test(name)
        return
    assert set(published) - ours == set(PRINTED[name])
    for size in set(published) - ours:
        assert published[size].items() <= PRINTED[name][size].items()


def own_test(name: str) -> str:
    found = [*Path(__file__).parents[1].glob(f"*/**/test_{name.replace('-', '_')}.py")]
    return found[0].read_text() if found else ""


def test_where_nothing_is_printed_the_method_decides() -> None:
    own = {"switchlora": 0.25, "sst": 0.125, "sltrain": 0.25, "crnet": 0.25, "cola": 88, "galore": 0.25}
    for method, rank in own.items():
        assert settings_of(Recipe(method=method, size="tiny"), ["rank"]) == {"rank": rank}
    assert settings_of(Recipe(method="switchlora", size="130m"), ["rank"]) == {"rank": 0.25}
    masa: Any = methods_of(Recipe(method="masa", size="130m")).method
    assert masa.count(12) == 4, "the paper's L/3"
    assert settings_of(Recipe(method="sltrain", model="gpt2", size="130m"), ["alpha"]) == {"alpha": 32}


def test_the_recipe_wins() -> None:
    for recipe in (
        Recipe(method="sltrain", size="130m", rank=64, options={"alpha": 4}),
        Recipe(method="sltrain", size="130m", options={"rank": 64, "alpha": 4}),
        Recipe(method={"sltrain": {"rank": 64, "alpha": 4}}, size="130m"),
    ):
        assert settings_of(recipe, ["rank", "alpha"]) == {"rank": 64, "alpha": 4}
    fira = Recipe(method="fira", size="1b", rank=8, options={"scale": 1.0})
    assert settings_of(fira, ["rank", "scale"]) == {"rank": 8, "scale": 1.0}


@pytest.mark.parametrize(
    ("name", "size", "shown"),
    [
        ("sst", "130m", "SSTLinear(rank=64 of 768, enhanced=True)"),
        ("relora", "130m", "ReLoRALinear(rank=128, scale=0.25)"),
        ("sltrain", "130m", "SLTrainLinear(rank=256, nnz=17694, scale=0.0625)"),
        ("sltrain", "7b", "SLTrainLinear(rank=1024, nnz=838860, scale=0.0078125)"),
        ("switchlora", "350m", "SwitchLoRALinear(rank=256, scale=0.00390625)"),
        ("crnet", "1b", "CRNetDense(), then CRNetLinear(rank=448)"),
        ("galore", "1b", "galore, rank 512"),
        ("fira", "1b", "fira, rank 512, scale=0.0625"),
    ],
)
def test_a_dry_run_shows_them(name: str, size: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "count", lambda *_: None)  # counting FLOPs takes long
    found = dry_run.plan(Recipe(method=name, size=size, vocab_size=32_000))
    assert shown in [row.treatment for row in found.treatments] + [row.after for row in found.rows]


@pytest.mark.parametrize(
    ("name", "size", "total", "trainable"),
    [
        ("crnet", "1b", 582_441_057, 582_441_057),
        ("relora", "130m", None, 71_584_512),
        ("relora", "250m", None, 98_734_848),
        ("relora", "350m", None, 125_404_160),
        ("relora", "1b", None, 250_706_944),
        ("switchlora", "1b", None, 609_310_720),
    ],
)
def test_published_counts_that_no_recipe_has(name: str, size: str, total: int | None, trainable: int) -> None:
    recipe = Recipe(method=name, size=size, vocab_size=32_000)
    with torch.device("meta"):
        parameters = list(build_model(recipe, build_config(recipe)).parameters())
    assert total is None or sum(p.numel() for p in parameters) == total
    assert sum(p.numel() for p in parameters if p.requires_grad) == trainable
