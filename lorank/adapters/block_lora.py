"""Block-LoRA: an adapter whose down-projection is one block, used N times, and whose up-projections are added.

    y = W x + (α/r) (Σ_i B_i) A x (+ b)      x [..., d_in]   A [r/N, d_in]   B_i [d_out, r/N], i = 1 … N   W [d_out, d_in] frozen

Saves: gradients, optimizer state.

It is a LoRA of rank r whose A has the same rows N times, so that products become sums. So its update has rank r/N, and what it can
express is what a LoRA of rank r/N can: one with B = Σ_i B_i. All B_i start at zero and get the same gradient, so they stay equal, and a
step moves their sum N times as far: it trains as a LoRA of rank r/N whose B has N times A's learning rate, with N times as many numbers
in B. Use that LoRA unless you repeat the paper.

Cost of a layer: r (d_out + d_in / N) trained parameters; for n tokens 2 n (d_in d_out + (r/N) (d_in + d_out)) operations forward, and r
d_out additions; backward the first term once more and the second twice. Merged, it is a dense layer.

Source: Zhou et al., "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning", arXiv 2501.16720.

Confirmed in the abstract: the matrices of a LoRA are cut in blocks, all blocks of the down-projection are one, and products become
additions. Our reading: how they are cut, N, the start and the scale. No code of the authors is known to us.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear as apply

from lorank.adapters.gated import Adapted, Adapter, GatedAdapter
from lorank.factors import Pair
from lorank.fields import Count, Positive
from lorank.layers import Factor, like, scale_at, wide
from lorank.method import Site, rank_at

# ---- the mathematics


def summed(B: Tensor, blocks: int) -> Tensor:
    """Σ_i B_i [d_out, r/N] for B = [B_1 … B_N] [d_out, r]."""
    return B.unflatten(1, (blocks, -1)).sum(1)


# ---- the layer


class BlockLoRALinear(GatedAdapter):
    def __init__(self, dense: nn.Linear, rank: int, *, blocks: int, scale: float):
        super().__init__(dense, rank // blocks, scale=scale)
        self.blocks = blocks
        self.B = Factor(rank, dense.out_features, bias=False, **like(dense.weight))
        self.reset_parameters()

    def lifted(self, z: Tensor) -> Tensor:
        return apply(z, summed(self.B()[0], self.blocks))

    def up(self) -> Tensor:
        """Σ_i B_i in single precision or better."""
        return summed(wide(self.B.weight), self.blocks)

    def product(self) -> Tensor:
        return self.scale * (self.up() @ wide(self.A.weight))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.blocks}"


# ---- the method


@dataclass(frozen=True, kw_only=True)
class BlockLoRA(Adapter):
    """One shared down-projection and several up-projections; ``lorank.convert(model, BlockLoRA(rank=16, blocks=4))``."""

    name: ClassVar[str] = "block-lora"
    layer: ClassVar[type[Adapted]] = BlockLoRALinear

    blocks: Count = 4
    """N, a divisor of every rank."""
    alpha: Positive = 32.0
    """The low-rank term is multiplied by α/r."""

    def build(self, site: Site) -> nn.Module:
        if (rank := rank_at(self.rank, site)) % self.blocks:
            raise ValueError(f"blocks must divide the rank {rank} of {site.name}, got {self.blocks}")
        return super().build(site)

    def options(self, site: Site) -> dict[str, Any]:
        return {"blocks": self.blocks, "scale": scale_at(self.alpha, None, rank_at(self.rank, site))}

    def pair(self, module: nn.Module) -> Pair:
        assert isinstance(module, BlockLoRALinear)
        B, A = module.up().detach(), module.A.weight.detach()
        return (module.scale * B).to(A.dtype), A
