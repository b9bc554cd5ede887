"""Spectron against its equations, the bound on the product, the spectral norms it keeps, and what its parts are good for."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

import lorank
from lorank import Spectron
from lorank.optim.newton_schulz import newton_schulz
from lorank.optim.pairs import pairs
from lorank.optim.spectron import LARGEST, iterated_norm, leading, polar, radius
from tests.conftest import ARCHITECTURES


def factors(d_in: int = 20, d_out: int = 12, r: int = 4, *, seed: int = 0, scale: float = 1.0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: nn.Parameter(scale * torch.randn(*shape, generator=g, dtype=torch.float64))  # noqa: E731
    return [draw(r, d_in), draw(d_out, r)]


def made(pair: list[nn.Parameter], lr: float = 0.3, decay: float = 0.0, **settings: Any) -> Any:
    return Spectron(**settings).optimizer([{"params": pair, "rule": "spectron", "weight_decay": decay}], lr=lr)


def step(optimizer: Any, pair: list[nn.Parameter], seed: int) -> None:
    g = torch.Generator().manual_seed(1000 + seed)
    for W in pair:
        W.grad = torch.randn(W.shape, generator=g, dtype=torch.float64)
    optimizer.step()


def norm(W: Tensor) -> float:
    return torch.linalg.matrix_norm(W.detach(), 2).item()


def exact(W: Tensor) -> Tensor:
    return iterated_norm(W[None], leading(W[None]))[0]


def test_one_step_is_the_four_lines() -> None:
    pair = factors()
    A, B = (W.detach().clone() for W in pair)
    optimizer = made(pair, decay=0.1, orthonormalise="polar")
    step(optimizer, pair, 0)
    rho = 0.3 / (norm(A) + norm(B) + 1)
    for W, before in zip(pair, (A, B), strict=True):
        U, _, Vh = torch.linalg.svd(W.grad, full_matrices=False)
        torch.testing.assert_close(W.detach(), (1 - 0.03) * before - rho * U @ Vh, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[W]["momentum_buffer"], 0.05 * W.grad, rtol=1e-12, atol=1e-12)
    assert radius(0.3, torch.tensor(1.0), torch.tensor(2.0)) == pytest.approx(0.075)


def test_the_product_moves_by_lr_at_most() -> None:
    """200 random pairs; Newton-Schulz needs `bounded`, with which its largest value is 1."""
    g, worst = torch.Generator().manual_seed(0), {"polar": 0.0, "newton-schulz": 0.0}
    for seed in range(200):
        d_in, d_out = (int(20 + 180 * torch.rand((), generator=g)) for _ in range(2))
        r, scale = int(1 + 31 * torch.rand((), generator=g)), 10 ** (5 * torch.rand((), generator=g).item() - 3)
        for name in worst:
            pair = factors(d_in, d_out, min(r, d_in, d_out), seed=seed, scale=scale)
            before = (pair[1] @ pair[0]).detach()
            step(made(pair, orthonormalise=name, bounded=True), pair, seed)
            worst[name] = max(worst[name], norm(pair[1] @ pair[0] - before) / 0.3)
    assert 0.5 < worst["polar"] <= 1 + 1e-9 and worst["newton-schulz"] <= 1
    values = torch.logspace(-4, 0, 4001, dtype=torch.float64)
    assert newton_schulz(torch.diag(values[::10] / values[::10].norm())[None]).abs().max() <= LARGEST
    x, y, z = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        values = x * values + y * values**3 + z * values**5
    assert values.max().item() == pytest.approx(LARGEST, abs=2e-4)


def test_a_kept_vector_finds_the_spectral_norm() -> None:
    pair = factors(60, 40, 8)
    optimizer = made(pair)
    for t in range(20):
        step(optimizer, pair, t)
    for W in pair:
        sigma, _ = iterated_norm(W.detach()[None], optimizer.state[W]["u"][None])
        assert sigma.item() == pytest.approx(norm(W), rel=0.01)
        first = iterated_norm(W.detach()[None], leading(W.detach()[None]))[0]
        assert first.item() == pytest.approx(norm(W), rel=1e-9)


def test_the_norm_comes_from_the_kept_vector() -> None:
    """A power iteration from the second singular vector finds the second singular value."""
    pair = factors()
    optimizer = made(pair, orthonormalise="polar")
    step(optimizer, pair, 0)
    before, second = [W.detach().clone() for W in pair], 0.0
    for W in pair:
        U, S, _ = torch.linalg.svd(W.detach() if W.shape[0] < W.shape[1] else W.detach().T, full_matrices=False)
        optimizer.state[W]["u"] = U[:, 1].contiguous()
        second += S[1].item()
    step(optimizer, pair, 1)
    for W, start in zip(pair, before, strict=True):
        assert norm(W - start) == pytest.approx(0.3 / (second + 1), rel=1e-9)


def test_a_cold_start_breaks_the_bound_and_an_exact_one_does_not() -> None:
    """One iteration from a random vector makes σ too small, and the step too long."""
    worst = {"random": 0.0, "exact": 0.0}
    for seed in range(200):
        A, B = (W.detach() for W in factors(64, 64, 16, seed=seed))
        g = torch.Generator().manual_seed(seed)
        O_A, O_B = (polar(torch.randn(W.shape, generator=g, dtype=torch.float64)[None])[0] for W in (A, B))
        O_A, O_B = aligned(A, B) if seed % 2 else (O_A, O_B)
        random = [
            iterated_norm(W[None], nn.functional.normalize(torch.randn(1, 16, generator=g).double()))[0] for W in (A, B)
        ]
        for name, sigmas in (("random", random), ("exact", [exact(W) for W in (A, B)])):
            rho = radius(0.3, *sigmas).item()
            worst[name] = max(worst[name], norm((B + rho * O_B) @ (A + rho * O_A) - B @ A) / 0.3)
    assert worst["random"] > 1.05 and worst["exact"] <= 1 + 1e-9


def aligned(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal O_A and O_B with which both terms of the product's step add up."""
    (U, _, Vh), (X, _, Yh) = (torch.linalg.svd(W, full_matrices=False) for W in (A, B))
    return Yh.T @ Vh, X @ U.T  # B O_A has B's singular values, O_B A has A's, each along its largest first


@pytest.mark.parametrize(("sigma", "ratio"), [(0.1, 0.18), (1, 0.67), (10, 0.95), (100, 0.995)])
def test_small_factors_take_a_step_much_shorter_than_lr(sigma: float, ratio: float) -> None:
    """Along one aligned direction: ((σ + ρ)² - σ²) / lr."""
    A, B = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    A[0, 0] = B[0, 0] = sigma
    pair = [nn.Parameter(A.clone()), nn.Parameter(B.clone())]
    optimizer = made(pair, lr=0.01, orthonormalise="polar")
    for W, before in zip(pair, (A, B), strict=True):
        W.grad = -before
    optimizer.step()
    assert norm(pair[1] @ pair[0] - B @ A) / 0.01 == pytest.approx(ratio, abs=0.01)


def test_the_radius_goes_by_the_sum_of_both_norms() -> None:
    """So the step is another for (c A, B / c), though the product is the same."""
    moved = []
    for c in (1.0, 4.0):
        pair = factors()
        with torch.no_grad():
            pair[0].mul_(c)
            pair[1].div_(c)
        sigmas, before = [norm(W) for W in pair], pair[0].detach().clone()
        step(made(pair, orthonormalise="polar"), pair, 0)
        moved.append(norm(pair[0] - before))
        assert moved[-1] == pytest.approx(0.3 / (sum(sigmas) + 1), rel=1e-9)
    assert moved[1] < moved[0]


@pytest.mark.parametrize("orthonormalise", ["newton-schulz", "polar"])
def test_zero_factors_and_gradients_do_no_harm(orthonormalise: Any) -> None:
    pair = factors()
    nn.init.zeros_(pair[1])
    A = pair[0].detach().clone()
    optimizer = made(pair, orthonormalise=orthonormalise)
    for W in pair:
        W.grad = torch.zeros_like(W)
    optimizer.step()
    assert torch.equal(pair[0], A) and not pair[1].any()
    for t in range(5):
        step(optimizer, pair, t)
    assert all(W.isfinite().all() for W in pair)
    sigma, _ = iterated_norm(pair[1].detach()[None], optimizer.state[pair[1]]["u"][None])
    assert sigma.item() == pytest.approx(norm(pair[1]), rel=0.1), "the vector of a B of zeros finds its way"


def test_a_resumed_run_goes_on_bit_by_bit() -> None:
    whole, broken = factors(), factors()
    one, other = made(whole), made(broken)
    for t in range(6):
        step(one, whole, t)
    for t in range(3):
        step(other, broken, t)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    again = made(broken)
    again.load_state_dict(torch.load(file))
    for t in range(3, 6):
        step(again, broken, t)
    assert all(map(torch.equal, whole, broken))
    assert torch.equal(again.state[broken[0]]["u"], one.state[whole[0]]["u"])


def test_pairs_of_one_shape_move_as_each_alone() -> None:
    together = [W for seed in range(3) for W in factors(seed=seed)]
    apart = [factors(seed=seed) for seed in range(3)]
    one, others = made(together), [made(pair) for pair in apart]
    for t in range(3):
        for W, V in zip(together, (V for pair in apart for V in pair), strict=True):
            W.grad = torch.randn(W.shape, dtype=W.dtype, generator=torch.Generator().manual_seed(t))
            V.grad = W.grad.clone()
        one.step()
        for other in others:
            other.step()
    for W, V in zip(together, (V for pair in apart for V in pair), strict=True):
        torch.testing.assert_close(W, V, rtol=1e-12, atol=1e-12)


# ---- the ablation in miniature


def regression(seed: int, orthonormal: bool, renormalised: bool, lr: float = 4.0) -> float:
    """Mean loss of the last steps of a factorised regression with ill-conditioned inputs; infinite if it diverges."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    X = draw(256, 24) * torch.logspace(0, -1.5, 24, dtype=torch.float64)
    Y = X @ (draw(24, 6) @ draw(6, 16) / 24**0.5 * 4)
    A, B = 0.5 * draw(6, 24), 0.5 * draw(16, 6)
    M, losses = [torch.zeros_like(A), torch.zeros_like(B)], []
    for t in range(300):
        rate = lr * (1 - t / 300)
        E = X @ A.T @ B.T - Y
        losses.append(E.square().mean().item())
        if not losses[-1] < 1e6:
            return float("inf")
        G = [B.T @ E.T @ X / 256, E.T @ X @ A.T / 256]
        M = [0.95 * m + 0.05 * one for m, one in zip(M, G, strict=True)]
        steps = [polar(m[None])[0] if orthonormal else m for m in M]
        rho = radius(rate, *(exact(W) for W in (A, B))).item() if renormalised else rate
        A, B = A - rho * steps[0], B - rho * steps[1]
    return sum(losses[-10:]) / 10


def test_both_parts_are_better_than_either_and_plain_diverges() -> None:
    """The ordering of the paper's ablation, not its numbers, with a rate at which plain momentum diverges; five seeds."""
    for seed in range(5):
        plain, renormalised, orthonormal, both = (
            regression(seed, o, n) for o, n in ((False, False), (False, True), (True, False), (True, True))
        )
        assert both < renormalised < plain and both < orthonormal < plain, (
            seed,
            plain,
            renormalised,
            orthonormal,
            both,
        )
        assert both < 1.5e-3 < 5e-3 < renormalised < 0.03 < orthonormal, "the spread over seeds"


# ---- pairs of a model


@pytest.mark.parametrize("method", ["low-rank", "cola", "cola-m", "sltrain"])
def test_a_models_pairs_are_one_group(method: str) -> None:
    model = lorank.convert(ARCHITECTURES["llama"].dense(), method)
    optimizer = lorank.optimizer(model, Spectron(adamw_lr=1e-3), lr=0.05)
    first, *rest = optimizer.param_groups
    assert first["params"] == [W for pair in pairs(model) for W in (pair.A, pair.B)] and first["lr"] == 0.05
    assert {group["rule"] for group in rest} == {"adamw"} and {group["lr"] for group in rest} == {1e-3}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_matrices_in_no_pair_are_refused_by_name() -> None:
    dense = ARCHITECTURES["llama"].dense()
    with pytest.raises(
        ValueError, match="spectron moves pairs of factors, but the model has none; .* low-rank.spectron"
    ):
        lorank.optimizer(dense, Spectron(), lr=0.05)
    part = lorank.convert(dense, "cola", exclude="down_proj|o_proj")
    words = r"in none; set unpaired .*: model.layers.0.mlp.down_proj.weight, model.layers.0.self_attn.o_proj.weight, .* and 1 more"
    with pytest.raises(ValueError, match=words):
        lorank.optimizer(part, Spectron(), lr=0.05)
    made = lorank.optimizer(part, Spectron(unpaired="adamw"), lr=0.05)
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(part.parameters()))
    A, B = factors()
    for wrong, words in (([A], "got no B"), ([B, A], r"got \[12, 4\] and \[4, 20\]")):
        with pytest.raises(ValueError, match=f"must hold A .*, B .* in order, {words}"):
            made.add_param_group({"params": wrong, "rule": "spectron"})


@pytest.mark.filterwarnings("ignore:low-rank leaves .* dense, experts")
def test_what_could_not_be_factors_is_adamws() -> None:
    """A head's own layer (BERT), what leads to the blocks (OPT), and routers (Mixtral)."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 24}
    bert = BertForMaskedLM(BertConfig(**small, intermediate_size=32))
    opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=32, word_embed_proj_dim=8))
    mixtral = MixtralForCausalLM(
        MixtralConfig(**small, intermediate_size=32, num_key_value_heads=1, num_local_experts=2)
    )
    for model, name in (
        (bert, "cls.predictions.transform.dense"),
        (opt, "model.decoder.project_in"),
        (mixtral, "model.layers.0.mlp.gate"),
    ):
        made = lorank.optimizer(lorank.convert(model, "low-rank"), "spectron", lr=0.05)
        rules = {p: group["rule"] for group in made.param_groups for p in group["params"]}
        assert rules[model.get_submodule(name).weight] == "adamw" and len(rules) == len(list(model.parameters()))


def test_one_factor_without_a_gradient_keeps_its_momentum() -> None:
    pair = factors()
    optimizer = made(pair)
    step(optimizer, pair, 0)
    before = pair[1].detach().clone()
    pair[1].grad = None
    optimizer.step()
    assert not torch.equal(pair[1], before)
    assert torch.isfinite(pair[1]).all()
