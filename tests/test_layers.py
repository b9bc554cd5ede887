"""The linear layer for odd widths is nn.Linear in everything but the layout of its output."""

import pytest
import torch
from torch import nn

from lorank import CoLA, convert, keep_bottlenecks
from lorank.checkpointing import checkpoint
from lorank.layers import ColumnMajorLinear, linear, own_memory
from lorank.methods.cola import entry_std


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


def test_a_model_of_odd_width_trains_checkpoints_saves_and_loads(architectures, tokens, tmp_path) -> None:
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


def test_its_initial_values_are_the_method_s_also_when_transformers_draws(architectures) -> None:
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
