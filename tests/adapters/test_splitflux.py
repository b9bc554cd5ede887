"""SplitFlux: two branches, blended by token, and kept apart by a loss."""

from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank.adapters.splitflux import SplitFluxLinear, complement, complementary_loss, saliency


def layer() -> SplitFluxLinear:
    torch.manual_seed(0)
    made = SplitFluxLinear(nn.Linear(12, 10), [4, 2], scale=1.0)
    nn.init.normal_(made.B.weight)
    return made


def test_saliency_is_the_logistic_of_the_standardised_length() -> None:
    e = torch.randn(3, 7, 5, dtype=torch.float64)
    lengths = e.square().sum(-1).sqrt()
    centred = lengths - lengths.mean(1, keepdim=True)
    expected = 1 / (1 + torch.exp(-centred / centred.square().mean(1, keepdim=True).sqrt()))
    torch.testing.assert_close(saliency(e), expected)
    assert torch.equal(saliency(torch.ones(1, 4, 9)), torch.full((1, 4), 0.5))


def test_each_token_blends_the_two_branches() -> None:
    module, x = layer(), torch.randn(3, 5, 12)
    main, rest = ((x @ module.A.weight[b].T) @ module.B.weight[:, b].T for b in map(module.block, (0, 1)))
    torch.testing.assert_close(module(x), module.W(x) + 0.5 * (main + rest))
    for g in (torch.rand(3, 5), torch.rand(1, 5), torch.tensor(0.25)):
        module.context.value = g
        torch.testing.assert_close(module(x), module.W(x) + g[..., None] * main + (1 - g[..., None]) * rest)
        assert torch.equal(module.mixture().sum(-1), torch.ones(g.shape))
    module.context.value = torch.rand(3, 4)
    with pytest.raises(
        ValueError, match=r"the context must have a number for each token, got \[3, 4\] for inputs \[3, 5\]"
    ):
        module(x)


def test_the_loss_is_zero_where_branches_share_nothing() -> None:
    Q_in, Q_out = (torch.linalg.qr(torch.randn(n, 6, dtype=torch.float64))[0] for n in (12, 10))
    A, C, B, D = Q_in[:, :4].T, Q_in[:, 4:].T, Q_out[:, :4], Q_out[:, 4:]
    overlap = ((B @ A) * (D @ C)).abs().sum()
    torch.testing.assert_close(complement(A, B, C, D), overlap, rtol=1e-12, atol=1e-12)
    turned = A + 0.5 * C[:1]  # row spaces meet: |A Cᵀ|² = 4 · ¼
    torch.testing.assert_close(
        complement(turned, B, C, D) - ((B @ turned) * (D @ C)).abs().sum(), torch.tensor(1.0, dtype=torch.float64)
    )
    rows = torch.eye(10, 6, dtype=torch.float64)
    assert complement(A, rows[:, :4], C, rows[:, 4:]) < 1e-25  # and no entry in common


def test_a_boundary_has_less_rank_and_more_scale(small: Any) -> None:
    model = lorank.convert(small("llama"), lorank.SplitFlux(rank=8, residual_rank=4, boundary=r"layers\.1"))
    found = [(*m.ranks, m.scale) for m in model.modules() if isinstance(m, SplitFluxLinear)]
    assert found == [(8, 4, 1.0)] * 7 + [(4, 2, 2.0)] * 7
    assert complementary_loss(model).item() > 0
    module = model.model.layers[1].mlp.up_proj
    nn.init.normal_(module.B.weight)
    plain = (module.B.weight * torch.tensor([0.5] * 6)) @ module.A.weight
    torch.testing.assert_close(module.product().norm(), 2 * plain.norm())
    for wrong, words in (
        ("layer7", "match a layer, got 'layer7', which matches none"),
        ("[", "hold regular expressions"),
    ):
        with pytest.raises(ValueError, match=f"boundary must {words}"):
            lorank.convert(small("llama"), lorank.SplitFlux(boundary=wrong))
    with pytest.raises(ValueError, match="model must have the adapter splitflux"):
        complementary_loss(small("llama"))


@pytest.mark.parametrize("value", [1.5, torch.ones(3), float("nan")])
def test_a_saliency_must_be_a_share(value: Any, small: Any) -> None:
    with pytest.raises(ValueError, match="a saliency must be from 0 to 1, one number or"):
        lorank.set_context(lorank.convert(small("llama"), "splitflux"), value)
