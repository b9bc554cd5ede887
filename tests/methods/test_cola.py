"""CoLA against its paper: equation, initial values, sizes, and the places where a non-linearity remains."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank import CoLA, CoLAM, LowRank, convert
from lorank.layers import entry_std
from lorank.methods.cola import CoLALinear

NONLINEARITIES = ["both", "low-rank", "reduced", "original"]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


# ---- the equation


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_b_silu_a_x_and_so_are_its_gradients(bias: bool) -> None:
    layer = CoLALinear(10, 14, 6, bias=bias, dtype=torch.float64)
    x = numbers(3, 5, 10).requires_grad_()  # [batch, n, d_in]
    g = numbers(3, 5, 14, seed=1)  # [batch, n, d_out], gradient of the output
    A, B = layer.A.weight.detach(), layer.B.weight.detach()  # [r, d_in], [d_out, r]

    y = layer(x)
    z = torch.einsum("ri,bni->bnr", A, x.detach())
    silu, slope = z * sigmoid(z), sigmoid(z) * (1 + z * (1 - sigmoid(z)))
    expected = torch.einsum("or,bnr->bno", B, silu) + (layer.B.bias.detach() if bias else 0)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    y.backward(g)
    gz = torch.einsum("or,bno->bnr", B, g) * slope
    torch.testing.assert_close(layer.B.weight.grad, torch.einsum("bno,bnr->or", g, silu), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.A.weight.grad, torch.einsum("bnr,bni->ri", gz, x.detach()), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(x.grad, torch.einsum("bnr,ri->bni", gz, A), rtol=1e-11, atol=1e-11)
    if bias:
        torch.testing.assert_close(layer.B.bias.grad, g.sum((0, 1)), rtol=1e-11, atol=1e-11)


def test_without_activation_the_layer_is_dense_with_weight_ba() -> None:
    layer = CoLALinear(64, 96, 16, bias=True, activation=None)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    dense = F.linear(x, layer.B.weight @ layer.A.weight, layer.B.bias)
    torch.testing.assert_close(layer(x), dense, rtol=1e-6, atol=1e-6)
    layer.activation = "silu"
    assert (layer(x) - dense).abs().max() > 0.1


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("relu", lambda z: z.clamp(min=0)),
        ("gelu", lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2),
        ("silu", lambda z: z * sigmoid(z)),
    ],
)
def test_other_activations_than_silu(activation: str, formula: Callable[[Tensor], Tensor]) -> None:
    layer = CoLALinear(8, 8, 4, activation=activation, dtype=torch.float64)
    x = numbers(5, 8)
    torch.testing.assert_close(layer(x), formula(x @ layer.A.weight.T) @ layer.B.weight.T)


def test_the_map_is_not_linear_so_it_cannot_be_merged() -> None:
    layer = CoLALinear(16, 16, 8, dtype=torch.float64)
    x = numbers(4, 16)
    assert not torch.allclose(layer(2 * x), 2 * layer(x), rtol=1e-3)


# ---- initial values


@pytest.mark.parametrize(
    ("d_in", "d_out", "rank", "s", "tau"),
    [
        (512, 512, 128, 0.052556, 0.031250),
        (512, 1376, 128, 0.045102, 0.023014),
        (2048, 2048, 512, 0.026278, 0.015625),
        (2048, 5461, 512, 0.022583, 0.011540),
        (4096, 4096, 1024, 0.018581, 0.011049),
        (4096, 11008, 1024, 0.015946, 0.008137),
    ],
)
def test_the_standard_deviation_of_the_papers_layers(d_in: int, d_out: int, rank: int, s: float, tau: float) -> None:
    assert entry_std(d_in, d_out, rank) == pytest.approx(s, abs=5e-7)
    assert math.sqrt(rank) * entry_std(d_in, d_out, rank) ** 2 == pytest.approx(tau, abs=5e-7)
    assert math.sqrt(rank) * entry_std(d_in, d_out, rank) ** 2 == pytest.approx((d_in + d_out) ** -0.5)


def test_drawn_factors_have_the_papers_standard_deviation() -> None:
    torch.manual_seed(0)
    layer = CoLALinear(512, 1376, 128)
    for factor in (layer.A.weight, layer.B.weight):
        assert factor.std().item() == pytest.approx(0.0451, rel=0.02)
        assert abs(factor.mean().item()) < 0.001
    assert (layer.B.weight @ layer.A.weight).std().item() == pytest.approx(0.0230, rel=0.02)


def test_the_bias_is_uniform_within_the_inverse_root_of_d_out() -> None:
    torch.manual_seed(0)
    bias = CoLALinear(8, 4096, 4, bias=True).B.bias.detach()
    bound = 4096**-0.5
    assert bias.abs().max() <= bound
    assert bias.min() < -0.99 * bound
    assert bias.max() > 0.99 * bound
    assert bias.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_resetting_draws_anew_with_the_same_deviation() -> None:
    torch.manual_seed(0)
    layer = CoLALinear(512, 512, 128, bias=True)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert all(not torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert layer.A.weight.std().item() == pytest.approx(0.052556, rel=0.02)


def test_a_bias_is_kept_where_the_dense_layer_had_one(small: Callable[..., Any]) -> None:
    block = convert(small("llama", attention_bias=True), CoLA()).model.layers[0]
    assert all(getattr(block.self_attn, f"{name}_proj").B.bias is not None for name in "qkvo")
    assert all(getattr(block.mlp, f"{name}_proj").B.bias is None for name in ("gate", "up", "down"))
    assert all(module.A.bias is None for module in block.modules() if isinstance(module, CoLALinear))


# ---- where a non-linearity remains


def variants(small: Callable[..., Any], *nonlinearities: str) -> list[Any]:
    """Converted copies of one model that differ in `nonlinearity` alone, not in a single weight."""
    models = [convert(small("llama"), CoLA(rank=8, nonlinearity=choice)) for choice in nonlinearities]  # type: ignore[arg-type]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return models


def test_both_and_low_rank_differ_only_by_the_gates_activation(small: Callable[..., Any], tokens: Tensor) -> None:
    both, low_rank = variants(small, "both", "low-rank")
    assert (both(tokens).logits - low_rank(tokens).logits).abs().max() > 1e-4
    for block in both.model.layers:
        block.mlp.act_fn = nn.Identity()
    assert torch.equal(both(tokens).logits, low_rank(tokens).logits)


@pytest.mark.parametrize("choice", NONLINEARITIES)
def test_the_mlp_of_every_variant_is_the_one_on_paper(choice: str, small: Callable[..., Any]) -> None:
    mlp = variants(small, choice)[0].double().model.layers[1].mlp
    x = numbers(2, 5, 32)

    def cola(layer: CoLALinear, x: Tensor, inside: bool) -> Tensor:
        z = torch.einsum("ri,bni->bnr", layer.A.weight, x)
        return torch.einsum("or,bnr->bno", layer.B.weight, z * sigmoid(z) if inside else z)

    everywhere, at_the_gate, outside = {
        "both": (True, True, True),
        "low-rank": (True, True, False),
        "reduced": (False, True, False),
        "original": (False, False, True),
    }[choice]
    gate = cola(mlp.gate_proj, x, at_the_gate)
    product = (gate * sigmoid(gate) if outside else gate) * cola(mlp.up_proj, x, everywhere)
    torch.testing.assert_close(mlp(x), cola(mlp.down_proj, product, everywhere), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("choice", NONLINEARITIES)
def test_attention_of_every_variant_has_its_non_linearity(choice: str, small: Callable[..., Any]) -> None:
    attention = variants(small, choice)[0].model.layers[0].self_attn
    expected = "silu" if choice in ("both", "low-rank") else None
    assert {getattr(attention, f"{name}_proj").activation for name in "qkvo"} == {expected}


def test_original_is_low_rank_on_the_same_weights(small: Callable[..., Any], tokens: Tensor) -> None:
    (original,) = variants(small, "original")
    control = convert(small("llama"), LowRank(rank=8))
    control.load_state_dict(original.state_dict())
    assert torch.equal(original(tokens).logits, control(tokens).logits)


def test_the_four_variants_are_four_different_functions(small: Callable[..., Any], tokens: Tensor) -> None:
    logits = [model(tokens).logits for model in variants(small, *NONLINEARITIES)]
    assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(logits) for b in logits[:i])


@pytest.mark.parametrize("choice", ["low-rank", "reduced"])
def test_no_architecture_keeps_the_activation_that_is_to_go(choice: str, architecture: Any) -> None:
    dense, model = architecture.dense(), convert(architecture.dense(), CoLA(nonlinearity=choice))  # type: ignore[arg-type]
    for before, after in zip(
        dense.get_submodule(architecture.blocks), model.get_submodule(architecture.blocks), strict=True
    ):
        modules = dict(after.named_modules())
        gone = [name for name, module in before.named_modules() if "ctivation" in type(module).__name__]
        gone += [name for name, module in before.named_modules() if type(module) is nn.ReLU]
        assert len(gone) == 1
        assert type(modules[gone[0]]) is nn.Identity
        inside = [name for name, module in modules.items() if isinstance(module, CoLALinear) and module.activation]
        assert len(inside) == (1 if choice == "reduced" else len(architecture.projections))


def test_a_block_that_stays_dense_keeps_its_activation(small: Callable[..., Any]) -> None:
    first, second = convert(small("llama"), CoLA(nonlinearity="low-rank"), targets=r"layers\.0\.").model.layers
    assert type(first.mlp.act_fn) is nn.Identity
    assert type(second.mlp.act_fn) is not nn.Identity


@pytest.mark.parametrize("choice", ["low-rank", "reduced"])
def test_removing_the_activation_needs_its_projection(choice: str, small: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=f"nonlinearity='{choice}'.*no converted projection has a name that lorank knows"
    ):
        convert(small("llama"), CoLA(nonlinearity=choice), targets="self_attn")  # type: ignore[arg-type]


# ---- the options


@pytest.mark.parametrize("method", [CoLA, CoLAM])
def test_unknown_names_are_refused_with_the_known_ones(method: type[CoLA]) -> None:
    with pytest.raises(
        ValueError, match="nonlinearity must be 'both', 'low-rank', 'reduced' or 'original', got 'none'"
    ):
        method(nonlinearity="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation must be 'silu', 'gelu' or 'relu', got 'swish'"):
        method(activation="swish")  # type: ignore[arg-type]


def test_cola_m_is_cola_with_checkpointed_blocks(small: Callable[..., Any], tokens: Tensor) -> None:
    cola = convert(small("llama"), CoLA(rank=8))
    cola_m = convert(small("llama"), CoLAM(rank=8))
    cola_m.load_state_dict(cola.state_dict())
    assert cola_m.is_activation_checkpointing
    assert not cola.is_activation_checkpointing
    losses = [model.train()(tokens, labels=tokens).loss for model in (cola, cola_m)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, p), q in zip(cola.named_parameters(), cola_m.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_a_layer_shows_its_shape_when_printed() -> None:
    assert "d_in=8, d_out=12, rank=4, activation=silu" in repr(CoLALinear(8, 12, 4))
