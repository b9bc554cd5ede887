"""Truncated singular value decomposition: each matrix as two factors, the best of their rank.

    W ≈ B A     min |(W − B A) Xᵀ|     W [m, n]   B [m, r]   A [r, n]   X [tokens, n] the layer's inputs on calibration text

With R Rᵀ = XᵀX and W R = U Σ Vᵀ the solution is B = U_r Σ_r^½, A = Σ_r^½ V_rᵀ R⁻¹, and the error on the text is the tail
√(σ²_{r+1} + …). Without text R = I, and the error is that of the weights (Eckart and Young). The bias stays. The fitted model is
`lorank.LowRank`, with a rank for each projection.

With solver "randomised" U_r comes from the range of W R (RᵀWᵀ W R)² Ω, Ω [n, r + 10] random (Halko et al., arXiv 0909.4061). That takes
about 12 m n r operations instead of the SVD's ~20 m n min(m, n), and the error is slightly above the tail.

"semi-nmf" gives an A without negative entries and "nmf" both factors, for matrices without (`lorank.fit.nmf`); their error is above the tail.

Cost of a layer: r (m + n) parameters instead of m n, less if r is below the break-even rank m n / (m + n).

Source: Cahyawijaya, "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation",
arXiv 2108.10808, for the factors and the break-even rule; without text, these are also the factors of PELA (arXiv 2310.10700),
with a budget of 1/3. The metric is that of EoRA (arXiv 2410.21271).

Departures: the singular values are divided between the factors, as in PELA; Greenformers puts them all into one. Convolutions are
replaced by `lorank.fit.convolutions`.
"""

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lorank.factors import Pair, nearest
from lorank.fit.nmf import nmf, semi_nmf
from lorank.fit.structure import Found, Metric, Structure
from lorank.layers import LowRankLinear
from lorank.method import Method, seeded_generator
from lorank.methods.low_rank import LowRank

OVERSAMPLING, POWERS = 10, 2
"""Of the randomised solver: columns beyond the rank, and multiplications with the matrix and its transpose."""


def randomised(weight: Tensor, rank: int, R: Tensor | None = None) -> Pair:
    """As `lorank.factors.nearest`, from a random sketch: B [m, r] and A [r, n] with |(W − B A) R| close to the least."""
    target = weight if R is None else weight.to(R.dtype) @ R
    wanted = min(rank + OVERSAMPLING, *target.shape)
    drawn = torch.randn(target.shape[1], wanted, generator=seeded_generator("svd", *target.shape), dtype=target.dtype)
    Q = torch.linalg.qr(target @ drawn.to(target.device))[0]
    for _ in range(POWERS):
        Q = torch.linalg.qr(target @ torch.linalg.qr(target.mT @ Q)[0])[0]
    B, A = nearest(Q.mT @ target, rank)
    return Q @ B, A if R is None else torch.linalg.solve_triangular(R, A, upper=False, left=False)


@torch.no_grad()
def fill_factors(layer: nn.Module, found: Found, bias: Tensor | None) -> None:
    """Copy A, B and the bias into a layer of two factors. A matrix has no more than min(m, n) of them: where the layer has more, the rest of A
    is as it was drawn, and of B zero."""
    assert isinstance(layer, LowRankLinear)
    k = len(found["A"])
    layer.A.weight[:k] = found["A"]
    layer.B.weight.zero_()[:, :k] = found["B"]
    if layer.B.bias is not None and bias is not None:
        layer.B.bias.copy_(bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVD(Structure):
    """Two factors for each matrix; ``lorank.fit(model, "svd", batches, budget=0.5)``."""

    name: ClassVar[str] = "svd"

    solver: Literal["exact", "randomised", "semi-nmf", "nmf"] = "exact"
    """How the factors are found: by a full SVD; faster and almost as well from a random sketch; or with signs that are fixed."""

    @classmethod
    def making(cls, method: Method) -> Structure | None:
        return cls() if isinstance(method, LowRank) and method == LowRank(rank=method.rank) else None

    def method(self, rank: int | dict[str, int]) -> Method:
        return LowRank(rank=rank)

    def solve(self, weight: Tensor, metric: Metric, rank: int) -> Found:
        target = self.target(weight)
        if self.solver == "nmf":
            if metric.R is not None:
                raise ValueError("data must be left out with solver 'nmf', which has no metric; use 'semi-nmf'")
            B, A = nmf(target, rank)
        else:
            solvers = {"exact": nearest, "randomised": randomised, "semi-nmf": semi_nmf}
            B, A = solvers[self.solver](target, rank, metric.R)
        return {"B": B.to(weight.dtype), "A": A.to(weight.dtype)}

    def apply(self, found: Found, x: Tensor) -> Tensor:
        return x @ found["A"].mT @ found["B"].mT

    def fill(self, layer: nn.Module, found: Found, bias: Tensor | None) -> None:
        fill_factors(layer, found, bias)
