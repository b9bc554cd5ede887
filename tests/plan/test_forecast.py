"""Forecasts: what a run takes, its budget, and which settings go to which method."""

import csv
import dataclasses
import io
import json
import math
from typing import Any

import pytest

from lorank.accelerators import ACCELERATORS, Fleet, find_accelerator
from lorank.plan import fits, forecast
from lorank.report import plans
from lorank.sizes import SIZES
from lorank.train.budget import Budget
from lorank.train.methods import methods_of
from lorank.train.recipe import Recipe

FLEET = Fleet(accelerator=find_accelerator("h100"), devices=8)
TINY: dict[str, Any] = {"vocab_size": 300, "sequence_length": 32, "batch_size": 16, "micro_batch_size": 2}


# ---- the run


def test_a_run_is_flops_over_rate(tiny: list[forecast.Forecast]) -> None:
    found = tiny[1]
    seconds = found.counts.flops_per_token * 1e7 / (8 * 494e12 * 0.4)  # fp32, Recipe's default
    assert found.run.hours * 3600 == pytest.approx(seconds)
    assert found.run.kilowatt_hours == pytest.approx(seconds / 3600 * 8 * 0.7)
    assert found.run.dollars == pytest.approx(seconds / 3600 * 8 * 2.5)
    assert found.steps == math.ceil(1e7 / (16 * 32))
    assert found.all_reduce_bytes == 2 * 7 / 8 * 4 * found.counts.parameters.trainable


def test_a_run_is_priced_at_the_rate_of_its_precision(printed) -> None:
    recipes = {name: Recipe(**TINY, precision=name, steps=90) for name in ("fp32", "bf16", "bf16-pure")}  # type: ignore[arg-type]
    found = forecast.forecast_recipes(recipes, fleet=FLEET)
    assert [one.to_dict()["accelerator_flops"] for one in found] == [494e12, 989e12, 989e12]
    assert found[0].run.hours / found[1].run.hours == pytest.approx(989 / 494)
    assert found[0].run.dollars / found[2].run.dollars == pytest.approx(989 / 494)
    said = printed(plans.forecast_tables(found))
    assert "494 TFLOP/s in fp32 (multiplied in TF32), 989 TFLOP/s in bf16, 80 GB" in said


def test_tf32_is_half_as_fast_as_bf16_on_every_data_sheet() -> None:
    for one in ACCELERATORS.values():
        assert one.flops / 2.1 < one.tf32_flops < one.flops / 1.97, one.name


def test_the_budget_is_the_dense_models(tiny: list[forecast.Forecast]) -> None:
    (found,) = forecast.forecast_all([Recipe(**TINY)], ["cola"], fleet=FLEET)
    assert found.tokens == 20 * tiny[0].counts.parameters.total > 20 * found.counts.parameters.total
    assert found.budget_is_default and not tiny[0].budget_is_default


def test_the_optimizers_products_are_part_of_the_run(printed) -> None:
    methods = ["dense", "galore", "trion", "relora"]
    found = forecast.forecast_all([Recipe(**TINY, rank=16)], methods, fleet=FLEET, budget=Budget(tokens=10_000_000))
    dense, galore, trion, _ = found
    d, f, layers, _, _ = SIZES["tiny"]
    numbers = layers * (4 * d * d + 3 * d * f)
    grams = layers * (4 * 2 * d**3 + 3 * 2 * d * d * f)  # every 200 steps
    assert galore.counts.step_flops == pytest.approx(4 * numbers * 16 + grams / 200)
    newton_schulz = 5 * layers * (7 * 2 * 16**3 + 4 * 16**2 * (4 * d + 3 * f))
    assert trion.counts.step_flops == 2 * numbers * d + 4 * numbers * 16 + newton_schulz
    assert dense.counts.step_flops == 0 and galore.counts.flops == dense.counts.flops
    for one in (galore, trion):
        record, spent = one.to_dict(), 8 * one.counts.step_flops  # each of 8 devices takes the whole step
        assert record["flops_per_step"] - dense.to_dict()["flops_per_step"] == pytest.approx(spent)
        assert record["optimizer_flops_per_step"] == spent
        extra = spent * one.steps / (8 * 494e12 * 0.4) / 3600
        assert one.run.hours - dense.run.hours == pytest.approx(extra)
    assert [one.moves_between_steps for one in found] == [False, False, False, True]
    # FSDP2: G, the basis twice and R; every 200 steps G and the sum of the basis. Trion G and its momentum
    basis, inside = (layers * 16 * (4 * d + 3 * side) for side in (d, f))
    sent = numbers + 2 * basis + inside + (numbers + 2 * basis) / 200, 2 * numbers
    assert [one.gathered_bytes for one in found] == pytest.approx([0, *(7 / 8 * 4 * n for n in sent), 0])
    assert "optimizer, FSDP2" in printed(plans.forecast_tables(found))
    assert "optimizer, FSDP2" not in printed(plans.forecast_tables(found[:1]))


def test_gradients_wait_for_other_micro_batches_or_devices() -> None:
    recipe = Recipe(**{**TINY, "sequence_length": 256, "micro_batch_size": 1})
    once, several, spread = (
        forecast.forecast_all(
            [dataclasses.replace(recipe, batch_size=batch)],
            ["dense"],
            fleet=dataclasses.replace(FLEET, devices=devices),
            budget=Budget(tokens=10**6),
        )[0].counts.memory
        for batch, devices in ((1, 1), (2, 1), (8, 8))
    )
    assert several.peak_bytes == spread.peak_bytes > once.peak_bytes + 0.8 * once.gradients_bytes


def test_a_rank_goes_to_the_methods_that_have_one() -> None:
    shape = Recipe(**TINY, rank=8)
    assert [forecast.with_method(shape, m).rank for m in ("dense", "cola", "galore", "masa")] == [None, 8, 8, None]


def test_accelerators_are_found_by_name() -> None:
    assert find_accelerator("H100 PCIe").flops == 756e12
    with pytest.raises(ValueError, match="did you mean 'a100'"):
        find_accelerator("a10")
    names = [a.device for a in ACCELERATORS.values()]
    for i, name in enumerate(names):
        assert not any(other in name for other in names[:i]), "the more special device comes first"


# ---- for programs


def test_json_and_csv_say_the_same(tiny: list[forecast.Forecast], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "SIZES", ["tiny"])
    found = [tiny[0], tiny[2]]
    fit = fits.fit_all(found, 0.2)
    records = json.loads(plans.forecasts_json(found, fit))["forecasts"]
    rows = list(csv.DictReader(io.StringIO(plans.forecasts_csv(found, fit))))
    assert [r["method"] for r in records] == [row["method"] for row in rows] == ["dense", "cola-m"]
    for record, row, one in zip(records, rows, fit.rows, strict=True):
        assert float(row["peak_bytes"]) == record["peak_bytes"] > record["activations_bytes"]
        assert int(row["largest_micro_batch"]) == record["largest_micro_batch"] == one.micro_batch
        assert row["largest_llama_size"] == record["largest_llama_size"] == one.size
        assert int(row["most_layers"]) == record["most_layers"] == one.depth.layers > 0
        assert int(row["most_layers_parameters"]) == record["most_layers_parameters"] == one.depth.parameters
        whole = (
            record["forward_flops_per_token"] + record["backward_flops_per_token"] + record["recompute_flops_per_token"]
        )
        assert record["flops_per_token"] == whole
    assert records[1]["checkpoint"] == "bottlenecks" and records[1]["rank"] == 88


# ---- recipes


def test_a_recipe_is_the_run_that_it_makes() -> None:
    alone = dataclasses.replace(FLEET, devices=1)
    recipes = {
        "a.yaml": Recipe(**TINY, method="galore", rank=16, targets=["mlp"], steps=30, warmup_steps=3),
        "b.yaml": Recipe(vocab_size=300, sequence_length=32, batch_size=4, steps=30, warmup_steps=3),
    }
    a, b = forecast.forecast_recipes(recipes, fleet=alone)
    assert (a.steps, a.tokens, b.tokens) == (30, 30 * 16 * 32, 30 * 4 * 32)
    assert (b.recipe.micro_batch_size, b.to_dict()["recipe"]) == (4, "b.yaml")
    d, f, layers, _, _ = SIZES["tiny"]
    whole = 2 * 4 * a.counts.parameters.total
    fewer = 4 * layers * 3 * (2 * d * f - 2 * 16 * f - 16 * d)  # two moments [16, f] and a basis [d, 16] instead
    assert a.counts.memory.optimizer_bytes == whole - fewer, "the options, rank and targets are the recipe's"
    assert forecast.forecast_recipes(recipes, fleet=alone, budget=Budget(tokens=10**6))[0].tokens == 10**6


@pytest.mark.parametrize(
    ("changes", "devices", "said"),
    [
        ({"method": "relora", "options": {"cycle": 30}}, 1, r"r\.yaml: .*cycle"),
        ({"method": "cola", "options": {"depth": 3}}, 1, r"r\.yaml: cola has no setting 'depth'"),
        (
            {"method": "galore", "rank": 64, "options": {"in_backward": True}},
            2,
            r"r\.yaml: in_backward must be false on several devices.* use --devices 1",
        ),
        ({"micro_batch_size": None, "batch_size": 3}, 2, "batch_size must be a multiple of 2, 2 devices"),
    ],
)
def test_a_recipe_that_would_not_run_is_refused(changes: dict[str, Any], devices: int, said: str) -> None:
    recipe = Recipe(**{**TINY, "steps": 30, "warmup_steps": 3, **changes})
    with pytest.raises(ValueError, match=said):
        forecast.forecast_recipes({"r.yaml": recipe}, fleet=dataclasses.replace(FLEET, devices=devices))


def test_settings_of_a_key_go_to_the_methods_that_have_them() -> None:
    """``--method dense,galore --set optimizer.update_gap=3``: dense is planned without it."""
    shape = Recipe(options={"optimizer.update_gap": 3, "gradient.rank": 2})
    built = {name: methods_of(forecast.with_method(shape, name)) for name in ("dense", "galore", "cola+eggroll")}
    assert built["galore"].optimizer.update_gap == 3
    assert built["cola+eggroll"].gradient.rank == 2
    assert built["dense"].optimizer.name == built["cola+eggroll"].optimizer.name == "adamw"
    assert forecast.forecast_all(
        [dataclasses.replace(shape, options={"galore.update_gap": 3}, **TINY)], ["galore"], fleet=FLEET
    )


def test_what_runs_in_one_process_is_planned_for_one_device(printed) -> None:
    shapes, methods = [Recipe(**TINY)], ["dense", "low-rank+eggroll"]
    found = forecast.forecast_all(shapes, methods, fleet=FLEET, alone=True)
    assert [one.fleet.devices for one in found] == [8, 1]
    shown = printed(plans.forecast_tables(found))
    assert "H100 SXM devices" in shown and "p = 8 devices" in shown
    with pytest.raises(ValueError, match="eggroll runs in one process; use --devices 1"):
        forecast.forecast_all(shapes, methods, fleet=FLEET)


def test_options_go_to_the_methods_that_have_them() -> None:
    shape = Recipe(**TINY, options={"update_gap": 7, "error_feedback": "full"}, targets=["mlp"])
    kept = {m: forecast.with_method(shape, m) for m in ("dense", "cola", "galore", "dct-adamw")}
    assert {m: r.options for m, r in kept.items()} == {
        "dense": {},
        "cola": {},
        "galore": {"update_gap": 7},
        "dct-adamw": shape.options,
    }
    assert [r.targets for r in kept.values()] == [[], ["mlp"], ["mlp"], ["mlp"]]
    for changes, methods, said in (
        (
            {"options": {"update_gab": 7}},
            ["dense", "galore"],
            r"no method here \(dense, galore\) has the setting 'update_gab'; did you mean",
        ),
        ({"targets": ["mlp"]}, ["dense"], r"no method here \(dense\) has the setting 'targets'; leave it out"),
        ({"rank": 8}, ["dense", "masa"], r"no method here \(dense, masa\) has the setting 'rank'"),
    ):
        with pytest.raises(ValueError, match=said):
            forecast.forecast_all([Recipe(**{**TINY, **changes})], methods, fleet=FLEET)
