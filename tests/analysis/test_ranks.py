"""Suggested ranks fit their budget, and no others of that cost lose much less."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lorank
from lorank.analysis import analyze, suggest_ranks
from lorank.analysis.ranks import read_budget
from lorank.method import check_table, rank_at
from lorank.sites import find_sites
from tests.conftest import ARCHITECTURES, VOCABULARY


def projections(layers: int = 8, width: int = 512) -> list[dict[str, Any]]:
    """As `Analysis.to_dict` gives them, with spectra that fall off at a different rate at each depth."""
    return [
        {
            "name": f"model.layers.{depth}.{inner}",
            "role": f"model.layers.*.{inner}",
            "depth": depth,
            "d_in": d_in,
            "d_out": d_out,
            "output": {"singular_values": [math.exp(-i / (5 + 3 * depth + 7 * k)) for i in range(d_out)]},
        }
        for depth in range(layers)
        for k, (inner, d_in, d_out) in enumerate((("q_proj", width, width), ("up_proj", width, 3 * width)))
    ]


@pytest.mark.parametrize("budget", ["0.5", "0.1", "0.9", "1M", "3_000_000"])
def test_a_budget_is_met_within_a_percent(budget: str) -> None:
    found = suggest_ranks(projections(), budget)
    wanted = read_budget(budget, found.dense_parameters)
    assert 0.99 * wanted <= found.parameters <= wanted
    spent = sum(found.ranks[one["name"]] * (one["d_in"] + one["d_out"]) for one in projections())
    assert spent == found.parameters
    for one in projections():
        assert 1 <= found.ranks[one["name"]] < one["d_in"] * one["d_out"] / (one["d_in"] + one["d_out"])


def lost(spectra: list[Tensor], ranks: tuple[int, ...]) -> float:
    """Mean part of the energy that is beyond so many singular values."""
    return float(
        torch.stack([s[r:].square().sum() / s.square().sum() for s, r in zip(spectra, ranks, strict=True)]).mean()
    )


@pytest.mark.parametrize("seed", range(4))
def test_no_ranks_of_a_budget_lose_less(seed: int) -> None:
    """All ranks of four small projections: the loss is within one rank's gain of the least, and mostly the least."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 12), (12, 6), (12, 12), (8, 8)]
    spectra = [torch.rand(d_out, generator=generator).pow(3).sort(descending=True).values for _, d_out in shapes]
    given = [
        {
            "name": f"h.0.{k}",
            "role": f"h.*.{k}",
            "depth": 0,
            "d_in": a,
            "d_out": b,
            "output": {"singular_values": s.tolist()},
        }
        for k, ((a, b), s) in enumerate(zip(shapes, spectra, strict=True))
    ]
    tried = [
        (sum(rank * (a + b) for rank, (a, b) in zip(ranks, shapes, strict=True)), lost(spectra, ranks))
        for ranks in itertools.product(range(1, 4), range(1, 4), range(1, 6), range(1, 4))
    ]
    exact = 0
    for budget in range(min(tried)[0], max(tried)[0] + 1):
        found = suggest_ranks(given, str(budget))
        least = min(loss for cost, loss in tried if cost <= budget)
        gain = max(
            float(s[r].square() / s.square().sum()) / 4 for s, r in zip(spectra, found.ranks.values(), strict=True)
        )
        assert found.parameters <= budget and found.lost["mean"] == pytest.approx(
            lost(spectra, tuple(found.ranks.values()))
        )
        assert least - 1e-6 <= found.lost["mean"] <= min(least + gain, found.uniform_lost["mean"]) + 1e-6
        exact += found.lost["mean"] < least + 1e-6
    assert exact > 0.7 * (max(tried)[0] - min(tried)[0])


@pytest.mark.parametrize("budget", ["0.3", "0.7"])
def test_suggested_ranks_lose_less_than_a_uniform_rank(budget: str) -> None:
    found = suggest_ranks(projections(), budget)
    price = [one["d_in"] + one["d_out"] for one in projections()]
    assert 0 <= read_budget(budget, found.dense_parameters) / sum(price) - found.uniform_rank < 1
    spectra = [torch.tensor(one["output"]["singular_values"]) for one in projections()]
    same = lost(spectra, (found.uniform_rank,) * len(spectra))
    more = lost(spectra, (found.uniform_rank + 1,) * len(spectra))
    assert found.lost["mean"] < more <= found.uniform_lost["mean"] <= same


def test_the_table_gives_every_projection_its_rank() -> None:
    model = ARCHITECTURES["gpt2"].dense(n_layer=11)
    listed = analyze(model, [{"input_ids": torch.randint(3, VOCABULARY, (2, 40))}], gradient_batches=0).to_dict()
    found = suggest_ranks(listed["projections"], "0.6")
    sites = find_sites(model)
    check_table(found.table, sites)
    assert {site.name: rank_at(found.table, site) for site in sites} == found.ranks
    lorank.convert(model, lorank.CoLA(rank=found.table))


@pytest.mark.parametrize("budget", ["0.9999", "3", "1e4", "a lot", "0", "5T", "-1"])
def test_a_budget_that_cannot_be_met_is_refused(budget: str) -> None:
    with pytest.raises(ValueError, match="^budget must be"):
        suggest_ranks(projections(), budget)
