"""LoRA: a frozen trained weight, and two small factors whose product is added to it.

    y = W x + (α/r) B A dropout(x) (+ b)      x [..., d_in]   A [r, d_in]   B [d_out, r]   W [d_out, d_in] frozen

Saves: gradients, optimizer state.

A is Kaiming-uniform and B zero, so the model starts as the trained one. Everything else of it is frozen too: embeddings,
norms, biases and head. Merged, W + (α/r) B A, it is a dense layer that costs nothing more. `lorank.export_peft` writes
the factors in peft's format.

Cost of a layer: r (d_in + d_out) trained parameters; for n tokens 2 n (d_in d_out + r (d_in + d_out)) operations forward; backward
the first term once more, if the layers below train too, and the second twice.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685, and microsoft/LoRA.

Departures from the authors' code. It adapts query and value projections unless told otherwise; here all projections of the blocks
are adapted (`targets` chooses). Their scale α/r becomes α/√r with `rank_stabilised` (Kalajdzievski, arXiv 2312.03732).
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from lorank.adapters.gated import Adapted, Adapter, GatedAdapter
from lorank.fields import Bounds, Positive
from lorank.layers import scale_at
from lorank.method import Site, rank_at

# ---- the layer


class LoRALinear(GatedAdapter):
    """y = W x + s B A dropout(x) + b."""

    def __init__(self, *dense_and_rank: Any, **options: Any):
        super().__init__(*dense_and_rank, **options)
        self.reset_parameters()


# ---- the method


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """LoRA with its hyper-parameters; ``lorank.convert(model, LoRA(rank=16))``."""

    name: ClassVar[str] = "lora"
    layer: ClassVar[type[Adapted]] = LoRALinear

    alpha: Positive = 32.0
    """The low-rank term is multiplied by α/r."""
    rank_stabilised: bool = False
    """Multiply it by α/√r instead, so that one learning rate suits all ranks."""
    dropout: Annotated[float, Bounds(least=0, below=1)] = 0.0
    """Dropout of the factors' input in training."""

    def options(self, site: Site) -> dict[str, Any]:
        rank = rank_at(self.rank, site)
        scale = self.alpha / rank**0.5 if self.rank_stabilised else scale_at(self.alpha, None, rank)
        return {"scale": scale, "dropout": self.dropout}
