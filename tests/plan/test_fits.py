"""What fits in a given memory: the largest micro-batch, size and number of layers, and no larger one."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GPT2Config, PretrainedConfig

from lorank import accounting
from lorank.accelerators import Fleet, find_accelerator
from lorank.plan import fits, forecast
from lorank.plan.counts import memory
from lorank.train.budget import Budget
from lorank.train.model import empty_model, with_layers
from lorank.train.recipe import Recipe

FLEET = Fleet(accelerator=find_accelerator("h100"), devices=8)
TINY: dict[str, Any] = {"vocab_size": 300, "sequence_length": 32, "batch_size": 16, "micro_batch_size": 2}


# ---- what fits


def test_the_largest_micro_batch_fits_and_the_next_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "SIZES", ["tiny", "20m", "60m"])
    monkeypatch.setattr(fits, "deepest", lambda *_: None)  # examined below
    shape, gib = Recipe(**{**TINY, "batch_size": 8 * 64}), 0.05
    (found,) = forecast.forecast_all([shape], ["cola"], fleet=FLEET, budget=Budget(tokens=10**6))
    [fit] = fits.fit_all([found], gib).rows
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
    (again,) = forecast.forecast_recipes({"r.yaml": recipe}, fleet=found.fleet, budget=Budget(tokens=10**6))
    return again


@pytest.mark.parametrize("devices", [1, 2])
def test_what_fits_is_what_the_plan_says_and_takes(devices: int) -> None:
    """Where one micro-batch does for a whole step nothing is accumulated, and it may take less than a part of it."""
    shape, fleet = Recipe(**{**TINY, "batch_size": 6 * devices}), dataclasses.replace(FLEET, devices=devices)
    (found,) = forecast.forecast_all([shape], ["dense"], fleet=fleet, budget=Budget(tokens=10**6))
    peaks = {b: planned(found, b).counts.memory.peak_bytes for b in (1, 2, 3, 6)}
    measured = fits._Peaks(found.recipe, devices)
    for b, peak in peaks.items():
        best = max(c for c, other in peaks.items() if other <= peak)
        assert measured.largest_micro_batch(6, peak) == best >= b
    assert measured.largest_micro_batch(6, min(peaks.values()) - 1) == 0
    with pytest.raises(ValueError, match="must be a multiple|must divide"):
        planned(found, 4)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2Config(n_layer=2, n_embd=64, n_head=2).save_pretrained(folder)
    return str(folder)


def test_the_most_layers_fit_and_one_more_does_not(two_layers: str) -> None:
    """Of MASA, whose atoms become more with the layers."""
    recipe = forecast.with_method(Recipe(**TINY, model=two_layers), "masa")
    within, beyond = (memory(recipe, empty_model(recipe, layers=n), 1, devices=8).peak_bytes for n in (3, 4))
    three = accounting.count_parameters(empty_model(recipe, layers=3)).total
    assert fits.deepest(recipe, 8, within) == fits.deepest(recipe, 8, beyond - 1) == (3, three, False)


def test_fewer_layers_and_at_most_four_times_as_many(
    two_layers: str,
) -> None:
    recipe = Recipe(**TINY, model=two_layers)
    one = memory(recipe, empty_model(recipe, layers=1), 1, devices=8).peak_bytes
    found = [fits.deepest(recipe, 8, limit) for limit in (one - 1, one, 1000 * one)]
    assert [(d.layers, d.is_bound) for d in found if d] == [(0, False), (1, False), (8, True)]


def test_layers_that_a_configuration_lists_are_repeated() -> None:
    pattern = ["sliding_attention", "sliding_attention", "full_attention"]
    config = AutoConfig.for_model("qwen3", num_hidden_layers=3, layer_types=pattern)
    assert with_layers(config, 7).layer_types == [*pattern, *pattern, pattern[0]]
    assert with_layers(config, 2).layer_types == pattern[:2] and config.num_hidden_layers == 3
    assert with_layers(AutoConfig.for_model("gpt_neo"), 5).attention_layers == ["global", "local"] * 2 + ["global"]
    with pytest.raises(ValueError, match="the number of layers of .* cannot be changed"):
        with_layers(PretrainedConfig(), 2)


def test_where_layers_cannot_be_set_there_is_no_depth() -> None:
    table = {r"model\.layers\.[01]\..*": 8}  # says nothing of a third block
    assert fits.deepest(Recipe(**TINY, method="cola", rank=table), 8, 2**40) is None


def test_a_bend_is_no_obstacle() -> None:
    def bent(b: int) -> float:
        return max(100 + b, 10 * b)

    for limit in (101, 110, 111, 112, 500, 1009):
        for start in (1, 3, 12, 60):
            best = fits.largest_below(bent, limit, start=start, most=1000)
            assert bent(best) <= limit < bent(best + 1)


def test_nothing_fits_is_an_error_that_says_what_would(tiny: list[forecast.Forecast]) -> None:
    with pytest.raises(
        ValueError, match=r"No requested model fits in 0\.001 GiB\. The smallest, cola tiny, needs 0\.0"
    ):
        fits.fit_all(tiny[1:2], 0.001)


@pytest.mark.parametrize("gib", [math.nan, math.inf, -1.0, 0.0])
def test_what_is_no_budget_is_refused_first(gib: float) -> None:
    with pytest.raises(ValueError, match="must be a positive number of GiB"):
        fits.check_budget(iter([]), gib)


def test_a_budget_below_weights_and_state_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting.memory, "measure_peak", None)  # nothing may be run
    tiny = Recipe(**TINY, method="cola")
    need = 4 * 4 * accounting.count_parameters(empty_model(tiny)).total / 2**30
    with pytest.raises(ValueError, match=rf"The smallest, cola tiny, needs {need:.3g} GiB for weights, gradients"):
        fits.check_budget([dataclasses.replace(tiny, size="7b"), tiny], 0.999 * need)
    fits.check_budget([tiny], 1.001 * need)


def test_optimizers_with_little_state_get_larger_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer does not depend on what else is planned for, and 16 bytes a parameter are no bound for Adafactor."""
    monkeypatch.setattr(fits, "SIZES", ["tiny", "20m"])
    monkeypatch.setattr(fits, "deepest", lambda *_: None)
    shape = Recipe(**{**TINY, "vocab_size": 8000}, optimizer="adafactor")
    alone = forecast.forecast_all([shape], ["dense"], fleet=FLEET, budget=Budget(tokens=10**6))
    both = forecast.forecast_all(
        [shape, dataclasses.replace(shape, size="20m")], ["dense"], fleet=FLEET, budget=Budget(tokens=10**6)
    )
    peak = fits._Peaks(both[1].recipe, 8).at(1)
    assert peak < 16 * both[1].counts.parameters.total
    assert {fit.size for fit in fits.fit_all(alone + both, peak / 2**30).rows} == {"20m"}


def test_what_fits_of_a_mixture_of_experts(tmp_path: Path, save_mixture: Callable[..., dict[str, Any]]) -> None:
    shape = Recipe.from_dict({**TINY, **save_mixture("mixtral", tmp_path, num_hidden_layers=1), "vocab_size": 300})
    (found,) = forecast.forecast_all([shape], ["dense"], fleet=FLEET, budget=Budget(tokens=10**6))
    peak = fits._Peaks(found.recipe, FLEET.devices).at
    [fit] = fits.fit_all([found], peak(2) / 2**30).rows
    assert peak(1) < peak(2) < peak(4) and fit.micro_batch == 2
