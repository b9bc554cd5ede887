"""Optimizer and rate of a run that names neither: the study's, by its committed runs, and what the command does with them."""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from lorank.sizes import SIZES
from lorank.train.best import RATES, best_for, with_best
from lorank.train.recipe import Recipe

RESULTS = Path(__file__).parents[2] / "benchmarks" / "study" / "results" / "drawn"
Losses = dict[str, dict[tuple[str, float], dict[tuple[str, int], float]]]


def losses(size: str) -> Losses:
    """Method -> (optimizer, rate) -> (text, seed) -> last loss, of the study's runs at a size."""
    found: Losses = defaultdict(lambda: defaultdict(dict))
    for path in RESULTS.glob(f"{size}-*.jsonl"):
        for run in map(json.loads, path.read_text().splitlines()):
            method, _, optimizer = run["row"].replace("dense-muon", "dense+muon").partition("+")
            key = optimizer or "adamw", run["settings"]["lr"]
            found[method][key][path.stem, run["seed"]] = run["validation_loss_nats_per_token"]
    return found


def test_rates_are_those_of_the_lowest_losses_in_the_study() -> None:
    """Of the rates that were tried on every text with the first seed; the first optimizer ends lowest."""
    found = losses("tiny")
    for method in ("dense", "cola", "low-rank"):
        ends = {}
        for optimizer, rates in RATES[method].items():
            runs = {
                lr: {t: loss for (t, seed), loss in of.items() if seed == 1}
                for (name, lr), of in found[method].items()
                if name == optimizer
            }
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
        ({}, {"optimizer": "muon", "lr": 5e-3}),
        ({"size": "60m"}, {"optimizer": "muon", "lr": 3.54e-3}),
        ({"optimizer": "adamw"}, {"optimizer": "adamw", "lr": 2.5e-3}),
        ({"lr": 1e-3}, {"optimizer": "muon", "lr": 1e-3}),
        ({"method": "cola-m", "optimizer": "adamw", "lr": 1e-3}, {"optimizer": "adamw", "lr": 1e-3}),
        ({"method": "cola+galore"}, {"optimizer": "adamw", "lr": 3e-3}),
        ({"method": "relora"}, {"optimizer": "adamw", "lr": 3e-3}),
        ({"gradient": "eggroll"}, {"optimizer": "adamw", "lr": 3e-3}),
        (
            {"optimizer.adamw.stochastic_rounding": True},
            {"optimizer": {"adamw": {"stochastic_rounding": True}}, "lr": 3e-3},
        ),
    ],
    ids=str,
)
def test_what_is_not_named_is_chosen(given: dict[str, Any], chosen: dict[str, Any]) -> None:
    recipe, words = with_best(Recipe().but(given), given)
    assert {name: getattr(recipe, name) for name in chosen} == chosen
    assert (words is None) == (recipe == Recipe().but(given))
