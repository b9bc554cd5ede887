"""Plain low-rank factorisation: the control of every comparison, CoLA without the non-linearity.

    y = B A x (+ b)           x [..., d_in]   A [r, d_in]   B [d_out, r]   b [d_out]

Saves: compute, weights, gradients, optimizer state.

It has exactly CoLA's parameters, initial values and FLOPs, and the dense block's own activation. Whatever CoLA gains
over it is due to σ. Trained from scratch with the usual recipe, it is the row that the literature shows failing at
scale.

Source: Kamalakara et al., "Exploring Low Rank Training of Deep Neural Networks", arXiv 2209.13569. The initial values are
CoLA's, arXiv 2502.10940, so that the two start from the same point.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lorank.experts import LowRankExperts
from lorank.fields import Rank
from lorank.layers import LowRankLinear, like
from lorank.method import Method, Published, Site, check_ranks, rank_at
from lorank.sizes import SIZES


@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Plain low-rank factorisation with its rank."""

    name: ClassVar[str] = "low-rank"
    experts: ClassVar[bool] = True
    # as CoLA: the same 43, 94, 185 and 609 M parameters are in the tables of arXiv 2406.02214
    published: ClassVar[Published] = {name: {"rank": size.rank} for name, size in SIZES.items()}

    rank: Rank = 0.25
    """Width of the bottlenecks: an integer, a fraction of the width, or {pattern: either}."""

    def check(self, sites: Sequence[Site]) -> None:
        check_ranks(self.rank, sites)

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        if isinstance(module, LowRankExperts):
            return module.B @ module.A, module.bias  # [E, d_out, d_in]
        assert isinstance(module, LowRankLinear)
        return module.B.weight @ module.A.weight, module.B.bias

    def build(self, site: Site) -> nn.Module:
        sizes = (site.d_in, site.d_out, rank_at(self.rank, site))
        settings: dict[str, Any] = {"bias": site.linear.bias is not None, **like(site.linear.weight)}
        return LowRankExperts(site.experts, *sizes, **settings) if site.experts else LowRankLinear(*sizes, **settings)
