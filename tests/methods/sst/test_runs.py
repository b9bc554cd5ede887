"""SST: its schedule, resuming, precision, merging, other optimizers, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

import lorank
from lorank import SST, Site, convert, merge, step_hook
from lorank.moments import moments
from tests.methods.sst.conftest import SHAPES, SHORT, layers_of, numbers, prepared, product, train

# ---- schedule


def test_the_schedule_rises_at_each_further_iteration() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    usual = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 7, 100, min_lr_rate=0.1).lr_lambdas[0]
    found = SST(interval=20, restart_warmup_steps=4).schedule(100, 7, 0.1)
    for step in range(101):
        rise = {0: 0.25, 1: 0.5, 2: 0.75}.get(step % 20, 1.0) if step >= 20 else 1.0
        assert found(step) == pytest.approx(rise * usual(step), abs=1e-12)
    plain = SST(interval=20, restart_warmup_steps=0).schedule(100, 0, 0.1)
    assert [plain(step) for step in (0, 20, 100)] == pytest.approx([1.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 5)), 0.1])


# ---- resuming, precision, merging


def test_draws_follow_the_runs_seed_the_first_the_methods(small: Callable[..., Any], tokens: Tensor) -> None:
    def after(steps: int, **options: Any) -> list[list[int]]:
        model, optimizer, _ = prepared(small, **options)
        train(model, optimizer, tokens, range(steps))
        return [layer.index.tolist() for layer in layers_of(model)]

    assert after(0, seed=3) == after(0, seed=4) != after(0, rank=0.25)
    model = convert(small("llama"), SST(**SHORT, seed=1))
    assert [layer.index.tolist() for layer in layers_of(model)] != after(0)
    assert after(3) == after(3) != after(3, seed=4)


def test_in_bfloat16_vectors_keep_their_length(small: Callable[..., Any], tokens: Tensor) -> None:
    model = convert(small("llama").bfloat16(), SST(**SHORT)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step_hook(model, optimizer, steps=8)
    for step in range(5):
        train(model, optimizer, tokens, range(step, step + 1))
        for layer in layers_of(model):
            lengths = torch.cat([layer.U_active, layer.V_active]).float().pow(2).sum(0) / 2
            torch.testing.assert_close(lengths, torch.ones(layer.rank), rtol=0, atol=0.01)
            assert (layer.S >= 0).all()
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("d_in, d_out", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_merged_it_is_u_s_v_with_the_bias(d_in: int, d_out: int, bias: bool) -> None:
    layer: Any = SST(rank=5).build(Site("l.0.q", "l.*.q", 0, nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)))
    weight, b = SST(rank=5).merged(layer)
    torch.testing.assert_close(weight, product(layer), rtol=1e-12, atol=1e-12)
    assert (b is None) != bias
    x = numbers(3, d_in)
    torch.testing.assert_close(F.linear(x, weight, b), layer(x), rtol=1e-12, atol=1e-12)


def test_converted_trained_and_merged_the_model_says_the_same(small: Callable[..., Any], tokens: Tensor) -> None:
    model, optimizer, _ = prepared(small)
    train(model, optimizer, tokens, range(5))
    torch.testing.assert_close(merge(model)(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


# ---- refusals


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": 0}, "rank must be a positive integer, .* got 0"),
        ({"interval": 0}, "interval must be a positive integer, got 0"),
        ({"exploration": 1.5}, "exploration must be a number from 0 to 1, got 1.5"),
        ({"iterations_per_round": 0}, "iterations_per_round must be a positive integer.*, got 0"),
        ({"normalise": "no"}, "normalise must be .* got 'no'"),
        ({"interval": 2.5}, "interval must be a positive integer, got 2.5"),
        ({"restart_warmup_steps": -1}, "restart_warmup_steps must be an integer of at least 0, got -1"),
        ({"interval": 10}, "restart_warmup_steps must be at most interval=10, .* got 20"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SST(**fields)


@pytest.mark.parametrize(
    "rank, message",
    [
        (
            17,
            r"rank must be at most 16, the number of singular values of model.layers.\*.self_attn.k_proj, got 17; lower it or use a table",
        ),
        ({"mlp": 0.25}, "must have a pattern for model.layers.0.self_attn.q_proj"),
        ({".*": 0.25, "mlp": 4}, "'mlp' decides nothing"),
    ],
)
def test_ranks_that_do_not_fit_leave_the_model_dense(rank: Any, message: str, small: Callable[..., Any]) -> None:
    model = small("llama")
    with pytest.raises(ValueError, match=message):
        convert(model, SST(rank=rank))
    assert type(model) is type(small("llama")) and not layers_of(model)


def test_at_full_rank_no_warning_speaks_of_factors(small: Callable[..., Any]) -> None:
    model = convert(small("llama"), SST(rank={"k_proj|v_proj": 16, ".*": 32}))
    assert all(layer.U_frozen.numel() == 0 for layer in layers_of(model))


@pytest.mark.parametrize("optimizer", ["muon", "adafactor", "adamw"])
def test_any_optimizer_restarts_with_the_pairs(optimizer: str, small: Callable[..., Any], tokens: Tensor) -> None:
    model = convert(small("llama"), SST(**SHORT)).train()
    moving = lorank.optimizer(model, optimizer, lr=1e-2)
    step_hook(model, moving, steps=8)
    layers = layers_of(model)
    train(model, moving, tokens, range(1))
    assert all(any(m.any() for m in moments(moving, layer.U_active)) for layer in layers)
    train(model, moving, tokens, range(1, 2))  # other pairs
    for layer in layers:
        for p in (layer.U_active, layer.V_active):
            assert not any(moment.any() for moment in moments(moving, p))
            assert int(moving.state[p].get("step", 0)) == 0
        assert any(moment.any() for moment in moments(moving, layer.S))
    train(model, moving, tokens, range(2, 4))  # other pairs and a new SVD
    assert not any(moment.any() for layer in layers for moment in moments(moving, layer.S))
    before = [layer.U_active.detach().clone() for layer in layers]
    train(model, moving, tokens, range(4, 5))
    assert not any(torch.equal(layer.U_active, U) for layer, U in zip(layers, before, strict=True))


def test_projecting_optimizers_find_no_linear_layer(small: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="no linear layer whose gradient could be projected"):
        lorank.optimizer(convert(small("llama"), SST()), "galore", lr=1e-2)
