"""Forecasts against reality: a counter of operations, and the resident memory of real steps."""

import csv
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lorank.plan.run import count, empty_model, memory, optimizer_bytes, optimizer_step
from rich.console import Console
from transformers import AutoConfig, GPT2Config, PretrainedConfig

from lorank import accounting
from lorank.accelerators import ACCELERATORS, Fleet, find_accelerator
from lorank.optim.dct import dct_matrix
from lorank.papers import formulas
from lorank.plan import forecast
from lorank.report import plans
from lorank.sizes import SIZES
from lorank.train.model import find_projection, with_layers
from lorank.train.recipe import Recipe

FLEET = Fleet(accelerator=find_accelerator("h100"), devices=8)
TINY: dict[str, Any] = {"vocab_size": 300, "sequence_length": 32, "batch_size": 16, "micro_batch_size": 2}


# ---- FLOPs, to the number


def closed_form(method: str, batch: int, n: int = 256) -> int:
    """Training FLOPs of a 60m on [batch, n] tokens."""
    d, f, layers, _, r = SIZES["60m"]
    each = {m: formulas.block_training_flops(m, d, f, r, n) for m in ("dense", "cola", "relora")}  # type: ignore[arg-type]
    head = 6 * n * d * 32_000
    atoms = round(layers / 3)
    blocks = {
        "dense": batch * layers * each["dense"],
        "low-rank": batch * layers * each["cola"],
        "cola": batch * layers * each["cola"],
        "relora": batch * layers * each["relora"],
        "switchlora": batch * layers * each["relora"],
        "crnet": batch * (each["dense"] + (layers - 1) * each["cola"]),
        # once per call, whatever the batch: W = B A + S and the gradients through it; W_l = Σ c_s D_s
        "sltrain": layers * (batch * each["dense"] + 24 * d * d * r + 18 * d * f * r + 8 * d * d * r + 6 * d * f * r),
        "masa": layers * (batch * each["dense"] + 3 * 4 * 2 * atoms * d * d),
    }
    return blocks[method] + batch * head


@pytest.mark.parametrize("method", ["dense", "low-rank", "cola", "relora", "switchlora", "crnet", "sltrain", "masa"])
def test_flops_equal_the_closed_forms(method: str) -> None:
    recipe = forecast.with_method(Recipe(size="60m", rank=128, vocab_size=32_000), method)
    found = accounting.measure_flops(empty_model(recipe), batch=3)
    assert found.total == closed_form(method, batch=3)
    assert found.recompute == 0


# ---- memory, against a process


GALORE = {"method": "galore", "rank": 64, "options": {"in_backward": True}}
SMALL = {"size": "20m", "vocab_size": 8000, "sequence_length": 128, "micro_batch_size": 2}
PEAKS: list[dict[str, Any]] = [
    {**SMALL, "method": "dense", "batch_size": 2},
    {**SMALL, "method": "dense", "batch_size": 4},
    {**SMALL, "method": "cola", "batch_size": 2},
    {**SMALL, "method": "cola-m", "batch_size": 4},
    {**SMALL, "method": "dense", "batch_size": 2, "sequence_length": 16},
    {**SMALL, **GALORE, "batch_size": 2, "sequence_length": 16},
    {**SMALL, **GALORE, "batch_size": 4, "sequence_length": 16},
    {"size": "tiny", "vocab_size": 1000, "method": "cola-m", "batch_size": 1, "sequence_length": 4096},
    {
        "size": "tiny",
        "vocab_size": 500,
        "method": "cola",
        "batch_size": 4,
        "sequence_length": 1024,
        "documents": "padded",
    },
]
FEW = {"size": "20m", "vocab_size": 2000, "sequence_length": 64, "batch_size": 2}
STEPS: list[dict[str, Any]] = [
    {**FEW, "method": "dense", "optimizer": "muon"},
    {**FEW, "method": "dense", "optimizer": "adafactor"},
    {**FEW, "method": "galore", "rank": 64},
    {**FEW, "method": "galore", "rank": 64, "optimizer": "adafactor"},
    {**FEW, "method": "trion", "rank": 64},
    {**FEW, "method": "switchlora", "sequence_length": 16},  # whose AdamW makes all denominators at once
]
"""With few tokens the most is held in the optimizer's step: products, Gram matrices, what is not done in place."""
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 4, "head_dim": 32},
}


def save_mixture(kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Its configuration is in the folder then: the settings of a recipe that reads it."""
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    AutoConfig.for_model(kind, **{**shape, **EXPERTS[kind], **changes}).save_pretrained(folder / kind)
    return {"model": str(folder / kind), "method": "dense", "vocab_size": 1000}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of resident memory are Linux's")
def test_predicted_peaks_are_those_of_real_steps(tmp_path: Path) -> None:
    """Within 10 %, of resident memory, over two steps with AdamW: the first peak with moments is in the second."""
    script = Path(__file__).with_name("peak_of_a_process.py")
    # every tensor of some size in pages of its own, which go back when it is freed
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    mixtures: list[dict[str, Any]] = [
        {**save_mixture(kind, tmp_path), "precision": precision, "batch_size": 8, "sequence_length": 128}
        for kind, precision in (("mixtral", "fp32"), ("qwen3_moe", "bf16"))
    ]
    cases = PEAKS + STEPS + mixtures
    command = [sys.executable, str(script), json.dumps(cases)]
    real = json.loads(subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout)
    whens = []
    for settings, measured in zip(cases, real, strict=True):
        found = count(recipe := Recipe.from_dict(settings), empty_model(recipe)).memory
        whens.append(found.peak_when)
        assert found.peak_bytes == pytest.approx(measured, rel=0.1), settings
    assert whens[:4] == ["backward"] * 4
    assert whens[4] == "step", "with few tokens the most is held when all gradients are there"
    assert set(whens[len(PEAKS) : -len(mixtures)]) == {"step"}


def test_a_step_is_followed_without_leaving_its_bases_behind() -> None:
    """A cosine basis is kept for the next call; one without data would break it."""
    recipe = Recipe(size="tiny", vocab_size=64, method="trion", rank=8)
    optimizer_step(recipe, empty_model(recipe))
    assert type(dct_matrix(256, torch.device("cpu"), torch.float32)) is torch.Tensor


def test_moments_of_a_byte_are_taken_off_the_step() -> None:
    recipe = Recipe(size="tiny", vocab_size=64)
    model = empty_model(recipe)
    whole, small = (
        optimizer_step(dataclasses.replace(recipe, optimizer=rule), model) for rule in ("adamw", "adamw-8bit")
    )
    saved = optimizer_bytes(recipe, model) - optimizer_bytes(dataclasses.replace(recipe, optimizer="adamw-8bit"), model)
    assert whole.kept_bytes - small.kept_bytes == whole.most_bytes - small.most_bytes == saved > 0


def test_of_a_gradient_projected_as_it_arrives_the_projection_stays() -> None:
    """The closed form; that reality agrees, within 10 %, is of use only where the whole gradients are more than that."""
    whole, projected = (
        count(recipe := Recipe(**{**TINY, **GALORE, "options": options}), empty_model(recipe))
        for options in ({}, GALORE["options"])
    )
    d, f, layers, _, _ = SIZES["tiny"]
    saved = 4 * layers * (4 * d * (d - 64) + 3 * f * (d - 64))
    assert whole.memory.gradients_bytes - projected.memory.gradients_bytes == saved
    assert (
        whole.memory.peak_bytes - projected.memory.peak_bytes > 0.9 * saved
    )  # micro-batches: all are there at the peak
    assert saved > 0.15 * whole.memory.peak_bytes
    assert projected.memory.optimizer_bytes == whole.memory.optimizer_bytes


def test_what_the_peak_is_made_of() -> None:
    recipe = Recipe(size="20m", vocab_size=8000, batch_size=4)
    once, again = (
        accounting.memory_estimate(empty_model(recipe), batch=4, sequence_length=256, accumulate=a)
        for a in (False, True)
    )
    state = once.weights_bytes + once.optimizer_bytes
    assert state + max(once.gradients_bytes, once.activations_bytes) <= once.peak_bytes <= 1.3 * once.total_bytes
    assert again.activations_bytes == once.activations_bytes
    # at the beginning of backward, where the peak is, the gradients of earlier micro-batches are there in full
    assert 0.8 * once.gradients_bytes < again.peak_bytes - once.peak_bytes <= once.gradients_bytes


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 4), ("bf16", 4), ("bf16-pure", 2)])
def test_memory_knows_the_dtype(precision: str, bytes_each: int) -> None:
    recipe = Recipe(**TINY, precision=precision)  # type: ignore[arg-type]
    found = count(recipe, empty_model(recipe))
    n = found.parameters.total
    memory = found.memory
    expected = (bytes_each * n, bytes_each * n, 2 * bytes_each * n)
    assert (memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes) == expected


# ---- the run


@pytest.fixture(scope="module")
def tiny() -> list[forecast.Forecast]:
    """Of dense, cola and cola-m: counted once."""
    return forecast.forecast_all([Recipe(**TINY)], ["dense", "cola", "cola-m"], fleet=FLEET, tokens=10_000_000)


def test_a_run_is_flops_over_rate(tiny: list[forecast.Forecast]) -> None:
    found = tiny[1]
    seconds = found.counts.flops_per_token * 1e7 / (8 * 494e12 * 0.4)  # fp32, Recipe's default
    assert found.run.hours * 3600 == pytest.approx(seconds)
    assert found.run.kilowatt_hours == pytest.approx(seconds / 3600 * 8 * 0.7)
    assert found.run.dollars == pytest.approx(seconds / 3600 * 8 * 2.5)
    assert found.steps == math.ceil(1e7 / (16 * 32))
    assert found.all_reduce_bytes == 2 * 7 / 8 * 4 * found.counts.parameters.trainable


def test_a_run_is_priced_at_the_rate_of_its_precision() -> None:
    recipes = {name: Recipe(**TINY, precision=name, steps=90) for name in ("fp32", "bf16", "bf16-pure")}  # type: ignore[arg-type]
    found = forecast.forecast_recipes(recipes, fleet=FLEET)
    assert [one.to_dict()["accelerator_flops"] for one in found] == [494e12, 989e12, 989e12]
    assert found[0].run.hours / found[1].run.hours == pytest.approx(989 / 494)
    assert found[0].run.dollars / found[2].run.dollars == pytest.approx(989 / 494)
    said = Console(width=300, file=io.StringIO())
    said.print(plans.forecast_tables(found))
    assert "494 TFLOP/s in fp32 (multiplied in TF32), 989 TFLOP/s in bf16, 80 GB" in said.file.getvalue()  # type: ignore[attr-defined]


def test_tf32_is_half_as_fast_as_bf16_on_every_data_sheet() -> None:
    for one in ACCELERATORS.values():
        assert one.flops / 2.1 < one.tf32_flops < one.flops / 1.97, one.name


def test_the_budget_is_the_dense_models(tiny: list[forecast.Forecast]) -> None:
    (found,) = forecast.forecast_all([Recipe(**TINY)], ["cola"], fleet=FLEET)
    assert found.tokens == 20 * tiny[0].counts.parameters.total > 20 * found.counts.parameters.total
    assert found.budget_is_default and not tiny[0].budget_is_default


def test_the_optimizers_products_are_part_of_a_step_and_of_the_run() -> None:
    methods = ["dense", "galore", "trion", "relora"]
    found = forecast.forecast_all([Recipe(**TINY, rank=16)], methods, fleet=FLEET, tokens=10_000_000)
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


def test_gradients_stand_by_where_there_are_several_micro_batches_or_devices() -> None:
    recipe = Recipe(**{**TINY, "sequence_length": 256, "micro_batch_size": 1})
    once, several, spread = (
        forecast.forecast_all(
            [dataclasses.replace(recipe, batch_size=batch)],
            ["dense"],
            fleet=dataclasses.replace(FLEET, devices=devices),
            tokens=10**6,
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


# ---- what fits


def test_the_largest_micro_batch_fits_and_the_next_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "SIZES", ["tiny", "20m", "60m"])
    shape, gib = Recipe(**{**TINY, "batch_size": 8 * 64}), 0.05
    (found,) = forecast.forecast_all([shape], ["cola"], fleet=FLEET, tokens=10**6)
    (fit,) = forecast.fit_all([found], gib)
    b = fit.micro_batch
    peaks = [planned(found, x).counts.memory.peak_bytes for x in (b, 2 * b)]
    assert 1 < b < 32 and 64 % b == 0 and not fit.is_whole
    assert peaks[0] <= gib * 2**30 < peaks[1]
    sizes = ["tiny", "20m", "60m"]
    for name in sizes[sizes.index(fit.size or "") :][:2]:
        recipe = forecast.with_method(dataclasses.replace(shape, size=name), "cola")
        one = accounting.memory_estimate(empty_model(recipe), batch=1, sequence_length=32, accumulate=True)
        assert (one.peak_bytes <= gib * 2**30) == (name == fit.size)


def planned(found: forecast.Forecast, micro: int) -> forecast.Forecast:
    """The plan for another micro-batch; ValueError if it refuses that one."""
    recipe = dataclasses.replace(found.recipe, micro_batch_size=micro)
    (again,) = forecast.forecast_recipes({"r.yaml": recipe}, fleet=found.fleet, tokens=10**6)
    return again


@pytest.mark.parametrize("devices", [1, 2])
def test_what_fits_is_what_the_plan_says_and_takes(devices: int) -> None:
    """Where one micro-batch does for a whole step nothing is accumulated, and it may take less than a part of it."""
    shape, fleet = Recipe(**{**TINY, "batch_size": 6 * devices}), dataclasses.replace(FLEET, devices=devices)
    (found,) = forecast.forecast_all([shape], ["dense"], fleet=fleet, tokens=10**6)
    peaks = {b: planned(found, b).counts.memory.peak_bytes for b in (1, 2, 3, 6)}
    measured = forecast._Peaks(found.recipe, devices)
    for b, peak in peaks.items():
        best = max(c for c, other in peaks.items() if other <= peak)
        assert measured.largest_micro_batch(6, peak) == best >= b
    assert measured.largest_micro_batch(6, min(peaks.values()) - 1) == 0
    with pytest.raises(ValueError, match=r"do(es)? not divide"):
        planned(found, 4)


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2Config(n_layer=4, n_embd=64, n_head=2).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", ["dense", "masa", "galore"])
def test_the_shape_with_the_most_layers_fits_and_with_one_more_does_not(method: str, four_layers: str) -> None:
    shape = Recipe(**TINY, model=four_layers, rank=8 if method == "galore" else None)
    recipe = forecast.with_method(shape, method)
    within, beyond = (memory(recipe, empty_model(recipe, layers=n), 1, devices=8).peak_bytes for n in (9, 10))
    nine = accounting.count_parameters(empty_model(recipe, layers=9)).total
    assert forecast.deepest(recipe, 8, within) == forecast.deepest(recipe, 8, beyond - 1) == (9, nine, False)


def test_of_a_shape_that_is_too_deep_fewer_layers_are_found_and_four_times_its_own_are_the_most(
    four_layers: str,
) -> None:
    recipe = Recipe(**TINY, model=four_layers)
    one, two = (memory(recipe, empty_model(recipe, layers=n), 1, devices=8).peak_bytes for n in (1, 2))
    found = [forecast.deepest(recipe, 8, limit) for limit in (one - 1, one, two - 1, two * 1000)]
    assert [(d.layers, d.is_bound) for d in found if d] == [(0, False), (1, False), (1, False), (16, True)]


def test_layers_that_a_configuration_lists_are_repeated() -> None:
    pattern = ["sliding_attention", "sliding_attention", "full_attention"]
    config = AutoConfig.for_model("qwen3", num_hidden_layers=3, layer_types=pattern)
    assert with_layers(config, 7).layer_types == [*pattern, *pattern, pattern[0]]
    assert with_layers(config, 2).layer_types == pattern[:2] and config.num_hidden_layers == 3
    assert with_layers(AutoConfig.for_model("gpt_neo"), 5).attention_layers == ["global", "local"] * 2 + ["global"]
    with pytest.raises(ValueError, match="no number of layers"):
        with_layers(PretrainedConfig(), 2)


def test_where_layers_cannot_be_set_nothing_is_said_of_them() -> None:
    table = {r"model\.layers\.[01]\..*": 8}  # says nothing of a third block
    assert forecast.deepest(Recipe(**TINY, method="cola", rank=table), 8, 2**40) is None


def test_a_bend_is_no_obstacle() -> None:
    def bent(b: int) -> float:
        return max(100 + b, 10 * b)

    for limit in (101, 110, 111, 112, 500, 1009):
        for start in (1, 3, 12, 60):
            best = forecast.largest_below(bent, limit, start=start, most=1000)
            assert bent(best) <= limit < bent(best + 1)


def test_nothing_fits_is_an_error_that_says_what_would(tiny: list[forecast.Forecast]) -> None:
    with pytest.raises(ValueError, match=r"nothing fits in 0\.001 GiB: cola tiny.* needs 0\.0"):
        forecast.fit_all(tiny[1:2], 0.001)


@pytest.mark.parametrize("gib", [math.nan, math.inf, -1.0, 0.0])
def test_what_is_no_budget_is_refused_before_anything_is_counted(gib: float) -> None:
    with pytest.raises(ValueError, match="must be a positive number of GiB"):
        forecast.check_budget(iter([]), gib)


def test_a_budget_below_weights_gradients_and_state_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting.memory, "measure_peak", None)  # nothing may be run
    tiny = Recipe(**TINY, method="cola")
    need = 4 * 4 * accounting.count_parameters(empty_model(tiny)).total / 2**30
    with pytest.raises(
        ValueError, match=rf"nothing fits in .* GiB: cola tiny, .* needs {need:.3g} GiB for weights, gradients"
    ):
        forecast.check_budget([dataclasses.replace(tiny, size="7b"), tiny], 0.999 * need)
    forecast.check_budget([tiny], 1.001 * need)


def test_optimizers_with_little_state_get_the_size_that_they_can_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer does not depend on what else is planned for, and 16 bytes a parameter are no bound for Adafactor."""
    monkeypatch.setattr(forecast, "SIZES", ["tiny", "20m"])
    shape = Recipe(**{**TINY, "vocab_size": 8000}, optimizer="adafactor")
    alone = forecast.forecast_all([shape], ["dense"], fleet=FLEET, tokens=10**6)
    both = forecast.forecast_all([shape, dataclasses.replace(shape, size="20m")], ["dense"], fleet=FLEET, tokens=10**6)
    peak = forecast._Peaks(both[1].recipe, 8).at(1)
    assert peak < 16 * both[1].counts.parameters.total
    assert {fit.size for fit in forecast.fit_all(alone + both, peak / 2**30)} == {"20m"}


def test_what_fits_of_a_mixture_of_experts(tmp_path: Path) -> None:
    shape = Recipe.from_dict({**TINY, **save_mixture("mixtral", tmp_path, num_hidden_layers=1), "vocab_size": 300})
    (found,) = forecast.forecast_all([shape], ["dense"], fleet=FLEET, tokens=10**6)
    peak = forecast._Peaks(found.recipe, FLEET.devices).at
    (fit,) = forecast.fit_all([found], peak(2) / 2**30)
    assert peak(1) < peak(2) < peak(4) and fit.micro_batch == 2


# ---- for programs


def test_json_and_csv_say_the_same(tiny: list[forecast.Forecast], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "SIZES", ["tiny", "20m"])
    found = [tiny[0], tiny[2]]
    fits = forecast.fit_all(found, 0.2)
    records = json.loads(plans.forecasts_json(found, fits, 0.2))["forecasts"]
    rows = list(csv.DictReader(io.StringIO(plans.forecasts_csv(found, fits, 0.2))))
    assert [r["method"] for r in records] == [row["method"] for row in rows] == ["dense", "cola-m"]
    for record, row, fit in zip(records, rows, fits, strict=True):
        assert float(row["peak_bytes"]) == record["peak_bytes"] > record["activations_bytes"]
        assert int(row["largest_micro_batch"]) == record["largest_micro_batch"] == fit.micro_batch
        assert row["largest_llama_size"] == record["largest_llama_size"] == fit.size
        assert int(row["most_layers"]) == record["most_layers"] == fit.depth.layers > 0
        assert int(row["most_layers_parameters"]) == record["most_layers_parameters"] == fit.depth.parameters
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
    assert forecast.forecast_recipes(recipes, fleet=alone, tokens=10**6)[0].tokens == 10**6


@pytest.mark.parametrize(
    ("changes", "devices", "said"),
    [
        ({"method": "relora", "options": {"cycle": 30}}, 1, r"r\.yaml: relora: steps=30 .* not several times cycle=30"),
        ({"method": "cola", "options": {"depth": 3}}, 1, r"r\.yaml: options: cola has no field 'depth'"),
        (GALORE, 2, r"r\.yaml: in_backward=true sees .* give --devices 1"),
        ({"micro_batch_size": None, "batch_size": 3}, 2, "2 devices .* do not divide batch_size=3"),
    ],
)
def test_a_recipe_that_would_not_run_is_refused(changes: dict[str, Any], devices: int, said: str) -> None:
    recipe = Recipe(**{**TINY, "steps": 30, "warmup_steps": 3, **changes})
    with pytest.raises(ValueError, match=said):
        forecast.forecast_recipes({"r.yaml": recipe}, fleet=dataclasses.replace(FLEET, devices=devices))


def test_options_go_to_the_methods_that_have_them_and_to_one_at_least() -> None:
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
        ({"options": {"update_gab": 7}}, ["dense", "galore"], "none of dense, galore takes 'update_gab'; did you mean"),
        ({"targets": ["mlp"]}, ["dense"], "none of dense takes 'targets'; drop it"),
        ({"rank": 8}, ["dense", "masa"], "none of dense, masa takes 'rank'"),
    ):
        with pytest.raises(ValueError, match=said):
            forecast.forecast_all([Recipe(**{**TINY, **changes})], methods, fleet=FLEET)


@pytest.mark.parametrize(("method", "counters"), [("galore", 12), ("fira", 12), ("dct-adamw", 8), ("trion", 8)])
def test_optimizer_state_of_the_60m_model_has_the_bytes_of_its_formula(method: str, counters: int) -> None:
    """Counted on the tensors of a real step without data; beside the formula, each parameter has counters of steps."""
    recipe = Recipe(size="60m", vocab_size=32000, method=method, rank=128, precision="bf16-pure")
    model = empty_model(recipe)
    projection = find_projection(recipe, model)
    kept = optimizer_step(recipe, model).kept_bytes
    (d, f, layers, _, _), r, bf16 = SIZES["60m"], 128, 2
    formula = {
        "galore": lambda m, n: (2 * r * max(m, n) + r * min(m, n)) * bf16,
        "fira": lambda m, n: (2 * r * max(m, n) + r * min(m, n)) * bf16 + 4,
        "dct-adamw": lambda m, n: 2 * r * max(m, n) * bf16 + 4 * r,
        "trion": lambda m, n: m * n * bf16,
    }[method]
    projected = layers * (4 * formula(d, d) + 3 * formula(d, f))
    others = 2 * bf16 * (2 * 32000 * d + (2 * layers + 1) * d)  # AdamW's moments of embedding, head and norms
    shared = (
        d * d * bf16 if method in ("dct-adamw", "trion") else 0
    )  # the cosines, one matrix for all: every short side is d
    assert projection is not None and len(projection.ranks) == 7 * layers
    assert kept - projected - others - shared == counters * 7 * layers + 4 * (2 + 2 * layers + 1)
