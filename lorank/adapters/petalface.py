"""PETALface: two adapters, for good and for poor pictures, blended by how good each picture is.

    y = W x + s dropout((1 - α) B_1 A_1 x + α B_2 A_2 x) (+ b)      α = ½ + (q - q_0), one number for each picture

Saves: gradients, optimizer state.

`lorank.set_context(model, q)` gives the quality q of each picture [batch], or one for all; q_0 is the `threshold`. α is not clipped, as
in the authors' code: it may be below 0 or above 1. Without a context α is ½. A is drawn from a normal distribution of standard
deviation 1/r, and B is zero.

Cost of a layer: 2 r (d_in + d_out) trained parameters; for n tokens 2 n (d_in d_out + 2 r (d_in + d_out)) operations forward; backward
the first term once more and the second twice. Merged for one quality, it is a dense layer.

Source: Narayan et al., "PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition", arXiv 2412.07771, and the
authors' repository.

Confirmed in the authors' code: the blend, α and that it is not clipped, the start, r = 8, dropout 0.1 of the adapter's output; q is
BRISQUE's or CNN-IQA's score. Departures. Any score will do here. The scale is 1 unless it is set.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from lorank.adapters.blocks import BlockAdapter, Contextual
from lorank.adapters.gated import Adapted
from lorank.fields import Bounds, Positive, Rank
from lorank.method import Site, rank_at

# ---- the layer


class PETALfaceLinear(BlockAdapter):
    def __init__(self, dense: nn.Linear, rank: int, *, scale: float, dropout: float, threshold: float):
        super().__init__(dense, [rank, rank], scale=scale)
        self.threshold, self.output_dropout = threshold, nn.Dropout(dropout) if dropout else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.B.weight)
        nn.init.normal_(self.A.weight, std=1 / self.ranks[0])

    def mixture(self) -> Tensor:
        """(1 - α, α)."""
        q = self.context.value
        alpha = torch.tensor(0.5) if q is None else 0.5 + (q - self.threshold)
        return torch.stack([1 - alpha, alpha], dim=-1)

    def lifted(self, z: Tensor) -> Tensor:
        y: Tensor = self.output_dropout(super().lifted(z))
        return y


# ---- the method


@dataclass(frozen=True, kw_only=True)
class PETALface(Contextual):
    """Two adapters blended by quality; ``lorank.convert(model, PETALface(rank=8))``, then `lorank.set_context(model, quality)`."""

    name: ClassVar[str] = "petalface"
    layer: ClassVar[type[Adapted]] = PETALfaceLinear

    rank: Rank = 8
    """r of each of the two: an integer, a fraction of the width, or {pattern: either}."""
    threshold: float = 0.5
    """q_0, the quality at which both adapters count the same."""
    scale: Positive = 1.0
    """s."""
    dropout: Annotated[float, Bounds(least=0, below=1)] = 0.0
    """Dropout of the adapters' output in training; the authors take 0.1."""

    def build(self, site: Site) -> nn.Module:
        settings = {"scale": self.scale, "dropout": self.dropout, "threshold": self.threshold}
        return PETALfaceLinear(site.linear, rank_at(self.rank, site), **settings)

    def context(self, value: Any) -> Tensor:
        quality = torch.as_tensor(value, dtype=torch.float32)
        if quality.ndim > 1 or not bool(quality.isfinite().all()):
            raise ValueError(f"a quality must be a finite number, or one for each sample, got {value}")
        return quality
