"""Optimizer and rate of a run that names neither: the study's, by its committed runs, and what the command does with them."""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from lorank.sizes import SIZES
from lorank.train.best import RATES, ZERO_OUTPUTS, best_for, with_best
from lorank.train.recipe import Recipe

RESULTS = Path(__file__).parents[2] / "benchmarks" / "study" / "results"
STARTS = {True: RESULTS, False: RESULTS / "drawn"}
"""Whether outputs are zero at first -> where such runs are."""
Losses = dict[tuple[str, str], dict[float, dict[str, float]]]


def losses(zero: bool, size: str = "*") -> Losses:
    """(Method, optimizer) -> rate -> size and text -> last loss, of the study's runs with the first seed."""
    found: Losses = defaultdict(lambda: defaultdict(dict))
    for path in STARTS[zero].glob(f"{size}-*.jsonl"):
        for run in map(json.loads, path.read_text().splitlines()):
            method, _, optimizer = run["row"].replace("dense-muon", "dense+muon").partition("+")
            if run["seed"] == 1 and path.stem != "nano-shakespeare":
                loss = run["validation_loss_nats_per_token"]
                found[method, optimizer or "adamw"][run["settings"]["lr"]][path.stem] = loss
    return found


def test_outputs_start_at_zero_where_that_ended_lower() -> None:
    """At every size and rate, on every text, that was tried from both starts. cola-m computes what cola does."""
    drawn, zero = losses(False), losses(True)
    better = {
        key: all(
            loss < drawn[key][lr][text]
            for lr, of in rates.items()
            for text, loss in of.items()
            if text in drawn[key][lr]
        )
        for key, rates in zero.items()
        if key in drawn and key[0] in RATES
    }
    assert ZERO_OUTPUTS - {("cola-m", "muon")} == {key for key, always in better.items() if always}


def test_rates_are_those_of_the_lowest_losses_in_the_study() -> None:
    """Of the rates that were tried on every text with the first seed; the first optimizer ends lowest."""
    for method in ("dense", "cola", "low-rank"):
        ends = {}
        for optimizer, rates in RATES[method].items():
            runs = losses((method, optimizer) in ZERO_OUTPUTS, "tiny")[method, optimizer]
            texts = {text for of in runs.values() for text in of}
            means = {lr: statistics.fmean(of.values()) for lr, of in runs.items() if of.keys() == texts}
            best = min(means, key=lambda lr: means[lr])
            assert rates[SIZES["tiny"].hidden_size] == best, (method, optimizer, means)
            ends[optimizer] = runs[best]["tiny-embedded"]
        assert min(ends, key=lambda name: ends[name]) == next(iter(RATES[method]))


def test_other_widths_by_what_an_update_does_to_outputs() -> None:
    """Twice the width: AdamW's half the rate; Muon's singular values 0.2 lr √d grow, so 1/√2; Spectron's bound stays."""
    for optimizer, share in {"adamw": 0.5, "muon": 2**-0.5, "spectron": 1.0}.items():
        here, wider = (best_for("cola", width, optimizer) for width in (256, 512))
        assert here is not None and wider is not None
        assert wider.lr == pytest.approx(share * here.lr, rel=2e-3)
        assert "at a width of 256" in wider.source


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, {"optimizer": "muon", "lr": 5e-3, "zero_outputs": True}),
        ({"size": "60m"}, {"optimizer": "muon", "lr": 3.54e-3, "zero_outputs": True}),
        ({"optimizer": "adamw"}, {"optimizer": "adamw", "lr": 2.5e-3, "zero_outputs": False}),
        ({"lr": 1e-3}, {"optimizer": "muon", "lr": 1e-3, "zero_outputs": True}),
        ({"zero_outputs": False}, {"optimizer": "muon", "lr": 5e-3, "zero_outputs": False}),
        ({"options": {"init": "dlr"}}, {"optimizer": "muon", "lr": 5e-3, "zero_outputs": False}),
        ({"model": "gpt2", "shape.n_embd": 256}, {"optimizer": "muon", "lr": 5e-3, "zero_outputs": False}),
        ({"method": "cola-m", "optimizer": "adamw", "lr": 1e-3}, {"optimizer": "adamw", "lr": 1e-3}),
        ({"method": "cola+muon"}, {"method": "cola+muon", "optimizer": "adamw", "lr": 5e-3, "zero_outputs": True}),
        ({"method": "cola+adamw"}, {"optimizer": "adamw", "lr": 2.5e-3, "zero_outputs": False}),
        ({"method": "muon"}, {"method": "muon", "lr": 5e-3, "zero_outputs": True}),
        ({"method.cola.rank": 64}, {"optimizer": "muon", "lr": 5e-3, "zero_outputs": True}),
        ({"method.cola.init": "dlr"}, {"optimizer": "muon", "lr": 5e-3, "zero_outputs": False}),
        ({"method": "cola+eggroll"}, {"optimizer": "adamw", "lr": 3e-3, "zero_outputs": False}),
        ({"method": "cola+galore", "optimizer": "muon"}, {"optimizer": "muon", "lr": 3e-3}),
        ({"method": "cola+galore"}, {"optimizer": "adamw", "lr": 3e-3}),
        ({"method": "relora"}, {"optimizer": "adamw", "lr": 3e-3}),
        ({"gradient": "eggroll"}, {"optimizer": "adamw", "lr": 3e-3}),
        (
            {"optimizer.adamw.stochastic_rounding": True},
            {"optimizer": {"adamw": {"stochastic_rounding": True}}, "lr": 2.5e-3},
        ),
        (
            {"optimizer": "muon", "optimizer.momentum": 0.9},
            {"optimizer": {"muon": {"momentum": 0.9}}, "lr": 5e-3, "zero_outputs": False},
        ),
    ],
    ids=str,
)
def test_what_is_not_named_is_chosen(given: dict[str, Any], chosen: dict[str, Any]) -> None:
    recipe, words = with_best(Recipe().but(given), given)
    assert {name: getattr(recipe, name) for name in chosen} == chosen
    assert (words is None) == (recipe == Recipe().but(given))


@pytest.mark.parametrize("width", [0, -64])
def test_a_width_that_cannot_be_is_left_to_who_builds_the_model(width: int) -> None:
    recipe = Recipe(shape={"hidden_size": width})
    assert with_best(recipe, {"shape.hidden_size": width}) == (recipe, None)
