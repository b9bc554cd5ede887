"""Convolutions as two: a spatial one to r channels, and one of a single tap from there.

    W ≈ B A     W [c_out, c_in k]   A [r, c_in k]   B [c_out, r]     k taps, such as 3 x 3

A is a convolution with the taps, stride, padding and dilation of W and without a bias, B one of a single tap with the bias. With g groups
each group has its own A and B of r / g channels, so that no group reads another: r is rounded up to a multiple of g. The factors
of each group are the best of their rank in the Frobenius norm (`lorank.factors.nearest`).

Cost: r (c_in k / g + c_out / g) parameters instead of c_out c_in k / g. They are fewer below the break-even rank c_out c_in k / (c_in k + c_out),
with g groups too; `part` of it is taken, rounded down, and a convolution stays dense where no rank saves anything.

Source: Cahyawijaya, "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation",
arXiv 2108.10808.

Departures: in the author's package the second convolution mixes groups, so that its start is wrong for grouped ones; the singular
values are divided between the factors.
"""

import re
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorank.factors import nearest
from lorank.layers import like
from lorank.rewriting import put

Convolution = nn.Conv1d | nn.Conv2d
Model = TypeVar("Model", bound=nn.Module)


def break_even(conv: Convolution) -> float:
    """The rank at which two convolutions have as many weights as one."""
    c_out, per_group = conv.weight.shape[0], conv.weight[0].numel()
    return c_out * per_group * conv.groups / (per_group * conv.groups + c_out)


def factors(weight: Tensor, rank: int, groups: int) -> tuple[Tensor, Tensor]:
    """B [c_out, r / g] and A [r, c_in / g, *taps] of a kernel [c_out, c_in / g, *taps]; r is a multiple of g."""
    pairs = [nearest(one.flatten(1), rank // groups) for one in weight.chunk(groups)]
    A = torch.cat([A for _, A in pairs])
    return torch.cat([B for B, _ in pairs]), A.view(len(A), *weight.shape[1:])


@torch.no_grad()
def factored(conv: Convolution, rank: int) -> nn.Sequential:
    """Two convolutions of that rank, rounded up to a multiple of the groups.

    Raises:
        ValueError: rank is not from 1 to the largest that the kernel can have.
    """
    g, most = conv.groups, conv.groups * min(conv.weight.shape[0] // conv.groups, conv.weight[0].numel())
    r = -(-rank // g) * g
    if not 1 <= rank <= most:
        raise ValueError(f"rank must be from 1 to {most} for {conv}, got {rank}")
    kind: Any = nn.Conv1d if isinstance(conv, nn.Conv1d) else nn.Conv2d
    spatial = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    first = kind(conv.in_channels, r, conv.kernel_size, groups=g, bias=False, **spatial, **like(conv.weight))
    last = kind(r, conv.out_channels, 1, groups=g, bias=conv.bias is not None, **like(conv.weight))
    B, A = factors(conv.weight, r, g)
    first.weight.copy_(A)
    last.weight.copy_(B.view_as(last.weight))
    if conv.bias is not None:
        last.bias.copy_(conv.bias)
    return nn.Sequential(first, last).train(conv.training)


def fit_convolutions(model: Model, *, part: float = 0.5, targets: str | None = None) -> Model:
    """Replace ``nn.Conv1d`` and ``nn.Conv2d`` of any model, in place, by two of a part of the break-even rank.

    A convolution in which no such rank saves weights stays as it is, depthwise ones among them. transformers' Auto classes do not
    know the result: save its ``state_dict``, and call this on a new model before it is loaded.

    Args:
        targets: a regular expression searched in names of modules; only matching convolutions are replaced.

    Raises:
        ValueError: part is not above 0 and at most 1, or nothing matches.
    """
    if not 0 < part <= 1:
        raise ValueError(f"part must be above 0 and at most 1, got {part}")
    kinds = (nn.Conv1d, nn.Conv2d)
    found = {n: m for n, m in model.named_modules() if type(m) in kinds and re.search(targets or "", n)}
    if not found:
        raise ValueError(
            f"targets must match an nn.Conv1d or nn.Conv2d of the model, got {targets!r}, which matches none"
        )
    for name, conv in found.items():
        assert isinstance(conv, nn.Conv1d | nn.Conv2d)
        rank = int(part * break_even(conv)) // conv.groups * conv.groups
        if 1 <= rank < break_even(conv):
            put(model, name, factored(conv, rank))
    return model
