"""EoRA: what rounding or pruning has taken from a matrix, given back by two factors that are the best on calibration text.

    y = Ŵ x + B A x (+ b)     min |(W − Ŵ − B A) Xᵀ|     W, Ŵ [m, n]   B [m, r]   A [r, n]   X [tokens, n] the layer's inputs

Ŵ is W rounded to few bits or with zeros (`lorank.fit.bases`). With R Rᵀ = XᵀX and (W − Ŵ) R = U Σ Vᵀ the solution is
B = U_r Σ_r^½, A = Σ_r^½ V_rᵀ R⁻¹, for any root R, and the error on the text is the tail √(σ²_{r+1} + …), never above that of a plain
SVD of W − Ŵ. Blocks are compensated in order, each on inputs that come through the compensated ones before it. The fitted model is
`lorank.LoRA`, whose W is Ŵ.

Cost of a layer: r (m + n) parameters and 2 r (m + n) operations for each token in addition to Ŵ. Ŵ is stored as ordinary numbers, so
that files and memory shrink only with kernels for its format.

Source: Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
arXiv 2410.21271.

Departures from the authors' code: XᵀX is a plain sum over all tokens, where theirs lets early samples decay; a direction that the text
does not reach has a ridge (`lorank.factors.RIDGE`), where theirs raises eigenvalues; R is Cholesky's, which gives the same B A. The
authors compress with GPTQ and SparseGPT; here rounding is to the nearest and pruning by magnitude.
"""

import dataclasses
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from lorank.adapters.lora import LoRA, LoRALinear
from lorank.factors import nearest
from lorank.fields import Bounds, Count
from lorank.fit.bases import Base, cheaper
from lorank.fit.structure import Found, Metric, Structure
from lorank.method import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class EoRA(Structure):
    """A cheaper matrix and a low-rank residual; ``lorank.fit(model, EoRA(base="int3"), batches, budget=0.1)``."""

    name: ClassVar[str] = "eora"
    usual: ClassVar[float] = 0.1
    counts: ClassVar[str] = "residuals"

    base: Base = "int4"
    """What becomes of the matrix: so many bits for an entry, two entries of four, or all but a share of the entries."""
    group: Count = 128
    """Entries of a row that share a scale, if the base has bits."""
    share: Annotated[float, Bounds(above=0, below=1)] = 0.5
    """Entries that become zero, for base "magnitude"."""

    def method(self, rank: int | dict[str, int]) -> Method:
        return LoRA(rank=rank)

    def target(self, weight: Tensor) -> Tensor:
        return weight.double() - self._base(weight).double()

    def _base(self, weight: Tensor) -> Tensor:
        return cheaper(weight.double(), self.base, self.group, self.share).to(weight.dtype)

    def solve(self, weight: Tensor, metric: Metric, rank: int) -> Found:
        B, A = nearest(self.target(weight), rank, metric.R)
        return {"W": self._base(weight), "B": B.to(weight.dtype), "A": A.to(weight.dtype)}

    def apply(self, found: Found, x: Tensor) -> Tensor:
        return x @ found["W"].mT + x @ found["A"].mT @ found["B"].mT

    @torch.no_grad()
    def fill(self, layer: nn.Module, found: Found, bias: Tensor | None) -> None:
        assert isinstance(layer, LoRALinear)  # its W has the bias already
        layer.W.weight.copy_(found["W"])
        layer.A.weight.copy_(found["A"])
        layer.B.weight.copy_(found["B"] / layer.scale)
