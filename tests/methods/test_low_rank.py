"""The control: a linear map of bounded rank, with CoLA's parameters and initial values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank import CoLA, LowRank, Site, convert


def test_the_layer_is_linear_with_weight_ba() -> None:
    torch.manual_seed(0)
    site = Site("layers.0.q", "layers.*.q", 0, nn.Linear(12, 20, dtype=torch.float64))
    layer: Any = LowRank(rank=5).build(site)
    x = torch.randn(3, 7, 12, dtype=torch.float64)  # [batch, n, d_in]
    expected = torch.einsum("or,ri,bni->bno", layer.B.weight, layer.A.weight, x) + layer.B.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(2 * x) - layer.B.bias, 2 * (layer(x) - layer.B.bias), rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(layer.B.weight @ layer.A.weight) == 5


def test_at_full_rank_it_can_be_any_dense_layer(small: Callable[..., Any], tokens: Tensor) -> None:
    """The limit: with B = W and A = 1 the converted model is the dense one."""
    dense = small("opt").double()
    with pytest.warns(UserWarning, match="not smaller than the dense layer"):
        model = convert(small("opt").double(), LowRank(rank=32), exclude="fc2$")  # fc2 reads 80 numbers
    model.load_state_dict(dense.state_dict(), strict=False)  # all but the factors
    for name, module in dense.named_modules():
        if type(module) is nn.Linear and ".layers." in name and not name.endswith("fc2"):
            factors = model.get_submodule(name)
            nn.init.eye_(factors.A.weight)
            factors.B.load_state_dict(module.state_dict())
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-12, atol=1e-12)


def test_it_starts_from_the_same_point_as_cola(small: Callable[..., Any]) -> None:
    states = []
    for method in (LowRank(rank=8), CoLA(rank=8)):
        dense = small("llama")
        torch.manual_seed(5)
        states.append(convert(dense, method).state_dict())
    low_rank, cola = states
    assert low_rank.keys() == cola.keys()
    assert all(torch.equal(low_rank[name], cola[name]) for name in cola)


def test_the_blocks_own_activation_stays(small: Callable[..., Any]) -> None:
    dense, model = small("llama"), convert(small("llama"), LowRank())
    for before, after in zip(dense.model.layers, model.model.layers, strict=True):
        assert type(after.mlp.act_fn) is type(before.mlp.act_fn)
