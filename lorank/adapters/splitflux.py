"""SplitFlux: two adapters of unequal rank, blended for each token by how much it stands out, and less rank at a boundary.

    y = W x + s (g B A x + (1 - g) D C x) (+ b)      A [r, d_in]  B [d_out, r]     C [r', d_in]  D [d_out, r']     W frozen
    g = sigmoid((|e| - μ) / σ),  one number for each token e of a picture, μ and σ over its tokens                  (1)
    at boundary layers:  ranks r/α and r'/α, and the scale α s                                                      (2)
    added to the loss:   λ Σ (|A Cᵀ|² + |Bᵀ D|² + |B A ⊙ D C|₁)                                                     (3)

Saves: gradients, optimizer state.

The main branch learns what stands out, the residual branch the rest, and (3) keeps them apart. `lorank.set_context(model,
saliency(e))` gives g for the next batches; without a context g is ½ and the adapter merges. `complementary_loss(model)` is (3) with λ = 1.

Cost of a layer: (r + r')(d_in + d_out) trained parameters; for n tokens 2 n (d_in d_out + (r + r')(d_in + d_out)) operations forward;
backward the first term once more and the second twice. (3) costs 2 (r + r') d_in d_out and forms both products.

Source: Yang et al., "SplitFlux: Learning to Decouple Content and Style from a Single Image", arXiv 2511.15258.

Confirmed in the text: (1) to (3), r = 48 and r' = 16, α = 2, λ = 0.1, blocks 20 to 29 of FLUX for content and 30 to 57 for style (a plain
adapter of rank 64), of which 30 and 31 are the boundary. Our reading: e is the token at the model's input, so that one g serves all
layers; |.|₁ is a sum; LoRA's start; s = 1; (2) shortens both branches. No code of the authors was at hand.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorank.adapters.blocks import BlockAdapter, Contextual
from lorank.adapters.gated import Adapted, blockwise, check_width
from lorank.fields import Positive, Rank, compile_pattern
from lorank.layers import wide
from lorank.method import Site, check_table, rank_at

# ---- the mathematics


def saliency(e: Tensor) -> Tensor:
    """(1): g [batch, tokens] of tokens e [batch, tokens, d], in single precision or better; ½ where all have one length."""
    lengths = torch.linalg.vector_norm(wide(e), dim=-1)
    sigma, mu = torch.std_mean(lengths, dim=-1, keepdim=True, correction=0)
    return torch.sigmoid((lengths - mu) / sigma.clamp(min=torch.finfo(sigma.dtype).eps))


def complement(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """(3) of one layer, in single precision or better."""
    A, B, C, D = map(wide, (A, B, C, D))
    return (A @ C.T).square().sum() + (B.T @ D).square().sum() + ((B @ A) * (D @ C)).abs().sum()


# ---- the layer


class SplitFluxLinear(BlockAdapter):
    """Block 0 is the main branch, block 1 the residual one."""

    def __init__(self, dense: nn.Linear, ranks: Sequence[int], *, scale: float):
        super().__init__(dense, ranks, scale=scale)
        self.reset_parameters()

    def mixture(self) -> Tensor:
        """(g, 1 - g): [2], or [batch, tokens, 2]."""
        g = torch.tensor(0.5) if self.context.value is None else self.context.value
        return torch.stack([g, 1 - g], dim=-1)

    def gate(self, x: Tensor, z: Tensor) -> Tensor:
        g = self.mixture().to(z.device)
        if g.ndim == 3 and (z.ndim != 3 or z.shape[1] != g.shape[1] or len(g) not in (1, len(z))):
            got = f"{[*g.shape[:-1]]} for inputs {[*z.shape[:-1]]}"
            raise ValueError(f"the context must have a number for each token, got {got}")
        return blockwise(g, self.ranks)

    def complement(self) -> Tensor:
        main, rest = self.block(0), self.block(1)
        return complement(self.A.weight[main], self.B.weight[:, main], self.A.weight[rest], self.B.weight[:, rest])


# ---- the method


@dataclass(frozen=True, kw_only=True)
class SplitFlux(Contextual):
    """Two adapters blended by token; ``lorank.convert(model, SplitFlux(rank=48))``, then `lorank.set_context(model, saliency(e))`."""

    name: ClassVar[str] = "splitflux"
    layer: ClassVar[type[Adapted]] = SplitFluxLinear

    rank: Rank = 48
    """r of the main branch: an integer, a fraction of the width, or {pattern: either}."""
    residual_rank: Rank = 16
    """r' of the residual branch, likewise."""
    scale: Positive = 1.0
    """s."""
    boundary: str | None = None
    """A regular expression searched in the names of layers: those at the boundary; None: no layer."""
    amplify: Positive = 2.0
    """α: at the boundary ranks are divided by it, and the scale is multiplied."""

    def check(self, sites: Sequence[Site]) -> None:
        super().check(sites)
        check_table(self.residual_rank, sites, "residual_rank")
        check_width(self.residual_rank, sites, "residual_rank")
        pattern = None if self.boundary is None else compile_pattern(self.boundary, "boundary")
        if pattern is not None and not any(pattern.search(site.name) for site in sites):
            raise ValueError(f"boundary must match a layer, got {self.boundary!r}, which matches none")

    def build(self, site: Site) -> nn.Module:
        alpha = self.amplify if self.boundary is not None and re.search(self.boundary, site.name) else 1.0
        ranks = [max(1, round(rank_at(rank, site) / alpha)) for rank in (self.rank, self.residual_rank)]
        return SplitFluxLinear(site.linear, ranks, scale=alpha * self.scale)

    def context(self, value: Any) -> Tensor:
        g = torch.as_tensor(value, dtype=torch.float32)
        if g.ndim not in (0, 2) or not bool(((g >= 0) & (g <= 1)).all()):
            raise ValueError(f"a saliency must be from 0 to 1, one number or [batch, tokens], got {value}")
        return g


def complementary_loss(model: nn.Module) -> Tensor:
    """(3) of all layers of a model that was converted with `SplitFlux`, with λ = 1; the paper adds a tenth of it to the loss.

    Raises:
        ValueError: it has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, SplitFluxLinear)]
    if not layers:
        raise ValueError("model must have the adapter splitflux")
    return torch.stack([layer.complement() for layer in layers]).sum()
