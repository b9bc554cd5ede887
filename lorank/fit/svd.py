"""Truncated singular value decomposition: each matrix as two factors, the best of their rank.

    W ≈ B A     min |(W − B A) Xᵀ|     W [m, n]   B [m, r]   A [r, n]   X [tokens, n] the layer's inputs on calibration text

With R Rᵀ = XᵀX and W R = U Σ Vᵀ the solution is B = U_r Σ_r^½, A = Σ_r^½ V_rᵀ R⁻¹, and the error on the text is the tail
√(σ²_{r+1} + …). Without text R = I, and the error is that of the weights (Eckart and Young). The bias stays. The fitted model is
`lorank.LowRank`, with a rank for each projection.

Cost of a layer: r (m + n) parameters instead of m n, less if r is below the break-even rank m n / (m + n).

Source: Cahyawijaya, "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation",
arXiv 2108.10808, for the factors and the break-even rule; without text, these are also the factors of PELA (arXiv 2310.10700),
with a budget of 1/3. The metric is that of EoRA (arXiv 2410.21271).

Departures: the singular values are divided between the factors, as in PELA; Greenformers puts them all into one. Convolutions stay dense.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorank.factors import nearest
from lorank.fit.structure import Found, Metric, Structure
from lorank.layers import LowRankLinear
from lorank.method import Method
from lorank.methods.low_rank import LowRank


@torch.no_grad()
def fill_factors(layer: nn.Module, found: Found, bias: Tensor | None) -> None:
    """Copy A, B and the bias into a layer of two factors."""
    assert isinstance(layer, LowRankLinear)
    layer.A.weight.copy_(found["A"])
    layer.B.weight.copy_(found["B"])
    if layer.B.bias is not None and bias is not None:
        layer.B.bias.copy_(bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVD(Structure):
    """Two factors for each matrix; ``lorank.fit(model, "svd", batches, budget=0.5)``."""

    name: ClassVar[str] = "svd"

    def method(self, rank: int | dict[str, int]) -> Method:
        return LowRank(rank=rank)

    def solve(self, weight: Tensor, metric: Metric, rank: int) -> Found:
        B, A = nearest(self.target(weight), rank, metric.R)
        return {"B": B.to(weight.dtype), "A": A.to(weight.dtype)}

    def apply(self, found: Found, x: Tensor) -> Tensor:
        return x @ found["A"].mT @ found["B"].mT

    def fill(self, layer: nn.Module, found: Found, bias: Tensor | None) -> None:
        fill_factors(layer, found, bias)
