"""LORO's exact step against the truncated SVD, its invariance, its schedule, and what begins anew."""

import io
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lorank
from lorank import LORO
from lorank.layers import LowRankLinear
from lorank.optim.loro import adam, initialise, preconditioned, retracted, xavier_stds
from lorank.optim.pairs import pairs
from lorank.optim.rule import Forgetful
from lorank.optim.schedules import restarted_cosine
from lorank.train.methods import schedule_of
from lorank.train.recipe import Recipe
from tests.conftest import ARCHITECTURES

SHAPES = [(20, 12, 4), (12, 20, 4), (20, 6, 4), (5, 5, 5), (30, 30, 1)]


def drawn(d_in: int, d_out: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and a gradient of W."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(r, d_in), draw(d_out, r), draw(d_out, d_in)


def truncated(W: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def exact(A: Tensor, B: Tensor, D_A: Tensor, D_B: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    new_A, new_B, there = retracted(A[None], B[None], D_A[None], D_B[None], lr)
    assert there.all()
    return new_A[0], new_B[0]


@pytest.mark.parametrize(("d_in", "d_out", "r"), SHAPES)
def test_an_exact_step_is_the_truncated_projected_gradient_step(d_in: int, d_out: int, r: int) -> None:
    A, B, G = drawn(d_in, d_out, r)
    U, V = torch.linalg.svd(B, full_matrices=False).U, torch.linalg.svd(A, full_matrices=False).Vh.T
    left, right = U @ U.T, V @ V.T
    projected = left @ G + G @ right - left @ G @ right
    new_A, new_B = exact(A, B, B.T @ G, G @ A.T, 0.3)
    torch.testing.assert_close(new_B @ new_A, truncated(B @ A - 0.3 * projected, r), rtol=1e-10, atol=1e-10)
    gram = new_A @ new_A.T
    torch.testing.assert_close(gram, new_B.T @ new_B, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=1e-10, atol=1e-10)


def test_without_a_rate_the_product_stays() -> None:
    A, B, G = drawn(20, 12, 4)
    new_A, new_B = exact(A, B, B.T @ G, G @ A.T, 0.0)
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new_A @ new_A.T, new_B.T @ new_B, rtol=1e-12, atol=1e-12)


def test_gradients_make_it_invariant_and_adams_directions_do_not() -> None:
    """Under C A and B C⁻¹. The paper's own variant fails; so does a plain step of the factors."""
    A, B, G = drawn(20, 12, 4)
    C = torch.eye(4, dtype=torch.float64) + 0.3 * drawn(4, 4, 4, seed=1)[0]
    other = C @ A, torch.linalg.solve(C.T, B.T).T
    sign = lambda g: adam(g[None], fresh(g[None]), {"betas": (0.9, 0.999), "eps": 1e-6})[0][0]  # noqa: E731
    found: dict[str, list[Tensor]] = {"gradient": [], "adam": [], "plain": [], "between": []}
    for a, b in ((A, B), other):
        g_A, g_B = b.T @ G, G @ a.T
        for name, (D_A, D_B) in (("gradient", (g_A, g_B)), ("adam", (sign(g_A), sign(g_B)))):
            new_A, new_B = exact(a, b, D_A, D_B, 0.1)
            found[name].append(new_B @ new_A)
        found["plain"].append((b - 0.1 * g_B) @ (a - 0.1 * g_A))
        cheap_A, cheap_B = preconditioned(a, b, g_A, g_B)
        found["between"].append((b - 0.1 * cheap_B) @ (a - 0.1 * cheap_A))
    off = {name: ((one - two).norm() / one.norm()).item() for name, (one, two) in found.items()}
    assert off["gradient"] < 1e-10 and off["between"] < 1e-10
    assert off["adam"] > 1e-3 and off["plain"] > 1e-3


def fresh(g: Tensor) -> dict[str, Tensor]:
    return {"exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g), "step": torch.zeros(())}


def test_the_start_is_xaviers() -> None:
    expected = {
        (512, 512, 128): (0.0559, 0.0559, 0.0353),
        (512, 1376, 128): (0.0559, 0.0365, 0.0231),
        (2048, 5461, 512): (0.0280, 0.0183, 0.0116),
    }
    for (d_in, d_out, r), (a, b, product) in expected.items():
        A, B = xavier_stds(d_in, d_out, r)
        assert (A, B, r**0.5 * A * B) == pytest.approx((a, b, product), abs=6e-5)
    layer = LowRankLinear(512, 512, 128)
    initialise(layer, torch.Generator().manual_seed(0))
    assert layer.A.weight.std().item() == pytest.approx(0.0559, rel=0.02)


def test_the_schedule_has_the_authors_multipliers() -> None:
    recipe = Recipe(method="low-rank+loro", size="60m", steps=10_000, warmup_steps=1_000, min_lr_ratio=0.1)
    at = schedule_of(recipe)
    printed = {0: 0.1, 1: 0.10087, 499: 0.534, 500: 1e-6, 505: 0.539, 999: 0.969, 1000: 0.973, 1500: 1e-6}
    printed |= {1505: 0.9933, 2005: 1.0, 5005: 0.774, 9999: 0.127}
    assert {step: at(step) for step in printed} == pytest.approx(printed, abs=1e-3)
    assert LORO(update_gap=None).schedule(100, 10, 0.1) is None
    later = dict(steps=60_000, warmup=2_000, min_lr_ratio=0.1, every=500, restart=5)
    late = lorank.LORO(**LORO.published["350m"]).schedule(60_000, 2_000, 0.1)
    assert late is not None and late(30_007) == restarted_cosine(30_007, **later, late=6_000) != restarted_cosine(
        30_007, **later, late=2_000
    )  # type: ignore[arg-type]


# ---- the optimizer


def made(pair: list[nn.Parameter], *, scaler: float = 1.0, lr: float = 0.1, eps: float = 1e-6, **settings: Any) -> Any:
    group = {"params": pair, "rule": "loro", "scaler": scaler}
    return LORO(**settings).optimizer([group], lr=lr, betas=(0.9, 0.999), eps=eps)


def factors(d_in: int, d_out: int, r: int) -> list[nn.Parameter]:
    A, B, _ = drawn(d_in, d_out, r)
    return [nn.Parameter(A), nn.Parameter(B)]


def step(optimizer: Any, pair: list[nn.Parameter], seed: int) -> Tensor:
    G = drawn(pair[0].shape[1], pair[1].shape[0], 1, seed=100 + seed)[2]
    pair[0].grad, pair[1].grad = (pair[1].T @ G).detach(), (G @ pair[0].T).detach()
    optimizer.step()
    return G


def test_adams_steps_between_and_the_exact_one_after() -> None:
    """By hand: c only between, ε after the root, the bias correction in lr, and moments that begin anew."""
    pair = factors(20, 12, 4)
    optimizer = made(pair, scaler=0.25, update_gap=3)
    (A, B), M, V = (W.detach().clone() for W in pair), [0.0, 0.0], [0.0, 0.0]
    for t in range(4):
        G = step(optimizer, pair, t)
        if t == 3:
            M, V = [0.0, 0.0], [0.0, 0.0]
        n = t % 3 + 1
        grads = (B.T @ G, G @ A.T)
        M = [0.9 * m + 0.1 * g for m, g in zip(M, grads, strict=True)]
        V = [0.999 * v + 0.001 * g * g for v, g in zip(V, grads, strict=True)]
        D = [m / (v**0.5 + 1e-6) for m, v in zip(M, V, strict=True)]
        lr = 0.1 * (1 - 0.999**n) ** 0.5 / (1 - 0.9**n)
        A, B = exact(A, B, D[0], D[1], lr) if t == 2 else (A - lr * 0.25 * D[0], B - lr * 0.25 * D[1])
        torch.testing.assert_close(pair[1] @ pair[0], B @ A, rtol=1e-9, atol=1e-9)


def test_weight_decay_does_not_know_the_scaler() -> None:
    pair = factors(20, 12, 4)
    before = [W.detach().clone() for W in pair]
    optimizer = LORO().optimizer([{"params": pair, "rule": "loro", "scaler": 0.25, "weight_decay": 0.1}], lr=0.1)
    for W in pair:
        W.grad = torch.zeros_like(W)
    optimizer.step()
    for W, start in zip(pair, before, strict=True):
        torch.testing.assert_close(W.detach(), (1 - 0.1 * 0.1) * start, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("refresh", ["all", "factors", "none"])
def test_moments_begin_anew_after_an_exact_step(refresh: Any) -> None:
    model = lorank.convert(ARCHITECTURES["llama"].dense(), "low-rank")
    optimizer: Any = lorank.optimizer(model, LORO(update_gap=2, refresh=refresh), lr=0.01)
    factored = {W for pair in pairs(model) for W in (pair.A, pair.B)}
    for t in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in model.parameters():
            state = optimizer.state[p]
            empty = not (state["exp_avg"].any() or state["exp_avg_sq"].any() or state["step"])
            assert empty == (t == 1 and (refresh == "all" or (refresh == "factors" and p in factored)))
            assert state["steps"] == t + 1


@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize("direction", ["adam", "gradient"])
def test_every_step_or_none_may_be_exact(every: int | None, direction: Any) -> None:
    pair = factors(20, 12, 4)
    optimizer = made(pair, update_gap=every, direction=direction, lr=0.01)
    for t in range(5):
        step(optimizer, pair, t)
    A, B = (W.detach() for W in pair)
    assert A.isfinite().all() and B.isfinite().all()
    assert torch.allclose(A @ A.T, B.T @ B) == (every == 1), "balanced after an exact step"


def test_it_reaches_a_minimiser_of_rank_r() -> None:
    """Of ‖W - W₀‖² / 2 with gradients, and an exact step in twenty."""
    target = truncated(drawn(20, 12, 4, seed=5)[2], 4)
    pair = factors(20, 12, 4)
    optimizer = made(pair, update_gap=20, direction="gradient", lr=0.5)
    for _ in range(200):
        G = (pair[1] @ pair[0] - target).detach()
        pair[0].grad, pair[1].grad = (pair[1].T @ G).detach(), (G @ pair[0].T).detach()
        optimizer.step()
    assert (pair[1] @ pair[0] - target).norm() < 1e-6 * target.norm()


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_resumed_run_crosses_an_exact_step_alike(stop: int) -> None:
    whole, broken = factors(20, 12, 4), factors(20, 12, 4)
    one, other, later = made(whole, update_gap=3), made(broken, update_gap=3), made(broken, update_gap=3)
    for t in range(6):
        step(one, whole, t)
    for t in range(stop):
        step(other, broken, t)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    later.load_state_dict(torch.load(file))
    for t in range(stop, 6):
        step(later, broken, t)
    assert torch.equal(whole[1] @ whole[0], broken[1] @ broken[0])


def test_a_pair_of_a_lower_rank_takes_the_other_step(caplog: pytest.LogCaptureFixture) -> None:
    pair = factors(20, 12, 4)
    nn.init.zeros_(pair[1])
    optimizer = made(pair, update_gap=1)
    with caplog.at_level(logging.WARNING):
        step(optimizer, pair, 0)
    assert "1 of 1 pairs of A [4, 20] took no exact step" in caplog.text
    assert all(W.isfinite().all() for W in pair) and pair[1].any()


def test_products_of_an_exact_step_are_those_of_the_counter() -> None:
    pair = factors(20, 12, 4)
    optimizer = made(pair, update_gap=1)
    for W in pair:
        W.grad = torch.randn_like(W)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    group = optimizer.param_groups[0]
    assert counter.get_total_flops() == sum(optimizer.method.step_flops(W, group) for W in pair)
    assert LORO(update_gap=500, direction="gradient").state_bytes(pair[0], group) == 0


def test_only_linear_factors_alone_will_do() -> None:
    with pytest.raises(ValueError, match="loro moves pairs of factors, but the model has none; .*low-rank.loro"):
        lorank.optimizer(ARCHITECTURES["llama"].dense(), "loro", lr=0.01)
    for method, kind in (
        ("cola", "CoLALinear"),
        ("crnet", "CRNetLinear"),
        ("sltrain", "SLTrainLinear"),
        ("relora", "ReLoRALinear"),
    ):
        model = lorank.convert(ARCHITECTURES["llama"].dense(), method)
        with pytest.raises(ValueError, match=rf"loro needs layers W = B A, .* model.layers.\d.*, a {kind}"):
            lorank.optimizer(model, "loro", lr=0.01)
    model = lorank.convert(ARCHITECTURES["gpt2"].dense(), lorank.LowRank(rank=4))
    first = lorank.optimizer(model, "loro", lr=0.01).param_groups[0]
    assert first["scaler"] == 4 / model.config.hidden_size
    assert isinstance(LORO().rules["adamw"], Forgetful)
