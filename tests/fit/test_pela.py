"""PELA's sizes, and its two terms where their values are known."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorank
import lorank.factors
import lorank.sites
from lorank.fit import PELA, SVD, fit
from lorank.fit.budget import choose_ranks
from lorank.fit.pela import features, perturbation
from lorank.method import Site


def states(model: Any, tokens: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = model(input_ids=tokens, output_hidden_states=True).hidden_states[1:]
    return found


def test_a_third_is_kept() -> None:
    square = Site("layers.0.w", "layers.*.w", 0, nn.Linear(768, 768, bias=False, device="meta"))
    assert choose_ranks(PELA(), [square], PELA.usual, "uniform", dict) == {square.name: 128}
    assert PELA().parameters(128, 768, 768) == 196_608


def test_the_terms_of_a_student(small: Callable[..., Any], tokens: Tensor) -> None:
    """Of all ranks it is the teacher, so that features are zero, and their gradient."""
    dense = small("gpt2").double()
    same = copy.deepcopy(dense)
    with pytest.warns(UserWarning, match="not smaller"):
        lorank.convert(same, lorank.LowRank(rank=32))
    whole = fit(copy.deepcopy(dense), SVD(), budget=0.5)
    names = [name for name, layer in whole.named_modules() if type(layer).__name__ == "LowRankLinear"]
    weights = {site.name: site.linear for site in lorank.sites.find_sites(dense)}
    for name in names:
        layer, W = same.get_submodule(name), weights[name].weight.detach()
        B, A = lorank.factors.nearest(W, 32)
        layer.B.weight.data, layer.A.weight.data, layer.B.bias.data = B, A, weights[name].bias.detach().clone()
    loss = features(states(same, tokens), states(dense, tokens))
    loss.backward()
    assert loss < 1e-24
    assert max(p.grad.abs().max() for p in same.parameters() if p.grad is not None) < 1e-10
    apart = features(states(whole, tokens), states(dense, tokens))
    by_hand = [(a - b).square().mean() for a, b in zip(states(whole, tokens), states(dense, tokens), strict=True)]
    torch.testing.assert_close(apart, sum(by_hand) / len(by_hand))
    apart.backward()
    assert all(p.grad is None for p in dense.parameters())

    torch.testing.assert_close(perturbation(same, dense, 0.5), torch.tensor(0.25, dtype=torch.float64))
    largest = [
        (whole.get_submodule(n).B.weight @ whole.get_submodule(n).A.weight - weights[n].weight).abs().max()
        for n in names
    ]
    expected = sum((one - 1e-3) ** 2 for one in largest) / len(largest)
    torch.testing.assert_close(perturbation(whole, dense), expected)
    only = copy.deepcopy(whole)
    for name in names[1:]:
        only.set_submodule(name, weights[name])
    assert perturbation(only, dense, largest[0].item()) == 0


def test_terms_need_a_student_and_its_parent(small: Callable[..., Any]) -> None:
    dense = small("gpt2")
    with pytest.raises(ValueError, match="model must have factors"):
        perturbation(dense, dense)
    with pytest.raises(ValueError, match="parent must be the dense model"):
        perturbation(fit(small("llama"), "pela"), dense)
    with pytest.raises(ValueError, match="features must be outputs of the same blocks"):
        features([torch.zeros(1)], [])
