"""What clients send: sparse, and private."""

import math

import pytest
import torch
from torch import Tensor, nn

from lorank.federated import private, sparse
from lorank.federated.private import clipped_sum, epsilon, noise_for, per_sample, private_gradient

TENSORS = {"b": torch.tensor([[3.0, -1.0], [0.0, 1.0]]), "a": torch.tensor([1.0, -5.0, 2.0])}
"""End to end, by name: 1 -5 2 | 3 -1 0 1."""


# ---- sparse


@pytest.mark.parametrize(("density", "places"), [(0.15, [1]), (3 / 7, [1, 2, 3]), (5 / 7, [0, 1, 2, 3, 4])])
def test_the_largest_numbers_are_kept_the_first_of_equals(density: float, places: list[int]) -> None:
    numbers = torch.cat([TENSORS["a"], TENSORS["b"].flatten()])
    assert sparse.kept(numbers, density).tolist() == places
    payload = sparse.packed(TENSORS, density)
    back = sparse.unpacked(payload, TENSORS)
    wanted = torch.zeros(7).index_copy(0, torch.tensor(places), numbers[places])
    torch.testing.assert_close(torch.cat([back["a"], back["b"].flatten()]), wanted)
    count = len(places)
    assert sparse.payload_bytes(payload) == min(count * (4 + 4), 7 * 4), "no saving above a density of 1/2"


def test_all_of_them_are_what_they_were() -> None:
    payload = sparse.packed(TENSORS, 1.0)
    assert all(torch.equal(payload[name], TENSORS[name]) for name in TENSORS)
    assert sparse.unpacked(payload, TENSORS).keys() == TENSORS.keys()
    assert len(sparse.kept(torch.ones(30), 0.1)) == 3, "0.1 * 30 is 3"
    delta = sparse.change({"a": TENSORS["a"] + 1}, TENSORS)
    torch.testing.assert_close(sparse.changed(TENSORS, delta)["a"], TENSORS["a"] + 1)


def test_what_does_not_fit_is_refused() -> None:
    for places, words in (([0, 0], "all different"), ([0, 7], "below 7, got 7")):
        payload = {sparse.VALUES: torch.ones(2), sparse.PLACES: torch.tensor(places, dtype=torch.int32)}
        with pytest.raises(ValueError, match=words):
            sparse.unpacked(payload, TENSORS)
    with pytest.raises(ValueError, match="density must be above 0 and at most 1, got 0"):
        sparse.packed(TENSORS, 0)


# ---- private


def test_a_sample_counts_at_most_the_bound() -> None:
    g = [torch.randn(5, 3, 2, dtype=torch.float64) * 4, torch.randn(5, 7, dtype=torch.float64)]
    for i in range(5):
        one = clipped_sum([each[i : i + 1] for each in g], 0.5)
        assert torch.cat([each.flatten() for each in one]).norm() <= 0.5 + 1e-12
    small = [1e-3 * each for each in g]
    for found, wanted in zip(clipped_sum(small, 0.5), small, strict=True):
        torch.testing.assert_close(found, wanted.sum(0), rtol=1e-12, atol=0)
    plain = private_gradient(g, math.inf, 0.0, 5, torch.Generator())
    torch.testing.assert_close(plain[0], g[0].mean(0))  # σ = 0, C = ∞: federated averaging


def test_noise_has_the_variance_that_was_asked_for() -> None:
    """Also in a step for which no sample was drawn."""
    nothing = [torch.zeros(0, 300, 200, dtype=torch.float64)]
    (noise,) = private_gradient(nothing, 0.5, 2.0, 4.0, torch.Generator().manual_seed(0))
    assert noise.var() == pytest.approx((2.0 * 0.5 / 4) ** 2, rel=0.02)
    assert noise.mean().abs() < 3 * 0.25 / math.sqrt(noise.numel())


def test_noise_on_one_factor_moves_the_product_less() -> None:
    """E|error|² = σ² m |A|², or σ² (m |A|² + n |B|²) + σ⁴ m n r on both."""
    generator, (m, r, n), sigma = torch.Generator().manual_seed(1), (6, 2, 8), 0.3

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, A, k = normal(m, r), normal(r, n), 4000
    on_B, on_A = sigma * normal(k, m, r), sigma * normal(k, r, n)
    one = ((B + on_B) @ A - B @ A).square().sum((1, 2)).mean()
    both = ((B + on_B) @ (A + on_A) - B @ A).square().sum((1, 2)).mean()
    assert one == pytest.approx(float(sigma**2 * m * A.square().sum()), rel=0.05)
    wanted = sigma**2 * (m * A.square().sum() + n * B.square().sum()) + sigma**4 * m * n * r
    assert both == pytest.approx(float(wanted), rel=0.05) and both > 1.5 * one


def test_gradients_of_each_sample_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 5, bias=False)).double()
    layers: list[nn.Linear] = [model[0], model[2]]  # type: ignore[list-item]
    x = torch.randn(6, 7, 4, dtype=torch.float64)
    with per_sample(layers) as found:
        model(x).square().mean((1, 2)).sum().backward()
    for i in range(6):
        wanted = torch.autograd.grad(model(x[i]).square().mean(), [layer.weight for layer in layers])
        for layer, gradient in zip(layers, wanted, strict=True):
            torch.testing.assert_close(found[layer][i], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta", "opacus"),
    [
        (1.0, 0.01, 1000, 1e-5, 2.107753075451561),
        (2.0, 0.1, 100, 1e-5, 2.58665217816753),
        (0.7, 0.05, 200, 1e-6, 15.74993987594535),
        (4.0, 1.0, 10, 1e-5, 3.6278518728252274),
    ],
)  # printed by Opacus 1.6.0's RDPAccountant with `private.ORDERS`
def test_epsilon_is_that_of_opacus(sigma: float, q: float, steps: int, delta: float, opacus: float) -> None:
    assert epsilon(sigma, q, steps, delta) == pytest.approx(opacus, rel=1e-9)


def test_the_divergence_is_an_integral() -> None:
    """Of the mixture (1 − q) N(0, σ²) + q N(1, σ²) from N(0, σ²), by quadrature."""
    x = torch.linspace(-40, 60, 200_001, dtype=torch.float64)
    for q, sigma, order in ((0.1, 1.5, 4), (0.3, 2.0, 9)):
        ratio = 1 - q + q * torch.exp((2 * x - 1) / (2 * sigma**2))
        density = torch.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        wanted = torch.trapezoid(density * ratio**order, x).log() / (order - 1)
        assert private.divergence(q, sigma, order) == pytest.approx(float(wanted), rel=1e-9)


def test_noise_is_found_for_an_epsilon() -> None:
    found = noise_for(2.58665217816753, 0.1, 100, 1e-5)
    assert found == pytest.approx(2.0, rel=2e-4) and epsilon(found, 0.1, 100, 1e-5) <= 2.58665217816753


def test_the_ends_of_the_accountant() -> None:
    assert epsilon(1.0, 0.1, 0, 1e-5) == 0 and epsilon(0.0, 0.1, 1, 1e-5) == math.inf
    with pytest.raises(ValueError, match="epsilon must be larger for 100 steps"):
        noise_for(1e-6, 1.0, 100, 1e-5)


def test_samples_are_drawn_one_by_one() -> None:
    sizes = [len(private.drawn(1000, 0.03, torch.Generator().manual_seed(i))) for i in range(200)]
    assert sum(sizes) / 200 == pytest.approx(30, abs=1.5)
    assert 20 < torch.tensor(sizes).double().var() < 40, "binomial: 29.1"
