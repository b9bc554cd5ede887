"""CoLA: low-rank activations. Every projection of a transformer block becomes a bottleneck with a non-linearity inside.

    y = B σ(A x) (+ b)        x [..., d_in]   A [r, d_in]   B [d_out, r]   b [d_out]   σ = SiLU

The dense weight W [d_out, d_in] is gone: A and B are ordinary trainable parameters, drawn so that B A has entries of
standard deviation τ = (d_in + d_out)^(-1/2). With σ in every layer the block's own activation can go as well
(`nonlinearity`).

Cost of one layer, r = rank, for n tokens: r (d_in + d_out) parameters instead of d_in d_out; 2 n r (d_in + d_out)
floating-point operations forward and twice that backward. Its input and two [n, r] tensors are kept for backward, so
CoLA alone does not save activation memory. CoLA-M does: per block it keeps the block's input [n, d] and the seven A x
[n, r], and re-runs everything else but the A's and the last B: 18 n d r + 4 n² d operations at d_ff = 2.5 d.

Source: Liu et al., "CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation", EMNLP 2025, arXiv
2502.10940.

Departures from the paper. It keeps the residual stream twice per block, 2 n d + 7 n r, and quotes 18.5 n d r + 4 n² d;
here the second n d comes out of re-running B, and the last B is not needed again.

Departures from the authors' code. A's output is kept before σ, so that backward re-runs σ and B but never A; theirs
keeps it after σ and re-runs all. Fused projections (GPT-2's query, key and value) get one bottleneck each, and
grouped-query attention works. σ is the `activation` field, not the model's `hidden_act`. "reduced" is our reading of a
name in the paper's ablation; see `CoLA.nonlinearity`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.architectures import GATE
from lorank.checkpointing import checkpoint, keep_bottlenecks
from lorank.fields import Rank
from lorank.layers import linear
from lorank.method import Method, Published, Site, check_ranks, rank_at
from lorank.rewriting import drop_activations
from lorank.sizes import SIZES

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


# ---- the mathematics


def entry_std(d_in: int, d_out: int, rank: int) -> float:
    """Standard deviation s of the entries of A and B: Var[(B A)_ij] = r s⁴ is to be τ² = 1 / (d_in + d_out).

    >>> round(entry_std(512, 1376, 128), 6)
    0.045102
    """
    return (rank * (d_in + d_out)) ** -0.25


# ---- the layer


class CoLALinear(nn.Module):
    """y = B σ(A x) + b in place of a dense layer; σ is "silu", "gelu", "relu", or None for a linear bottleneck."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        bias: bool = False,
        activation: str | None = "silu",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation = activation
        self.A = nn.Linear(d_in, rank, bias=False, device=device, dtype=dtype)
        self.B = linear(rank, d_out, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        d_in, rank, d_out = self.A.in_features, self.A.out_features, self.B.out_features
        s = entry_std(d_in, d_out, rank)
        nn.init.normal_(self.A.weight, std=s)
        nn.init.normal_(self.B.weight, std=s)
        if self.B.bias is not None:
            nn.init.uniform_(self.B.bias, -(d_out**-0.5), d_out**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.A(x)  # [..., r]: all that CoLA-M remembers
        return self.B(z if self.activation is None else ACTIVATIONS[self.activation](z))

    def extra_repr(self) -> str:
        return (
            f"d_in={self.A.in_features}, d_out={self.B.out_features}, rank={self.A.out_features}, "
            f"activation={self.activation}"
        )


# ---- the method

Nonlinearity = Literal["both", "low-rank", "reduced", "original"]


@dataclass(frozen=True, kw_only=True)
class CoLA(Method):
    """CoLA with its hyper-parameters; ``lorank.convert(model, CoLA(rank=128))``.

    Raises ValueError for a rank that is not positive and for unknown names.
    """

    name: ClassVar[str] = "cola"
    # the authors' configurations, 60m to 7b; tiny and 20m are ours
    published: ClassVar[Published] = {
        name: {"rank": size.rank, "nonlinearity": "low-rank" if name in ("350m", "1b", "7b") else "both"}
        for name, size in SIZES.items()
    }

    rank: Rank = 0.25
    """Width of the bottlenecks: an integer, a fraction of the width (the paper's default d/4), or {pattern: either}."""
    nonlinearity: Nonlinearity = "both"
    """Where a non-linearity remains (the paper's ablation): "both" in every bottleneck and at the block's own place
    (60M, 130M); "low-rank" in every bottleneck only (350M and up); "reduced" only in the bottleneck of the projection
    that fed the block's own activation, which goes; "original" only at the block's own place, so that the factorisation
    is linear."""
    activation: str = "silu"
    """σ: "silu", "gelu" or "relu"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nonlinearity not in get_args(Nonlinearity):
            raise ValueError(f"nonlinearity={self.nonlinearity!r} is none of {', '.join(get_args(Nonlinearity))}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is none of {', '.join(ACTIVATIONS)}")

    @property
    def _drops_original(self) -> bool:
        return self.nonlinearity in ("low-rank", "reduced")

    def check(self, sites: Sequence[Site]) -> None:
        check_ranks(self.rank, sites)
        if self._drops_original and not any(GATE.search(site.name) for site in sites):
            raise ValueError(
                f"nonlinearity={self.nonlinearity!r} moves the block's own activation into the projection before it, and no "
                f"projection to convert is known, by its name, to be that one; convert it too or use nonlinearity='both'"
            )

    def build(self, site: Site) -> nn.Module:
        inside = {"both": True, "low-rank": True, "reduced": GATE.search(site.name) is not None, "original": False}
        return CoLALinear(
            site.d_in,
            site.d_out,
            rank_at(self.rank, site),
            bias=site.linear.bias is not None,
            activation=self.activation if inside[self.nonlinearity] else None,
            device=site.linear.weight.device,
            dtype=site.linear.weight.dtype,
        )

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        raise ValueError(
            f"{self.name} cannot be merged: with the non-linearity between A and B no layer is a dense one"
        )

    def finish(self, model: nn.Module) -> None:
        if self._drops_original:
            drop_activations(model, lambda name, module: isinstance(module, CoLALinear) and bool(GATE.search(name)))


@dataclass(frozen=True, kw_only=True)
class CoLAM(CoLA):
    """CoLA-M: the same model, training with only the bottlenecks kept for backward (`lorank.keep_bottlenecks`)."""

    name: ClassVar[str] = "cola-m"
    policy: ClassVar[str | None] = "bottlenecks"

    def finish(self, model: nn.Module) -> None:
        super().finish(model)
        checkpoint(model, keep_bottlenecks)
