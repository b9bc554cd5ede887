"""Adapters of convolutions, against dense kernels."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorank.adapters.cp_conv import AdaptedConv2d, adapt_convolutions, channel_norms, merge_convolutions


def adapted(structure: Any, magnitude: bool = False, **conv: Any) -> AdaptedConv2d:
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 8, (3, 5), **conv).double()
    return AdaptedConv2d(dense, 3, structure=structure, scale=0.5, magnitude=magnitude)


@pytest.mark.parametrize("conv", [{}, {"stride": (2, 1), "padding": (1, 2)}, {"padding": 2, "dilation": (1, 2)}])
def test_a_cp_update_is_a_chain_of_four_convolutions(conv: dict[str, Any]) -> None:
    layer, x = adapted("cp", **conv), torch.randn(2, 6, 12, 14, dtype=torch.float64)
    nn.init.normal_(layer.a)
    dense = torch.zeros_like(layer.W.weight)
    for q in range(3):  # one outer product of four vectors at a time
        a, b, c, d = (factor[:, q] for factor in (layer.a, layer.b, layer.c, layer.d))
        dense = dense + a[:, None, None, None] * b[:, None, None] * c[:, None] * d
    expected = F.conv2d(x, layer.W.weight + 0.5 * dense, layer.W.bias, **conv)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_other_structures_are_products_of_two_factors() -> None:
    x = torch.randn(2, 6, 12, 14, dtype=torch.float64)
    layer = adapted("conv")
    nn.init.normal_(layer.B)
    expected = layer.W(x) + 0.5 * F.conv2d(F.conv2d(x, layer.A), layer.B[:, :, None, None])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    unfolded = adapted("matrix")
    nn.init.normal_(unfolded.B)
    assert torch.linalg.matrix_rank(unfolded.update().reshape(8 * 3, 6 * 5)) == 3


@pytest.mark.parametrize(("structure", "count"), [("cp", 134), ("conv", 640), ("matrix", 384)])
def test_parameters_of_a_rank(structure: Any, count: int) -> None:
    layer = AdaptedConv2d(nn.Conv2d(64, 64, 3), 1, structure=structure, scale=1.0, magnitude=False)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("structure", ["cp", "conv", "matrix"])
def test_magnitudes_begin_as_the_identity_and_set_lengths(structure: Any) -> None:
    layer, x = adapted(structure, magnitude=True), torch.randn(2, 6, 12, 14, dtype=torch.float64)
    assert torch.equal(layer(x), layer.W(x))
    nn.init.normal_(layer.a if structure == "cp" else layer.B)
    assert layer.mu is not None
    layer.mu.data.mul_(2)
    torch.testing.assert_close(channel_norms(layer.kernel()), layer.mu)


def test_a_u_net_learns_and_merges() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 1, 3, padding=1),
    )  # fmt: skip
    frozen, x = copy.deepcopy(model.state_dict()), torch.randn(4, 1, 8, 8)
    adapt_convolutions(model, rank=4, targets="[36]")
    assert type(model[0]) is nn.Conv2d and isinstance(model[3], AdaptedConv2d)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - x.roll(1, 3)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(model[3].W.weight, frozen["3.weight"]) and model[1].weight.grad is None
    expected = model.eval()(x)
    merge_convolutions(model)
    assert type(model[3]) is nn.Conv2d and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_adapted_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"^0 must be a convolution without groups, .* leave it out with targets"):
        adapt_convolutions(model)
    with pytest.raises(ValueError, match="targets must match an nn.Conv2d of the model, got 'x', which matches none"):
        adapt_convolutions(model, targets="x")
    with pytest.raises(ValueError, match="structure must be 'cp', 'conv' or 'matrix', got 'tt'"):
        adapt_convolutions(model, structure="tt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be a positive integer, got 0"):
        adapt_convolutions(model, rank=0)
    assert type(model[1]) is nn.Conv2d and all(p.requires_grad for p in model.parameters())
    adapt_convolutions(model, targets="1")
