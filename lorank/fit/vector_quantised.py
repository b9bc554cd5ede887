"""LR²VQ: sub-vectors of a matrix as codewords of a subspace, fitted to what the layer gives on calibration text.

    W[i, v j : v (j + 1)] ≈ C[q_ij] M     min |(W − W̃) Xᵀ|     W [m, n]   C [K, e]   M [e, v]   q [m, ⌈n / v⌉]

    map        the e leading right singular vectors of all sub-vectors
    codewords  k-means in those e dimensions, from a start that D² sampling draws, until no code changes or for `sweeps` rounds
    end        `steps` of Adam on C and M against |(W − W̃) R|, R Rᵀ = XᵀX, with q fixed; without text R = I. The start stays if it is better

Then C and M may be trained further with the model's own loss (`lorank pretrain --start-from`). The fitted model is `lorank.Codebook`.

Cost of a matrix, in numbers of 32 bits: K e + e v, and m ⌈n / v⌉ ⌈log₂ K⌉ / 32 for the codes, about n m log₂ K / 32 v. In files
a code takes one byte, or two from 257 codewords on.

Source: "Learning Low-Rank Representations for Model Compression" (LR²VQ), IJCNN 2023, arXiv 2211.11397.

Our reading: the paper learns the low-dimensional representation and the codebook end to end with a relaxed clustering that we do not
know. Here codes are hard, and what is learned end to end are codewords and map.
"""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorank.fields import Count, Whole
from lorank.fit.structure import Found, Metric, Structure
from lorank.method import Method, seeded_generator
from lorank.methods.codebook import Codebook, CodebookLinear, assembled, code_type

AT_ONCE = 2**24
"""Distances that are formed at once."""
DRAWN_FROM = 2**14
"""Sub-vectors from which the first codewords are drawn, about."""
RATE = 0.02
"""Learning rate at first, in units of a factor's mean magnitude; it falls to zero along a line."""


def code_bits(codewords: int) -> int:
    """⌈log₂ K⌉."""
    return max(1, math.ceil(math.log2(codewords)))


def sub_vectors(weight: Tensor, size: int) -> Tensor:
    """[m ⌈n / v⌉, v] of W [m, n], with zeros at the end of a row if v does not divide n."""
    return nn.functional.pad(weight, (0, -weight.shape[1] % size)).reshape(-1, size)


def nearest_codes(points: Tensor, codewords: Tensor) -> Tensor:
    """The number of the nearest codeword [K, e] for each point [N, e]."""
    parts = points.split(max(1, AT_ONCE // len(codewords)))
    half = codewords.square().sum(1) / 2
    return torch.cat([(half - part @ codewords.mT).argmin(1) for part in parts])


def first_codewords(points: Tensor, most: int) -> Tensor:
    """Up to K of the points, each drawn with a probability that grows with the squared distance from those before."""
    generator = seeded_generator("codebook", *points.shape, most)
    some = points[:: max(1, len(points) // max(DRAWN_FROM, most))]
    chosen = [0]
    far = (some - some[0]).square().sum(1)
    while len(chosen) < most and far.max() > 1e-12 * some.square().sum(1).max():
        chosen.append(int(torch.multinomial(far.float().cpu(), 1, generator=generator)))
        far = torch.minimum(far, (some - some[chosen[-1]]).square().sum(1))
    return some[chosen].clone()


def clustered(points: Tensor, most: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Codewords [K', e], K' ≤ K, and codes [N]: k-means."""
    codewords = first_codewords(points, most)
    codes = nearest_codes(points, codewords)
    for _ in range(sweeps):
        counts = torch.bincount(codes, minlength=len(codewords)).to(points.dtype)[:, None]
        sums = torch.zeros_like(codewords).index_add_(0, codes, points)
        codewords = torch.where(counts > 0, sums / counts.clamp(min=1), codewords)
        before, codes = codes, nearest_codes(points, codewords)
        if torch.equal(before, codes):
            break
    return codewords, codes


def improved(
    weight: Tensor, R: Tensor | None, C: Tensor, M: Tensor, codes: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """C and M after so many steps of Adam on |(W − W̃) R|; those before, if they are better."""
    n = weight.shape[1]

    def lack(C: Tensor, M: Tensor) -> Tensor:
        rest = weight - assembled(C, M, codes, n)
        return (rest if R is None else rest @ R).square().sum()

    factors = [one.clone().requires_grad_() for one in (C, M)]
    scale = lack(C, M).clamp(min=torch.finfo(C.dtype).tiny)
    with torch.enable_grad():
        optimizer = torch.optim.Adam(
            [{"params": [one], "lr": RATE * one.detach().abs().mean().item()} for one in factors]
        )
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, steps))
        for _ in range(steps):
            optimizer.zero_grad()
            (lack(*factors) / scale).backward()
            optimizer.step()
            rates.step()
    found = [one.detach() for one in factors]
    return (found[0], found[1]) if lack(*found) < lack(C, M) else (C, M)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorQuantised(Structure):
    """Codewords after a linear map; ``lorank.fit(model, "codebook", batches, budget=0.05)``."""

    name: ClassVar[str] = "codebook"
    usual: ClassVar[float] = 0.05
    has_spectrum: ClassVar[bool] = False
    counts: ClassVar[str] = "codewords, maps and codes, in numbers of 32 bits"

    size: Count = 8
    """v, weights of a row that share a code."""
    dimensions: Count = 4
    """e, of the codewords before the map."""
    sweeps: Whole = 30
    """Of k-means, at most."""
    steps: Whole = 100
    """Of training codewords and map of a layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.method(1)  # which checks the sizes

    def method(self, rank: int | dict[str, int]) -> Method:
        return Codebook(codewords=rank, size=self.size, dimensions=self.dimensions)

    def parameters(self, rank: int, d_in: int, d_out: int, members: int = 1) -> int:
        codes = d_out * -(-d_in // self.size)
        return (rank + self.size) * self.dimensions + -(-codes * code_bits(max(1, rank)) // 32)

    def rank_within(self, room: float, d_in: int, d_out: int, members: int = 1) -> int:
        most = min(d_out * -(-d_in // self.size), 2**15)
        found = [0]
        for bits in range(1, code_bits(most) + 1):
            left = room - self.parameters(2**bits, d_in, d_out) + 2**bits * self.dimensions
            found.append(min(2**bits, most, math.floor(left / self.dimensions)))
        return max(found)

    def solve(self, weight: Tensor, metric: Metric, rank: int) -> Found:
        points = sub_vectors(self.target(weight), self.size)
        M = torch.linalg.svd(points, full_matrices=False)[2][: self.dimensions]
        C, codes = clustered(points @ M.mT, rank, self.sweeps)
        codes = codes.view(len(weight), -1)
        C, M = improved(self.target(weight), metric.R, C, M, codes, self.steps)
        C = torch.cat([C, C.new_zeros(rank - len(C), C.shape[1])])  # codewords that nothing uses
        return {"C": C.to(weight.dtype), "M": M.to(weight.dtype), "codes": codes.to(code_type(rank))}

    def apply(self, found: Found, x: Tensor) -> Tensor:
        return x @ assembled(found["C"], found["M"], found["codes"], x.shape[-1]).mT

    @torch.no_grad()
    def fill(self, layer: nn.Module, found: Found, bias: Tensor | None) -> None:
        assert isinstance(layer, CodebookLinear)
        for mine, its in ((layer.C, "C"), (layer.M, "M"), (layer.codes, "codes")):
            mine.copy_(found[its])
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
