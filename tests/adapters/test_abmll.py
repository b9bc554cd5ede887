"""ABMLL: Gaussians over weights, the divergence between them, and Reptile in the limit."""

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lorank.adapters.abmll import gaussian, kl, sampled, towards
from lorank.adapters.perk import written


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_divergence_is_that_of_torch_distributions() -> None:
    mu_q, lv_q, mu_p, lv_p = (drawn(7, 5, seed=i) for i in range(4))
    expected = kl_divergence(Normal(mu_q, (0.5 * lv_q).exp()), Normal(mu_p, (0.5 * lv_p).exp())).sum()
    torch.testing.assert_close(kl(mu_q, lv_q, mu_p, lv_p), expected, rtol=1e-12, atol=1e-12)
    assert kl(mu_q, lv_q, mu_q, lv_q) == 0 and kl(mu_q, lv_q, mu_q, lv_q + 1e-3) > 0


def test_it_is_summed_in_single_precision() -> None:
    """Of 16-bit weights; in their own precision a sum of so many terms would be lost."""
    mu, zero = torch.full((300, 300), 0.1, dtype=torch.bfloat16), torch.zeros(300, 300, dtype=torch.bfloat16)
    found = kl(mu, zero, zero, zero)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), 0.5 * mu.double().square().sum(), rtol=1e-5, atol=0)


def test_samples_have_the_moments_and_gradients_reach_both() -> None:
    W, mean, spread = (
        drawn(3, 4),
        (drawn(3, 2, seed=1), drawn(2, 4, seed=2)),
        (drawn(3, 2, seed=3), drawn(2, 4, seed=4)),
    )
    mu, log_var = gaussian(W, mean, spread, scale=0.5, offset=-2.0)
    torch.testing.assert_close(mu, W + 0.5 * mean[0] @ mean[1])
    torch.testing.assert_close(log_var, 0.5 * spread[0] @ spread[1] - 2.0)
    generator = torch.Generator().manual_seed(0)
    many = torch.stack([sampled(mu, log_var, generator) for _ in range(20_000)])
    torch.testing.assert_close(many.mean(0), mu, rtol=0, atol=0.05)
    torch.testing.assert_close(many.var(0).log(), log_var, rtol=0, atol=0.06)
    leaves = [t.clone().requires_grad_() for t in (*mean, *spread)]
    sampled(*gaussian(W, (leaves[0], leaves[1]), (leaves[2], leaves[3]), scale=0.5, offset=-2.0)).sin().sum().backward()
    assert all(t.grad is not None and t.grad.abs().min() > 0 for t in leaves)


def test_without_variance_it_is_reptile_over_loras() -> None:
    """Against a LoRA of each task that is trained by torch's SGD."""
    W, x = drawn(3, 4), drawn(9, 4, seed=5)
    theta = {"B": drawn(3, 2, seed=6), "A": drawn(2, 4, seed=7), "D": drawn(3, 2, seed=8), "C": drawn(2, 4, seed=9)}
    before = {name: t.clone() for name, t in theta.items()}
    targets = [drawn(9, 3, seed=10), drawn(9, 3, seed=11)]

    def adapted(y: Tensor) -> dict[str, Tensor]:
        def loss(phi: dict[str, Tensor]) -> Tensor:
            mu, log_var = gaussian(W, (phi["B"], phi["A"]), (phi["D"], phi["C"]), scale=1.0, offset=-200.0)
            return (x @ sampled(mu, log_var).T - y).square().mean()

        return written(loss, theta, [0.05] * 3, kept=0)

    towards(theta, [adapted(y) for y in targets], 0.5)
    ends = []
    for y in targets:
        B, A = (before[name].clone().requires_grad_() for name in "BA")
        optimizer = torch.optim.SGD([B, A], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            (x @ (W + B @ A).T - y).square().mean().backward()
            optimizer.step()
        ends.append((B.detach(), A.detach()))
    for i, name in enumerate("BA"):
        expected = before[name] + 0.5 * (sum(end[i] for end in ends) / 2 - before[name])
        torch.testing.assert_close(theta[name], expected, rtol=1e-9, atol=1e-12)
