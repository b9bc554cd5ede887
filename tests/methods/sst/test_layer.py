"""SST: where it starts, its gradients and its limit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import lorank
from lorank import SST, convert
from lorank.methods.sst import SSTLinear
from lorank.plan.dry_run import plan
from lorank.sites import find_sites
from lorank.train.recipe import Recipe
from tests.methods.sst.conftest import (
    SHAPES,
    assert_orthonormal,
    factors,
    layer_of,
    layers_of,
    numbers,
    prepared,
    product,
    train,
)

# ---- check 1: where it starts


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_conversion_keeps_weights_and_outputs(name: str, small: Callable[..., Any], tokens: Tensor) -> None:
    dense = small(name)
    sites = {site.name: site.linear.weight.clone() for site in find_sites(dense)}
    model = convert(small(name), SST())
    for site, weight in sites.items():
        layer = model.get_submodule(site)
        assert (product(layer) - weight).abs().max() < 1e-5 * weight.norm()
        assert_orthonormal(layer)
        assert (layer.S >= 0).all()
        assert sorted(layer.index.tolist()) == list(range(min(weight.shape)))
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d_in, d_out", SHAPES)
def test_a_layer_starts_from_a_kaiming_uniform_weight(d_in: int, d_out: int) -> None:
    d_in, d_out = 8 * d_in, 8 * d_out
    torch.manual_seed(0)
    expected = nn.Linear(d_in, d_out, bias=False).weight
    torch.manual_seed(0)
    layer = SSTLinear(d_in, d_out, 5)
    assert (product(layer) - expected).abs().max() < 1e-5 * expected.norm()
    assert_orthonormal(layer)


def test_layers_from_the_meta_device_are_drawn(small: Callable[..., Any], tokens: Tensor) -> None:
    with torch.device("meta"):
        dense = small("llama")
    model = convert(dense, SST()).to_empty(device="cpu")
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:  # its buffers are no parameters: take them from a real one
            module.load_state_dict({})
            module.inv_freq.copy_(small("llama").model.rotary_emb.inv_freq)
    model.initialize_weights()
    for layer in layers_of(model):
        assert_orthonormal(layer)
        assert product(layer).abs().max() < layer.d_in**-0.5 + 1e-5
        assert product(layer).std() == pytest.approx((3 * layer.d_in) ** -0.5, rel=0.15)
    assert model(tokens).logits.isfinite().all()


def test_from_a_configuration_it_is_the_svd_of_the_usual_draw(small: Callable[..., Any]) -> None:
    config = convert(small("llama"), SST()).config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    dense = small("llama")
    for site in find_sites(dense):
        layer = model.get_submodule(site.name)
        assert (product(layer) - site.linear.weight).abs().max() < 1e-5 * site.linear.weight.norm()
        assert_orthonormal(layer)


def test_factors_from_a_file_stay_and_missing_ones_are_drawn(
    small: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    model, optimizer, _ = prepared(small)
    train(model, optimizer, tokens, range(3))
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    for layer, again in zip(layers_of(model), layers_of(body), strict=True):
        assert all(map(torch.equal, layer.state_dict().values(), again.state_dict().values()))
        assert layer.key == again.key, "the layers of a body draw as those of the whole model"


# ---- check 2: gradients


@pytest.mark.parametrize("enhanced", [True, False])
@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("d_in, d_out", SHAPES)
def test_gradients_are_products_of_the_dense_one_with_vectors(d_in: int, d_out: int, rank: int, enhanced: bool) -> None:
    layer = layer_of(d_in, d_out, rank, bias=True, enhanced=enhanced)
    U, S, V = factors(layer)
    x = numbers(2, 7, d_in).requires_grad_()
    dy = numbers(2, 7, d_out, seed=1)

    W, x_dense = product(layer).requires_grad_(), x.detach().clone().requires_grad_()
    expected = F.linear(x_dense, W, layer.bias.detach())
    expected.backward(dy)
    G = W.grad
    y = layer(x)
    y.backward(dy)

    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(x.grad, x_dense.grad, **close)
    torch.testing.assert_close(layer.S.grad, (U.T @ G @ V).diag(), **close)
    torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)), **close)
    factor = torch.ones(rank).double() if enhanced else S[:rank]
    for i in range(rank):
        torch.testing.assert_close(layer.U_active.grad[:, i], factor[i] * (G @ V[:, i]), **close)
        torch.testing.assert_close(layer.V_active.grad[:, i], factor[i] * (G.T @ U[:, i]), **close)
    assert layer.U_frozen.grad is None and layer.V_frozen.grad is None


def test_plain_autograd_gives_s_times_the_enhanced_gradient() -> None:
    layer = layer_of(12, 20, 5)
    U, S, V = (t.clone().requires_grad_() for t in factors(layer))
    x, dy = numbers(9, 12), numbers(9, 20, seed=1)
    (x @ V @ S.diag() @ U.T).backward(dy)
    layer(x).backward(dy)
    torch.testing.assert_close(U.grad[:, :5], S[:5] * layer.U_active.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(V.grad[:, :5], S[:5] * layer.V_active.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(S.grad, layer.S.grad, rtol=1e-10, atol=1e-10)


def test_with_true_gradients_autograds_own_check_passes() -> None:
    layer = layer_of(6, 5, 2, enhanced=False)
    layer.requires_grad_()
    x = numbers(3, 6).requires_grad_()
    parameters = {name: p for name, p in layer.named_parameters() if "frozen" not in name}
    f = lambda x, *p: torch.func.functional_call(layer, dict(zip(parameters, p, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, *parameters.values()))


def test_a_singular_value_of_zero_and_its_vectors_learn() -> None:
    layer = layer_of(12, 20, 5)
    layer.S.data[2] = 0
    layer(numbers(9, 12)).backward(numbers(9, 20, seed=1))
    for gradient in (layer.U_active.grad[:, 2], layer.V_active.grad[:, 2], layer.S.grad[2]):
        assert gradient.abs().max() > 0.1


def test_micro_batches_give_the_gradient_of_the_batch() -> None:
    layer = layer_of(12, 20, 5)
    x, dy = numbers(8, 12), numbers(8, 20, seed=1)
    layer(x).backward(dy)
    whole = [p.grad.clone() for p in layer.parameters() if p.requires_grad]
    layer.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        layer(x[half]).backward(dy[half])
    for parameter, expected in zip([p for p in layer.parameters() if p.requires_grad], whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)


def test_under_autocast_gradients_agree_to_bfloat16() -> None:
    layer = layer_of(64, 96, 16, bias=True).float()
    x, dy = numbers(50, 64, dtype=torch.float32), numbers(50, 96, seed=1, dtype=torch.float32)
    layer(x).backward(dy)
    exact = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    for name, gradient in exact.items():
        found = layer.get_parameter(name).grad
        assert found.dtype == torch.float32
        assert (found - gradient).norm() < 0.02 * gradient.norm(), name


# ---- check 8: the limit


def test_with_all_pairs_active_a_step_of_sgd_is_exact() -> None:
    """The limit: rank m, vectors of any length; the dense layer's loss differentiated through its factors by autograd."""
    weight = numbers(20, 12)
    layer = layer_of(12, 20, 12, weight, enhanced=False)
    assert layer.U_frozen.numel() == layer.V_frozen.numel() == 0
    U, S, V = (t.clone().requires_grad_() for t in factors(layer))
    x, target = numbers(9, 12), numbers(9, 20, seed=1)
    F.mse_loss(F.linear(x, U @ S.diag() @ V.T), target).backward()

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    SST(normalise=False).hook(layer, optimizer, steps=8, seed=0)
    F.mse_loss(layer(x), target).backward()
    optimizer.step()
    for found, before in ((layer.U_active, U), (layer.S, S), (layer.V_active, V)):
        after = before - 0.1 * before.grad
        torch.testing.assert_close(found, after.clamp(min=0) if before is S else after, rtol=1e-10, atol=1e-12)
    layer.S.data[0] = -1
    F.mse_loss(layer(x), target).backward()
    optimizer.step()
    assert (layer.S >= 0).all() and (layer.U_active.norm(dim=0) - 1).abs().max() > 1e-3


def test_its_settings_are_saved_with_the_model(small: Callable[..., Any], tokens: Tensor, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"exploration": 0.0, "iterations_per_round": 3, "normalise": False}
    model, optimizer, _ = prepared(small, **fields)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-2)
    lorank.step_hook(loaded, again, steps=8, seed=3)
    for one, moving in ((model, optimizer), (loaded, again)):
        train(one.eval(), moving, tokens, range(7))
    assert all(map(torch.equal, model.state_dict().values(), loaded.state_dict().values()))
    counted = [
        plan(Recipe(size="tiny", method="sst", rank=8, vocab_size=64, options=options)) for options in ({}, fields)
    ]
    assert counted[0].model == counted[1].model
