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
from lorank.methods.lax import Carry, LaXLinear, build_chain, check_chains, check_settings, refuse_to_merge
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
    carry: Carry = "none"
    """What the bottleneck of the same projection in the block before goes through on its way into this one: a gate, which may be the
    identity; see methods/lax.py."""
    carry_norm: bool = True
    """Whether the sum of the two is normalised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.carry, self.carry_norm)

    def check(self, sites: Sequence[Site]) -> None:
        check_ranks(self.rank, sites)
        check_chains(self.carry, self.rank, sites)

    @property
    def sources(self) -> tuple[str, ...]:
        return super().sources + (() if self.carry == "none" else ("lorank.methods.lax",))

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        refuse_to_merge(self.name, self.carry)
        if isinstance(module, LowRankExperts):
            return module.B @ module.A, module.bias  # [E, d_out, d_in]
        assert isinstance(module, LowRankLinear)
        return module.B.weight @ module.A.weight, module.B.bias

    def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
        return build_chain(self, sites)

    def build(self, site: Site, **link: Any) -> nn.Module:
        sizes = (site.d_in, site.d_out, rank_at(self.rank, site))
        settings: dict[str, Any] = {"bias": site.linear.bias is not None, **like(site.linear.weight), **link}
        if site.experts:
            return LowRankExperts(site.experts, *sizes, **settings)
        return (LaXLinear if link else LowRankLinear)(*sizes, **settings)
