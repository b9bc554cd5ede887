"""Cheaper matrices in the place of a trained one: rounded to few bits, or with most entries zero. What they lack is left to factors.

The values are those that a format's kernels would compute with; they are stored as ordinary numbers.
"""

from typing import Literal

import torch
from torch import Tensor

Base = Literal["int8", "int4", "int3", "int2", "2:4", "magnitude"]


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Each `group` of entries of a row [m, n] on a grid of 2^bits values from its least to its largest, which also holds zero.

    q = round(w / s) + z in 0 … 2^bits − 1,  s = (max − min) / (2^bits − 1),  z = round(−min / s),  w ← s (q − z)
    """
    m, n = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -n % group)).view(m, -1, group)
    low, high = padded.amin(-1, keepdim=True).clamp(max=0), padded.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
    zero = (-low / step).round()
    q = ((padded / step).round() + zero).clamp(0, 2**bits - 1)
    return (step * (q - zero)).view(m, -1)[:, :n]


def pruned(weight: Tensor, share: float) -> Tensor:
    """With so large a share of the entries [m, n] zero, those of least magnitude."""
    kept = weight.numel() - round(share * weight.numel())
    chosen = weight.abs().flatten().topk(kept).indices
    return torch.zeros_like(weight).flatten().index_copy_(0, chosen, weight.flatten()[chosen]).view_as(weight)


def two_of_four(weight: Tensor) -> Tensor:
    """With the two entries of least magnitude zero in each four that follow one another in a row [m, n]."""
    m, n = weight.shape
    fours = torch.nn.functional.pad(weight, (0, -n % 4)).view(m, -1, 4)
    kept = torch.zeros_like(fours).scatter_(-1, fours.abs().topk(2, -1).indices, 1.0)
    return (fours * kept).view(m, -1)[:, :n]


def cheaper(weight: Tensor, base: Base, group: int, share: float) -> Tensor:
    """The weight in one of these forms."""
    if base == "2:4":
        return two_of_four(weight)
    if base == "magnitude":
        return pruned(weight, share)
    return rounded(weight, int(base.removeprefix("int")), group)
