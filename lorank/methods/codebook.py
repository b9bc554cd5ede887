"""A codebook after a linear map: every few neighbouring weights of a row are one of K vectors of a subspace.

    y = W x (+ b), W[i, v j : v (j + 1)] = C[q_ij] M     x [..., d_in]   W [d_out, d_in]   b [d_out]
    C [K, e] codewords   M [e, v] the map, e ≤ v   q [d_out, ⌈d_in / v⌉] which codeword

Saves: weights, gradients, optimizer state.

C and M are trained by whatever loss the model has, end to end; q is drawn or fitted once (`lorank.fit(model, "codebook")`) and never
changes: a buffer, saved with the model. If v does not divide d_in, the last entries of a row's last vector are not used.

Cost of one layer, K = codewords: K e + e v parameters, and d_out ⌈d_in / v⌉ codes of log₂ K bits, stored in a byte each, or two from
257 codewords on. W is formed in each call and kept for the backward pass, so activations and FLOPs are not saved: 2 K e v operations
are added to the dense layer's.

Source: "Learning Low-Rank Representations for Model Compression" (LR²VQ), IJCNN 2023, arXiv 2211.11397.

Our reading: where the map is, how codes are chosen and how assignments are relaxed is not known to us. Here the map is linear and shared
by a matrix, and codes are hard and fixed in training, where the paper trains with a differentiable clustering.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.fields import Count, Rank
from lorank.layers import like, loaded
from lorank.method import Method, Site, check_table, rank_at, seeded_generator

# ---- the mathematics


def code_type(codewords: int) -> torch.dtype:
    """The smallest type that holds a code."""
    return torch.uint8 if codewords <= 256 else torch.int16 if codewords <= 2**15 else torch.int32


def assembled(codewords: Tensor, map_: Tensor, codes: Tensor, d_in: int) -> Tensor:
    """W [d_out, d_in] of C [K, e], M [e, v] and q [d_out, ⌈d_in / v⌉]."""
    return F.embedding(codes.int(), codewords @ map_).flatten(1)[:, :d_in]


# ---- the layer


class CodebookLinear(nn.Module):
    """y = W x + b with W of codewords."""

    codes: Tensor

    def __init__(
        self, d_in: int, d_out: int, codewords: int, dimensions: int, size: int, *, bias: bool = False, **new: Any
    ):
        super().__init__()
        self.d_in = d_in
        self.C = nn.Parameter(torch.empty(codewords, dimensions, **new))
        self.M = nn.Parameter(torch.empty(dimensions, size, **new))
        self.bias = nn.Parameter(torch.empty(d_out, **new)) if bias else None
        kind: dict[str, Any] = {"dtype": code_type(codewords), "device": new.get("device")}
        self.register_buffer("codes", torch.empty(d_out, -(-d_in // size), **kind))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Entries of W of variance 1 / d_in, and codes at random."""
        nn.init.normal_(self.C)
        nn.init.normal_(self.M, std=(self.d_in * len(self.M)) ** -0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.d_in**-0.5), self.d_in**-0.5)
        if not self.codes.is_meta and not loaded(self.codes):
            generator = seeded_generator("codebook", *self.codes.shape)
            drawn = torch.randint(len(self.C), self.codes.shape, generator=generator, device="cpu")
            self.codes.copy_(drawn)

    def weight(self) -> Tensor:
        """W [d_out, d_in]."""
        return assembled(self.C, self.M, self.codes, self.d_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the dense layer that computes the same."""
        return self.weight(), self.bias

    def extra_repr(self) -> str:
        (K, e), v = self.C.shape, self.M.shape[1]
        return f"d_in={self.d_in}, d_out={len(self.codes)}, codewords={K}, dimensions={e}, size={v}"


# ---- the method


@dataclass(frozen=True, kw_only=True)
class Codebook(Method):
    """A codebook after a linear map; ``lorank.fit(model, "codebook")`` makes it from trained weights."""

    name: ClassVar[str] = "codebook"

    codewords: Rank = 256
    """K: an integer, a fraction of the width, or {pattern: either}."""
    size: Count = 8
    """v, weights of a row that share a code."""
    dimensions: Count = 4
    """e, of the codewords before the map; at most v, where the map takes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dimensions > self.size:
            raise ValueError(f"dimensions must be at most size={self.size}, got {self.dimensions}")

    def check(self, sites: Sequence[Site]) -> None:
        check_table(self.codewords, sites, "codewords")

    def build(self, site: Site) -> nn.Module:
        options: dict[str, Any] = {"bias": site.linear.bias is not None, **like(site.linear.weight)}
        K = rank_at(self.codewords, site)
        return CodebookLinear(site.d_in, site.d_out, K, self.dimensions, self.size, **options)
