"""ABMLL: adapters that give means and variances of weights, learned over tasks, so that a new one needs few examples.

    q(φ) = N(μ_φ, σ_φ²),  p(φ | θ) = N(μ_θ, σ_θ²):   each μ = W + s B A  and each log σ² = c + s B A,  a pair of factors for each   (1)
    φ = μ_φ + σ_φ ε,  ε normal                                                                                                  (2)
    for each task, from μ_φ = μ_θ, σ_φ = σ_θ, K first-order steps on   -log p(data | φ) + β KL(q(φ) | p(φ | θ))                  (3)
    KL = ½ Σ (σ_φ²/σ_θ² + (μ_φ - μ_θ)²/σ_θ² - 1 - log(σ_φ²/σ_θ²))                                                              (4)
    after it   θ <- θ + ε̄ mean over tasks of (φ's factors - θ's)                                                                (5)

Saves: nothing; it is for tasks with few examples.

Four pairs cost about four times a LoRA's parameters, and a sampled weight is a dense matrix. The inner steps are those of
`lorank.adapters.perk.written` with ``kept=0``.

Source: Zhang et al., "Amortized Bayesian Meta-Learning for Low-Rank Adaptation of Large Language Models", arXiv 2508.14285.

Confirmed in the text: (1) to (4), K first-order steps, β about 1e-7, two tasks in a batch. Our reading: (5), which with β = 0 and σ → 0 is
Reptile over LoRAs, and c. Public reviews found results near plain LoRA's and a prior that all but collapses: with β = 1e-7 the KL weighs
little. It is a sum of very many terms, so it is in float32 whatever the weights are.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorank.factors import Pair
from lorank.layers import wide


def gaussian(W: Tensor, mean: Pair, log_variance: Pair, *, scale: float, offset: float) -> tuple[Tensor, Tensor]:
    """(1): μ and log σ² [d_out, d_in], in single precision or better, for W [d_out, d_in] and pairs B [d_out, r], A [r, d_in]; c is
    `offset`."""
    mu, log_var = (scale * (wide(B) @ wide(A)) for B, A in (mean, log_variance))
    return wide(W) + mu, offset + log_var


def sampled(mu: Tensor, log_var: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(2), differentiable in both."""
    noise = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
    return mu + (0.5 * log_var).exp() * noise


def kl(mu_q: Tensor, log_var_q: Tensor, mu_p: Tensor, log_var_p: Tensor) -> Tensor:
    """(4), of q from p, in single precision or better. It is zero where they are equal.

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> kl(one, zero, zero, zero), kl(one, one, one, one)
    (tensor(0.5000), tensor(0.))
    """
    mu_q, log_var_q, mu_p, log_var_p = map(wide, (mu_q, log_var_q, mu_p, log_var_p))
    ratio = log_var_q - log_var_p
    return 0.5 * (torch.expm1(ratio) - ratio + (mu_q - mu_p).square() * (-log_var_p).exp()).sum()


@torch.no_grad()
def towards(theta: Mapping[str, Tensor], tasks: Sequence[Mapping[str, Tensor]], rate: float) -> None:
    """(5), in place; ε̄ is `rate`."""
    for name, value in theta.items():
        value.lerp_(torch.stack([phi[name] for phi in tasks]).mean(0), rate)
