"""Differential privacy under any rule: clients clip each sample's gradient and add Gaussian noise, and count what that has cost.

    ḡ = (Σ_i g_i min(1, C / |g_i|) + N(0, σ² C²)) / (q N)      over samples that are each drawn with probability q of N

g_i is the gradient of one training sequence with respect to all trained factors, so one sequence more or less is what nobody can tell.
A client adds the noise itself; no trust in the server is needed. T steps cost (ε, δ), by Rényi divergence of order a = 2, 3, ...:

    ρ(a) = log Σ_k (a over k) (1−q)^(a−k) q^k exp(k (k−1) / 2σ²) / (a − 1)
    ε = min over a of T ρ(a) + log((a − 1)/a) − (log δ + log a)/(a − 1)

Each sequence belongs to one client, so a client's ε counts its own steps alone. What a server does with the sent factors costs nothing more.

Sources: Liu et al., "Differentially Private Low-Rank Adaptation of Large Language Model Using Federated Learning" (DP-LoRA), 2023, arXiv
2312.17493; Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133; Mironov et al., "Rényi Differential
Privacy of the Sampled Gaussian Mechanism", 2019, arXiv 1908.10530; the last step of ε is that of Balle et al., arXiv 1905.09982.

Departures. DP-LoRA, as third parties describe it, clips the gradient of a batch, which bounds nothing for a sample. Here each sample's is
clipped and counted. Orders are whole numbers, so ε is an upper bound, somewhat above that of an accountant with fractions between them where ε is large.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ORDERS = (*range(2, 64), *range(64, 512, 16), 512, 768, 1024)
"""Orders a of the divergence that are tried."""
ACCOUNTANTS = ("rdp", "opacus-rdp", "opacus-prv")
"""Ours, and two of Opacus, if it is installed."""

# ---- the mechanism


def clipped_sum(gradients: Sequence[Tensor], bound: float) -> list[Tensor]:
    """Σ_i g_i min(1, C / |g_i|) of gradients [b, ...], one tensor for each parameter; |g_i| is over all of them."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)  # [b]
    factor = (bound / norms.clamp(min=1e-30)).clamp(max=1.0)
    return [torch.tensordot(factor, g, dims=1) for g in gradients]


def private_gradient(
    gradients: Sequence[Tensor], bound: float, sigma: float, expected: float, generator: torch.Generator
) -> list[Tensor]:
    """ḡ of each parameter, from gradients [b, ...] of the b samples that were drawn; b may be 0.

    Args:
        bound: C. Infinity with a sigma of 0 is the plain gradient.
        sigma: noise in units of C.
        expected: q N, the samples that are drawn on average.
    """
    found = []
    for total in clipped_sum(gradients, bound):
        if sigma:
            noise = torch.empty(total.shape, dtype=total.dtype).normal_(generator=generator)
            total = total + sigma * bound * noise.to(total.device)
        found.append(total / expected)
    return found


@contextlib.contextmanager
def per_sample(layers: Sequence[nn.Linear]) -> Iterator[dict[nn.Linear, Tensor]]:
    """Collects gradients [b, d_out, d_in] of the weights of these layers, one for each row of a batch, while a loss that is a sum over
    rows is differentiated. Layers must read inputs [b, n, d_in], once for each backward pass."""
    found: dict[nn.Linear, Tensor] = {}

    def forward(layer: Any, inputs: Any, output: Tensor) -> None:
        x = inputs[0].detach()
        output.register_hook(lambda g: found.__setitem__(layer, torch.einsum("bno,bni->boi", g, x)))

    handles = [layer.register_forward_hook(forward) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def drawn(samples: int, q: float, generator: torch.Generator) -> Tensor:
    """Indices of samples, each of which is there with probability q, as the accountant assumes. It may be none."""
    return (torch.rand(samples, generator=generator) < q).nonzero().flatten()


# ---- what it costs


def divergence(q: float, sigma: float, order: int) -> float:
    """ρ(a) of one step."""
    if q == 1:
        return order / (2 * sigma**2)
    k = torch.arange(order + 1, dtype=torch.float64)
    ways = math.lgamma(order + 1) - torch.lgamma(k + 1) - torch.lgamma(order - k + 1)
    terms = ways + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * sigma**2)
    return float(terms.logsumexp(0)) / (order - 1)


def epsilon(sigma: float, q: float, steps: int, delta: float, *, accountant: str = "rdp") -> float:
    """What so many steps cost, ε at this δ.

    >>> round(epsilon(sigma=1.0, q=0.01, steps=1000, delta=1e-5), 2)
    2.11
    """
    if steps == 0:
        return 0.0
    if sigma == 0:
        return math.inf
    if accountant != "rdp":
        return _opacus(accountant, sigma, q, steps, delta)
    return max(
        0.0,
        min(
            steps * divergence(q, sigma, a) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)
            for a in ORDERS
        ),
    )


@functools.lru_cache(maxsize=1024)
def noise_for(target: float, q: float, steps: int, delta: float, *, accountant: str = "rdp") -> float:
    """The least σ, within 1e-4 of itself, that costs at most `target`.

    Raises:
        ValueError: no σ up to 10,000 does.
    """
    low, high = 0.0, 1.0
    while epsilon(high, q, steps, delta, accountant=accountant) > target:
        low, high = high, 2 * high
        if high > 10_000:
            raise ValueError(f"epsilon must be larger for {steps} steps at delta {delta:g}, got {target:g}")
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        if epsilon(middle, q, steps, delta, accountant=accountant) > target:
            low = middle
        else:
            high = middle
    return high


def _opacus(accountant: str, sigma: float, q: float, steps: int, delta: float) -> float:
    """Of one of Opacus' accountants."""
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant
    except ImportError:
        raise ValueError(
            f"the accountant {accountant!r} needs Opacus: pip install 'lorank[private]', or use 'rdp'"
        ) from None
    kinds: Mapping[str, Any] = {"opacus-rdp": RDPAccountant, "opacus-prv": PRVAccountant}
    counted = kinds[accountant]()
    counted.history = [(sigma, q, steps)]
    return float(counted.get_epsilon(delta))
