"""CR-Net: its equation, initial values and parameter counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorank import (
    CRNet,
    checkpoint,
    convert,
    keep_recurrence,
)
from lorank.accounting import measure_flops, measure_peak
from lorank.methods.crnet import (
    CRNetDense,
    CRNetLinear,
    bounded,
    kept_numbers,
    recompute_flops,
)
from lorank.papers.formulas import cola_parameters, crnet_parameters
from tests.methods.crnet.conftest import D_FF, D, N, R, a_batch, chain, gradients, loss_of, numbers, tapes

PROJECTIONS = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]


def seen(model: Any, projection: str) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and raw outputs of a projection in all blocks, in one evaluation."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = [
        block.get_submodule(projection).register_forward_hook(
            lambda module, args, y: (inputs.append(args[0].detach()), outputs.append(y.detach()))[:0] or None
        )
        for block in model.base_model.layers
    ]
    with torch.no_grad():
        model(a_batch())
    for handle in handles:
        handle.remove()
    return inputs, outputs


# ---- the equation


def test_b_keeps_the_sign_is_never_zero_and_has_gradient_one() -> None:
    beta = torch.tensor([-0.3, 0.3, 0.0, -0.0], dtype=torch.float64, requires_grad=True)
    b = bounded(beta)
    assert b.tolist() == pytest.approx([-0.300001, 0.300001, 1e-6, 1e-6], abs=1e-15)
    b.sum().backward()
    assert beta.grad.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_recurrence(bias: bool) -> None:
    """Y_l by einsum, and the backward recurrence of the paper: dβ = <g, Y_prev>, dB = g' z, dA = (B' g)' x, and so on."""
    layers = chain(4, bias=bias)
    xs = [numbers(3, 5, 10, seed=i).requires_grad_() for i in range(4)]
    direct = [numbers(3, 5, 14, seed=10 + i) for i in range(4)]  # dL/dY_l from the block itself
    ys = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    sum((g * y).sum() for g, y in zip(direct, ys, strict=True)).backward()

    def added(parameter: Tensor | None) -> Tensor | float:
        return 0 if parameter is None else parameter.detach()

    expected = [torch.einsum("oi,bni->bno", layers[0].W.weight.detach(), xs[0].detach()) + added(layers[0].W.bias)]
    for layer, x in zip(layers[1:], xs[1:], strict=True):
        product = layer.B.weight.detach() @ layer.A.weight.detach()
        change = torch.einsum("oi,bni->bno", product, x.detach()) + added(layer.B.bias)
        expected.append((layer.beta.item() + 1e-6) * expected[-1] + change)
    for y, value in zip(ys, expected, strict=True):
        torch.testing.assert_close(y.detach(), value, rtol=1e-12, atol=1e-12)

    g = torch.zeros_like(direct[0])
    for i in (3, 2, 1):
        layer, x = layers[i], xs[i].detach()
        A, B = layer.A.weight.detach(), layer.B.weight.detach()
        g = direct[i] + g
        z, gz = torch.einsum("ri,bni->bnr", A, x), torch.einsum("or,bno->bnr", B, g)
        close = {"rtol": 1e-11, "atol": 1e-11}
        torch.testing.assert_close(layer.beta.grad, (g * expected[i - 1]).sum()[None], **close)
        torch.testing.assert_close(layer.B.weight.grad, torch.einsum("bno,bnr->or", g, z), **close)
        torch.testing.assert_close(layer.A.weight.grad, torch.einsum("bnr,bni->ri", gz, x), **close)
        torch.testing.assert_close(xs[i].grad, torch.einsum("bnr,ri->bni", gz, A), **close)
        if bias:
            torch.testing.assert_close(layer.B.bias.grad, g.sum((0, 1)), **close)
        g = (layer.beta.item() + 1e-6) * g
    torch.testing.assert_close(
        layers[0].W.weight.grad, torch.einsum("bno,bni->oi", direct[0] + g, xs[0].detach()), **close
    )


def test_with_a_zero_and_beta_one_all_outputs_are_the_first(build: Callable[..., Any]) -> None:
    model = build(6, torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A.weight"):
                parameter.zero_()
    for projection in PROJECTIONS:
        _, outputs = seen(model, projection)
        assert outputs[0].abs().max() > 1e-3
        for i, y in enumerate(outputs):
            torch.testing.assert_close(y, (1 + 1e-6) ** i * outputs[0], rtol=1e-10, atol=0)


def test_with_beta_zero_projections_are_almost_low_rank(build: Callable[..., Any]) -> None:
    model = build(4, torch.float64, beta=1e-12).eval()
    for projection in PROJECTIONS:
        inputs, outputs = seen(model, projection)
        for i in range(1, 4):
            layer = model.model.layers[i].get_submodule(projection)
            plain = inputs[i] @ layer.A.weight.T @ layer.B.weight.T
            torch.testing.assert_close(outputs[i], plain, rtol=0, atol=1.1e-6 * outputs[i - 1].abs().max().item())
            torch.testing.assert_close(outputs[i] - plain, 1.000001e-6 * outputs[i - 1], rtol=1e-6, atol=1e-14)


def test_one_layer_is_a_dense_llama(small: Callable[..., Any]) -> None:
    dense = small("llama", num_hidden_layers=1)
    model = convert(small("llama", num_hidden_layers=1), CRNet())
    assert all(isinstance(model.model.layers[0].get_submodule(projection), CRNetDense) for projection in PROJECTIONS)
    names = {name.replace(".W.", "."): value for name, value in model.state_dict().items()}
    dense.load_state_dict(names)
    assert torch.equal(model(a_batch()).logits, dense(a_batch()).logits)
    loss_of(model.train(), a_batch()).backward()
    assert all(not tape.waiting for tape in tapes(model))


def test_a_low_rank_first_block_begins_the_recurrence(build: Callable[..., Any], tmp_path: Path) -> None:
    model = build(3, torch.float64, first_block="low-rank", rank={r"layers\.0\.": 5, ".*": 7}).eval()
    expected = gradients(model)
    for projection in PROJECTIONS:
        inputs, outputs = seen(model, projection)
        y: Any = 0
        for block, x, output in zip(model.model.layers, inputs, outputs, strict=True):
            layer = block.get_submodule(projection)
            y = x @ (layer.B.weight @ layer.A.weight).T + y * (getattr(layer, "beta", 0) + 1e-6)
            torch.testing.assert_close(y, output, rtol=1e-10, atol=1e-12)
        assert layer.A.out_features == 7 and model.model.layers[0].get_submodule(projection).A.out_features == 5
    checkpoint(model, keep_recurrence)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-12)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(a_batch()).logits, model.eval()(a_batch()).logits)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_bias_is_part_of_what_is_handed_on(name: str, small: Callable[..., Any]) -> None:
    model = convert(small(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 3}), CRNet())
    last = [module for module in model.modules() if isinstance(module, CRNetLinear) and module.depth == 2]
    assert last
    assert all(module.B.bias is not None for module in last)
    with torch.no_grad():  # only the first bias speaks: it must arrive
        for parameter in model.parameters():
            parameter.zero_()
        for module in model.modules():
            if isinstance(module, CRNetDense):
                module.W.bias.fill_(0.5)
            elif isinstance(module, CRNetLinear):
                module.beta.fill_(2)
    outputs = []
    for module in last:
        module.register_forward_hook(lambda module, args, y: outputs.append(y))
    model(a_batch())
    assert all(torch.allclose(y, torch.tensor(2.0)) for y in outputs)


# ---- initial values


def test_initial_values_also_from_a_configuration(build: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = convert(
        LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.5, **shape)), CRNet(rank=64, beta=0.8)
    )
    for one in (model, type(model)(model.config)):
        first, second = (block.mlp.up_proj for block in one.model.layers)
        assert first.W.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert second.beta.tolist() == [pytest.approx(0.8)]
        for factor in (second.A.weight, second.B.weight):
            assert factor.std().item() == pytest.approx((64 * (256 + 512)) ** -0.25, rel=0.03)
    second.beta.data.fill_(7)
    second.reset_parameters()
    assert second.beta.tolist() == [pytest.approx(0.8)]


# ---- counts


def test_the_1b_model_has_the_parameters_of_the_closed_form() -> None:
    rank = 449
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5461, num_hidden_layers=24, num_attention_heads=32
    )
    with torch.device("meta"):
        model = convert(LlamaForCausalLM(config), CRNet(rank=rank))
        low = convert(LlamaForCausalLM(config), CRNet(rank=rank, first_block="low-rank"))
    assert low.num_parameters() == cola_parameters(32_000, 2048, 5461, 24, rank) + 23 * 7, "the factors, and each β"
    assert crnet_parameters(32_000, 2048, 5461, 24, rank) == model.num_parameters() == 583_336_010
    norms = 2 * 2048
    for i, block in enumerate(model.model.layers):
        count = sum(p.numel() for p in block.parameters()) - norms
        assert count == (11 * 2048 * rank + 3 * 5461 * rank + 7 if i else 4 * 2048**2 + 3 * 2048 * 5461)


def test_the_rank_may_differ_from_block_to_block(build: Callable[..., Any]) -> None:
    model = build(4, rank={r"layers\.1\.": 5, r"layers\.2\..*q_proj": 0.25, ".*": 7})
    ranks = [[block.get_submodule(p).A.out_features for p in PROJECTIONS] for block in model.model.layers[1:]]
    assert ranks == [[5] * 7, [12] + [7] * 6, [7] * 7]
    checkpoint(model, keep_recurrence)
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize(("first_block", "depth"), [("dense", 10), ("low-rank", 3)])
def test_what_recomputation_costs_is_what_the_closed_forms_say(first_block: Any, depth: int) -> None:
    def block_by_block(layers: int) -> tuple[int, float]:
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=D,
            intermediate_size=D_FF,
            num_hidden_layers=layers,
            num_attention_heads=4,
            use_cache=False,
        )
        with torch.device("meta"):
            model = convert(LlamaForCausalLM(config), CRNet(rank=R, first_block=first_block))
        checkpoint(model, keep_recurrence)
        kept = measure_peak(model, batch=1, sequence_length=N).activations_bytes / 4
        return measure_flops(model, sequence_length=N).recompute, kept

    found = {layers: block_by_block(layers) for layers in (2, depth)}
    for layers, (flops, kept) in found.items():
        assert flops == recompute_flops(D, D_FF, R, N, layers, first_block)
        outside = kept - kept_numbers(D, D_FF, R, N, layers)
        assert outside == found[2][1] - kept_numbers(D, D_FF, R, N, 2), "embeddings, head and loss, whatever the depth"
