"""Factors of which the second has few entries in each row: sizes, places, and one graph."""

from typing import Any

import pytest
import torch
from torch import nn

from lorank import Site, SparseCodes
from lorank.methods.sparse_codes import dense_codes, packed, unpacked


def built(d_in: int, d_out: int, **fields: Any) -> Any:
    site = Site("layers.0.q", "layers.*.q", 0, nn.Linear(d_in, d_out, dtype=torch.float64))
    return SparseCodes(**fields).build(site)


def test_rows_of_codes_have_so_many_entries() -> None:
    layer = built(12, 20, rank=9, ratio=2)
    B, x = layer.codes(), torch.randn(3, 7, 12, dtype=torch.float64)
    assert B.shape == (20, 9) and ((B != 0).sum(1) == 4).all() and len(B.ne(0).unique(dim=0)) > 10
    assert sum(p.numel() for p in layer.parameters()) == 9 * 12 + 4 * 20 + 20
    assert sum(b.nbytes for b in layer.buffers()) == 20 * 2
    torch.testing.assert_close(layer(x), x @ layer.A.weight.T @ B.T + layer.bias, rtol=1e-12, atol=1e-12)
    dy = torch.randn(3, 7, 20, dtype=torch.float64)
    layer(x).backward(dy)
    whole = dy.flatten(0, 1).T @ (x @ layer.A.weight.T).flatten(0, 1)  # of a dense B
    torch.testing.assert_close(layer.values.grad, whole[B != 0].view(20, 4), rtol=1e-10, atol=1e-12)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [3, 8, 17])
def test_places_are_kept_in_bits(k: int) -> None:
    places = torch.rand(5, k, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :2].sort(1).values
    bits, values = packed(places, k), torch.arange(1.0, 11).view(5, 2)
    assert torch.equal(unpacked(bits, k).nonzero()[:, 1].view(5, 2), places)
    assert torch.equal(dense_codes(values, bits, k), torch.zeros(5, k).scatter(1, places, values))
    assert torch.equal(dense_codes(torch.ones(5, k), packed(torch.arange(k).expand(5, k), k), k), torch.ones(5, k))
