"""Greenformers' other forms: convolutions as two, and factors without negative entries."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lorank.fit import SVD, fit
from lorank.fit.convolutions import break_even, factored, fit_convolutions
from lorank.fit.nmf import nmf, semi_nmf
from lorank.fit.structure import Metric


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_all_ranks_are_the_convolution(kind: type, groups: int) -> None:
    torch.manual_seed(0)
    conv = kind(8, 12, 3, stride=2, padding=1, dilation=2, groups=groups).double()
    x = torch.randn(2, 8, *([13] * (1 if kind is nn.Conv1d else 2)), dtype=torch.float64)
    torch.testing.assert_close(factored(conv, 12)(x), conv(x), rtol=1e-10, atol=1e-12)
    half = factored(conv, 5)
    r = 5 if groups == 1 else 8
    assert half[0].out_channels == r
    count = sum(p.numel() for p in half.parameters())
    assert count == r * conv.weight[0].numel() + r * 12 // groups + 12
    kernels = [one.flatten(1) for one in conv.weight.chunk(groups)]
    found = [
        b.flatten(1) @ a.flatten(1)
        for b, a in zip(half[1].weight.chunk(groups), half[0].weight.chunk(groups), strict=True)
    ]
    for kernel, low in zip(kernels, found, strict=True):
        tail = torch.linalg.svdvals(kernel)[r // groups :].norm()
        torch.testing.assert_close(torch.linalg.norm(kernel - low), tail, rtol=1e-9, atol=1e-12)
    dense = nn.functional.conv1d if kind is nn.Conv1d else nn.functional.conv2d
    whole = torch.cat(found).view_as(conv.weight)
    torch.testing.assert_close(half(x), dense(x, whole, conv.bias, 2, 1, 2, groups), rtol=1e-9, atol=1e-12)


def test_only_what_saves_weights_is_replaced() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 4, 1))
    before = [sum(p.numel() for p in layer.parameters()) for layer in model]
    assert break_even(model[0]) == 32 * 144 / (32 + 144)
    fit_convolutions(model, part=1.0)
    assert isinstance(model[0], nn.Sequential) and isinstance(model[1], nn.Conv2d)
    after = [sum(p.numel() for p in layer.parameters()) for layer in model]
    assert after[0] < before[0] and after[2] <= before[2]
    with pytest.raises(ValueError, match="targets must match an nn.Conv1d or nn.Conv2d"):
        fit_convolutions(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"got one with 1 convolutions? instead; use lorank.fit.convolutions"):
        fit(nn.Sequential(nn.Conv2d(16, 32, 3)), "svd")
    with pytest.raises(ValueError, match="rank must be from 1 to 32"):
        factored(nn.Conv2d(16, 32, 3), 33)


def test_factors_without_negative_entries() -> None:
    """Their errors fall from iteration to iteration, and what has such factors is found."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    W, R = draw(14, 12), torch.linalg.cholesky(torch.cov(draw(12, 40)))
    for root in (None, R):
        errors = []
        for iterations in range(8):
            B, A = semi_nmf(W, 4, root, iterations)
            assert A.min() >= 0
            errors.append(torch.linalg.norm((W - B @ A) if root is None else (W - B @ A) @ root).item())
        assert all(new <= old * (1 + 1e-9) for old, new in pairwise(errors))
    exact = draw(10, 2).abs() @ draw(2, 9).abs()
    B, A = nmf(exact, 2, 400)
    assert min(B.min(), A.min()) >= 0 and torch.linalg.norm(exact - B @ A) < 0.02 * torch.linalg.norm(exact)
    found = SVD(solver="semi-nmf").solve(W, Metric(R), 4)
    assert found["A"].min() >= 0
    with pytest.raises(ValueError, match="must have no negative entries for solver 'nmf'"):
        SVD(solver="nmf").solve(W, Metric(), 4)
