"""Layers that methods share: their outputs by hand, how they start, and the linear layer for odd widths."""

import copy

import pytest
import torch
from torch import nn

from lorank import CoLA, convert, keep_bottlenecks
from lorank.checkpointing import checkpoint
from lorank.layers import (
    ColumnMajorLinear,
    FrozenPlusLowRank,
    LowRankLinear,
    SpectralLinear,
    entry_std,
    linear,
    loaded,
    own_memory,
    wide,
)


def test_only_widths_off_the_grid_get_it() -> None:
    assert type(linear(4, 80)) is nn.Linear
    assert type(linear(4, 81)) is ColumnMajorLinear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(16,), (2, 8), (3, 5), (2, 2, 4), (1,), ()])
def test_values_and_gradients_are_those_of_a_linear_layer(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours = linear(6, 13, bias=bias).double()
    plain = nn.Linear(6, 13, bias=bias).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*shape, 13, dtype=torch.float64)
    results = []
    for layer in (ours, plain):
        y = layer(x)
        assert y.shape == (*shape, 13)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_columns_are_contiguous() -> None:
    assert linear(6, 13)(torch.randn(2, 8, 6)).stride() == (8, 1, 16)


def test_a_model_of_odd_width_is_trained_saved_and_loaded(architectures, tokens, tmp_path) -> None:
    llama = architectures["llama"]
    model = convert(llama.dense(intermediate_size=81), CoLA(rank=6)).train()
    assert type(model.model.layers[0].mlp.up_proj.B) is ColumnMajorLinear
    gradients = []
    for policy in (None, keep_bottlenecks):
        checkpoint(model, policy)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))
    model.eval().save_pretrained(tmp_path)
    loaded = llama.auto.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_initial_values_are_the_methods_when_transformers_draws(architectures) -> None:
    config = convert(architectures["llama"].dense(intermediate_size=2001), CoLA(rank=6)).config
    up = architectures["llama"].auto.from_config(config).model.layers[0].mlp.up_proj
    assert up.B.weight.std().item() == pytest.approx(entry_std(32, 2001, 6), rel=0.03)


def test_only_views_are_copied_into_memory_of_their_own() -> None:
    fused = torch.arange(24.0).reshape(6, 4)
    layer = nn.Linear(4, 3)
    whole = layer.weight
    assert own_memory(layer).weight is whole
    for view in (fused[:3], fused[3:], fused.T[:, :3]):
        layer.weight = nn.Parameter(view, requires_grad=False)
        assert own_memory(layer) is layer
        assert torch.equal(layer.weight, view)
        assert layer.weight.is_contiguous()
        assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
        assert not layer.weight.requires_grad


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "relu"])
def test_low_rank_is_two_products_with_an_activation(activation: str | None) -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(6, 13, 4, bias=True, activation=activation, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    z = x @ layer.A.weight.T
    z = z if activation is None else getattr(nn.functional, activation)(z)
    torch.testing.assert_close(layer(x), z @ layer.B.weight.T + layer.B.bias)
    assert repr(layer).startswith("LowRankLinear(\n  d_in=6, d_out=13, rank=4")
    assert ("activation" in repr(layer)) == (activation is not None)


def test_a_subclass_draws_its_own_parameters_at_a_reset() -> None:
    class Gained(LowRankLinear):
        def __init__(self) -> None:
            super().__init__(6, 8, 2)
            self.gain = nn.Parameter(torch.ones(()))

        def reset_parameters(self) -> None:
            super().reset_parameters()
            nn.init.ones_(self.gain)

    layer = Gained()
    with torch.no_grad():
        layer.gain.zero_()
    layer.reset_parameters()
    assert layer.gain == 1


def test_frozen_plus_low_rank_adds_the_factors_to_a_dense_layer() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(6, 8).double()
    x, before = torch.randn(3, 6, dtype=torch.float64), copy.deepcopy(dense)
    layer = FrozenPlusLowRank(dense, 2, scale=0.5)
    layer.reset_parameters()
    assert torch.equal(layer(x), before(x)), "it starts as the dense layer"
    assert [n for n, p in layer.named_parameters() if not p.requires_grad] == ["W.weight"]
    nn.init.normal_(layer.B.weight)
    torch.testing.assert_close(layer(x), before(x) + 0.5 * x @ layer.A.weight.T @ layer.B.weight.T)
    weight, bias = layer.merged()
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), layer(x))
    dropping = FrozenPlusLowRank(before, 2, scale=0.5, dropout=1.0)
    assert torch.equal(dropping.train()(x), before(x))
    assert not torch.equal(dropping.eval()(x), before(x))


def test_spectral_holds_a_weight_as_its_svd() -> None:
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = SpectralLinear(6, 8, 2, dtype=torch.float64)
    layer.decompose(weight)
    torch.testing.assert_close(layer.weight(), weight)
    torch.testing.assert_close(layer.S.detach(), torch.linalg.svdvals(weight))
    places = torch.tensor([0, 1]), torch.tensor([5, 3])
    layer.swap(*places)
    assert layer.index.tolist() == [5, 3, 2, 1, 4, 0]
    torch.testing.assert_close(layer.weight(), weight)
    assert [n for n, p in layer.named_parameters() if not p.requires_grad] == ["U_frozen", "V_frozen"]


def test_wide_tensors_have_single_precision_or_better() -> None:
    kinds = [wide(torch.ones(2, dtype=d)).dtype for d in (torch.bfloat16, torch.float32, torch.float64)]
    assert kinds == [torch.float32, torch.float32, torch.float64]


def test_what_transformers_loads_is_known_as_loaded(architectures, tmp_path) -> None:
    llama = architectures["llama"]
    model = convert(llama.dense(), CoLA(rank=6))
    assert not any(map(loaded, model.parameters()))
    model.save_pretrained(tmp_path)
    assert all(map(loaded, llama.auto.from_pretrained(tmp_path).parameters()))
