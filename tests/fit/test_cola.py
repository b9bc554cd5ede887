"""A CoLA fitted to a dense model: its linear start, its regression, and the model that comes out."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lorank import CoLA, LowRank
from lorank.fit import FittedCoLA, fit
from lorank.fit.cola import least_squares, linear_start, regress
from lorank.fit.structure import Metric


def case(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(400, 12, generator=generator) * torch.linspace(3, 0.1, 12)
    return torch.randn(10, 12, generator=generator), X


def metric_of(X: Tensor) -> Metric:
    return Metric(torch.linalg.cholesky(X.T.double() @ X.double()), X)


def test_a_narrow_start_is_the_best_linear_map() -> None:
    W, X = case()
    tail = torch.linalg.svdvals(X.double() @ W.T.double())[4:].square().sum().sqrt()
    errors = []
    for reach in (1e-2, 1.0):
        A, B = linear_start(W, metric_of(X), 4, reach)
        torch.testing.assert_close((X @ A.T).square().mean(0).sqrt(), torch.full((4,), reach))
        errors.append((X @ W.T - F.silu(X @ A.T) @ B.T).norm().double())
    torch.testing.assert_close(errors[0], tail, rtol=1e-2, atol=0)
    assert errors[0] >= tail * (1 - 1e-4) and errors[1] > 1.05 * tail


def test_least_squares_leaves_a_rest_without_the_bottleneck() -> None:
    W, X = case()
    Z = F.silu(X[:, :4])
    rest = X.double() @ W.T.double() - Z.double() @ least_squares(Z, X @ W.T).T
    assert (Z.double().T @ rest).abs().max() < 1e-3 * Z.norm()


def test_the_regression_finds_a_bottleneck_from_nearby() -> None:
    """A function that a CoLA can compute, from factors beside its own."""
    _, X = case()
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(4, 12, generator=generator) / 4, torch.randn(10, 4, generator=generator)
    Y = F.silu(X @ A.T) @ B.T
    beside = A + 0.05 * torch.randn(4, 12, generator=generator)
    start = least_squares(F.silu(X @ beside.T), Y).float()
    before = (F.silu(X @ beside.T) @ start.T - Y).norm()
    found = regress(X, Y, beside, start, 200)
    assert (F.silu(X @ found[0].T) @ found[1].T - Y).norm() < 0.2 * before


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_dense_model_becomes_a_cola(small: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    dense = small(kind)
    data = [torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    errors: dict[int, list[float]] = {}
    for steps in (0, 40):
        seen: list[Any] = []
        model = fit(copy.deepcopy(dense), FittedCoLA(steps=steps), data, budget=0.7, see=seen.append)
        errors[steps] = [one.output_error for one in seen if ".0." in one.name]  # of the same inputs
        assert all(one.weight_error is None for one in seen)
    assert all(new <= old for old, new in zip(errors[0], errors[40], strict=True))
    assert sum(errors[40]) < 0.95 * sum(errors[0])
    wanted = model(data[0]).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(data[0]).logits, wanted) and loaded.config.lorank["method"] == "cola"
    with pytest.raises(ValueError, match="data must be given with cola"):
        fit(dense, "cola")


@pytest.mark.parametrize("rank", [8, 32, 40])
def test_more_factors_than_a_matrix_has_change_nothing(small: Callable[..., Any], rank: int) -> None:
    """k and v have 16 rows here. Low-rank layers are then the dense ones; the rest of a CoLA's A stays as drawn, for training."""
    dense = small("llama")
    data = [torch.randint(3, 96, (8, 20), generator=torch.Generator().manual_seed(5))]
    k = dense.model.layers[0].self_attn.k_proj.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that factors are no smaller
        model = fit(copy.deepcopy(dense), "svd", data, becomes=LowRank(rank=rank), targets=["k_proj"])
        fitted = fit(copy.deepcopy(dense), "cola", data, becomes=CoLA(rank=rank), targets=["k_proj"])
    layer = model.model.layers[0].self_attn.k_proj
    found = layer.B.weight @ layer.A.weight
    assert (found - k).norm() < 1e-5 * k.norm() if rank >= len(k) else (found - k).norm() > 0.1 * k.norm()
    layer = fitted.model.layers[0].self_attn.k_proj
    assert layer.A.weight.shape == (rank, 32) and bool(layer.A.weight.all(1).any())
    assert not layer.B.weight[:, len(k) :].any() and layer.A.weight[len(k) :].abs().sum(1).gt(0).all()
