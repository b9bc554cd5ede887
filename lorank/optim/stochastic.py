"""Stochastic rounding of bfloat16 weights: up or down by chance, so that what is stored has the exact weight as its mean.

    W ← ⌊V⌋ + u  with probability (V - ⌊V⌋) / u,  else ⌊V⌋

    V the new weight in fp32     ⌊V⌋ the bfloat16 next to it towards 0     u the distance to the one after it

bfloat16 has 8 significant bits. Rounded to the nearest, a step of less than 0.2 % of a weight, and weight decay at usual learning
rates, change nothing, however often they are repeated.

Source: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv 1502.02551.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorank.optim.shards import like, local


def rounded(V: Tensor, seed: int, of: Tensor | None = None) -> Tensor:
    """V, fp32, in bfloat16: the same for one seed, however many processes share the parameter `of` that V is, or is a part of.

    >>> W = rounded(torch.full((10_000,), 1 + 2**-10), seed=0)  # an eighth of the way from 1 to 1 + 2**-7
    >>> sorted(set(W.tolist())), abs(W.float().mean().item() - (1 + 2**-10)) < 1e-4
    ([1.0, 1.0078125], True)
    """
    generator = torch.Generator(V.device).manual_seed(seed)
    bits = V.contiguous().view(torch.int32)
    whole = V if of is None else of
    noise = torch.randint(0, 1 << 16, whole.shape, generator=generator, device=V.device, dtype=torch.int32)
    noise = local(like(noise, whole))  # each process takes its part of what one would draw
    up = ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
    return torch.where(up.isfinite(), up, V.to(torch.bfloat16))  # what is not finite, or would not be, as usual


class Rounding:
    """How one step changes weights: those in bfloat16 in single precision, rounded by chance if it is `wanted`; others as they are."""

    def __init__(self, groups: Sequence[dict[str, Any]], *, wanted: bool):
        self.groups, self.wanted = groups, wanted
        self.places = {p: i for i, p in enumerate(p for group in groups for p in group["params"])} if wanted else {}

    def applies(self, p: Tensor) -> bool:
        return self.wanted and p.dtype == torch.bfloat16

    def exact(self, p: Tensor) -> Tensor:
        """The parameter, or a copy in single precision if it will be rounded by chance."""
        return p.float() if self.applies(p) else p

    def store(self, V: Tensor, p: nn.Parameter, group: dict[str, Any]) -> None:
        """V, whole or sharded like `p`, into `p`."""
        if V is p:
            return
        part = local(V if isinstance(V, DTensor) else like(V, p))
        if self.applies(p):
            part = rounded(part, group.get("roundings", 0) * 1_000_003 + self.places[p], of=p)
        local(p).copy_(part)

    def count(self) -> None:
        """Let the next step draw anew."""
        for group in self.groups if self.wanted else ():
            group["roundings"] = group.get("roundings", 0) + 1
