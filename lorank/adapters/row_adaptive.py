"""ALLoRA: an adapter whose output rows learn the faster the smaller they are, without dropout and scale.

    y = W x + B A x (+ b), ∂A and ∂B from f ⊙ ∂y      x [..., d_in]   A [r, d_in]   B [d_out, r]   W [d_out, d_in] frozen
    backward:  f_i = 1 / √(|(B A)_i| + 1/η²) for ∂A and ∂B alone,  while ∂x comes from ∂y                          (1)

Saves: gradients, optimizer state.

B is zero at the start, and so is every row of B A: f is then η everywhere, and falls where a row grows. |(B A)_i| is the length of
row i [d_in], computed from A Aᵀ [r, r].

Cost of a layer: r (d_in + d_out) trained parameters; for n tokens 2 n (d_in d_out + r (d_in + d_out)) operations forward; backward
the first term once more, and the second twice and another 2 n r d_out, as B is multiplied by f ⊙ ∂y and by ∂y; f costs
2 r² (d_in + d_out) each time. Merged, it is a dense layer.

Source: Huang and Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv 2410.09692.

This is a third party's reading of the paper's section 4.2, as no code of the authors is known: the row norm is that of the product,
and (1) acts on the gradient of the adapter's output. η = 2 is third-party code's; the paper's value is not known to us. Public
optimizers that take row norms of A and of B apart compute something else. Under Adam a factor that changes slowly cancels in B's step,
whose entries are divided by their own size, but not in A's, whose gradient is a sum over output rows: there it acts mostly through A.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.adapters.gated import Adapted, Adapter, GatedAdapter
from lorank.fields import Positive
from lorank.layers import wide
from lorank.method import Site

# ---- the mathematics


@torch.no_grad()
def row_factors(A: Tensor, B: Tensor, eta: float) -> Tensor:
    """f [d_out] of (1) for A [r, d_in], B [d_out, r], in single precision or better."""
    A, B = wide(A), wide(B)
    squares = ((B @ (A @ A.T)) * B).sum(1).clamp(min=0)  # |(B A)_i|²
    return (squares.sqrt() + eta**-2).rsqrt()


class RowFactors(torch.autograd.Function):
    """The identity, whose gradient is multiplied by f."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, f: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(f)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (f,) = ctx.saved_tensors
        return gradient * f.to(gradient.dtype), None


class WithInput(torch.autograd.Function):
    """y as it is, and for x the gradient that it has through y = B A x."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(A, B)
        ctx.dtype = x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        A, B = (factor.to(gradient.dtype) for factor in ctx.saved_tensors)
        return gradient, ((gradient @ B) @ A).to(ctx.dtype), None, None


# ---- the layer


class RowAdaptiveLinear(GatedAdapter):
    def __init__(self, dense: nn.Linear, rank: int, *, eta: float):
        super().__init__(dense, rank)
        self.eta = eta
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.A.weight, self.B.weight
        y = RowFactors.apply(F.linear(F.linear(x.detach(), A), B), row_factors(A, B, self.eta))
        return self.W(x) + WithInput.apply(y, x, A.detach(), B.detach())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eta={self.eta:g}"


# ---- the method


@dataclass(frozen=True, kw_only=True)
class RowAdaptive(Adapter):
    """ALLoRA; ``lorank.convert(model, RowAdaptive(rank=16))``."""

    name: ClassVar[str] = "row-adaptive"
    layer: ClassVar[type[Adapted]] = RowAdaptiveLinear

    eta: Positive = 2.0
    """η: the factor of a row that is zero."""

    def options(self, site: Site) -> dict[str, Any]:
        return {"eta": self.eta}
