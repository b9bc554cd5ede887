"""CR-Net against its paper: the recurrence, its inversion, its counts, and a chain that survives how models are used."""

import copy
import gc
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorank import (
    CRNet,
    checkpoint,
    convert,
    keep_bottlenecks,
    keep_bottlenecks_and_attention,
    keep_recurrence,
    merge,
)
from lorank.accounting import measure_flops, measure_peak, measure_saved
from lorank.checkpointing import keep_nothing
from lorank.methods.crnet import (
    CRNetDense,
    CRNetLinear,
    bounded,
    kept_numbers,
    next_output,
    previous_output,
    recompute_flops,
)
from lorank.papers.formulas import crnet_parameters
from lorank.tape import Rerun, Slot, Tape

D, D_FF, N, R = 48, 112, 20, 9
PROJECTIONS = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]


@pytest.fixture
def build(small: Callable[..., Any]) -> Callable[..., Any]:
    """A converted Llama in training mode, all seven ranks R, as many key as query heads."""

    def build(layers: int, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
        shape = {"hidden_size": D, "intermediate_size": D_FF, "num_key_value_heads": 4, "num_hidden_layers": layers}
        return convert(small("llama", **shape), CRNet(**{"rank": R, **fields})).train().to(dtype)

    return build


def a_batch(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(3, 96, (rows, N), generator=torch.Generator().manual_seed(seed))


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(ids, labels=ids, use_cache=False).loss


def gradients(model: Any, *batches: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    for ids in batches or (a_batch(),):
        loss_of(model, ids).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def tapes(model: nn.Module) -> set[Tape]:
    return {module.tape for module in model.modules() if isinstance(module, CRNetDense | CRNetLinear)}


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


def chain(depths: int, *, bias: bool = False, **options: Any) -> list[Any]:
    """A stack of layers from 10 to 14 on one tape, with β between 0.5 and 1.5."""
    tape = Tape("somewhere", depths)
    options = {"bias": bias, "dtype": torch.float64, **options}
    layers: list[Any] = [CRNetDense(10, 14, tape=tape, **options)]
    layers += [CRNetLinear(10, 14, 4, beta=0.5 + i / depths, tape=tape, depth=i, **options) for i in range(1, depths)]
    return layers


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


def test_what_recomputation_costs_is_what_the_closed_forms_say() -> None:
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
            model = convert(LlamaForCausalLM(config), CRNet(rank=R))
        checkpoint(model, keep_recurrence)
        kept = measure_peak(model, batch=1, sequence_length=N).activations_bytes / 4
        return measure_flops(model, sequence_length=N).recompute, kept

    found = {layers: block_by_block(layers) for layers in (2, 10)}
    for layers, (flops, kept) in found.items():
        assert flops == recompute_flops(D, D_FF, R, N, layers)
        outside = kept - kept_numbers(D, D_FF, R, N, layers)
        assert outside == found[2][1] - kept_numbers(D, D_FF, R, N, 2), "embeddings, head and loss, whatever the depth"


# ---- the recurrence backwards


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_first_of_eight_outputs_is_rebuilt_from_the_last(dtype: torch.dtype, limit: float) -> None:
    betas = 0.5 + torch.rand(8, 1, generator=torch.Generator().manual_seed(0))
    changes = [numbers(64, 96, seed=i, dtype=torch.float32).to(dtype) for i in range(8)]
    first = y = numbers(64, 96, seed=9, dtype=torch.float32).to(dtype)
    for i in range(1, 8):
        y = next_output(y, changes[i], bounded(betas[i]))
        assert y.dtype == dtype
    for i in range(7, 0, -1):
        y = previous_output(y, changes[i], bounded(betas[i]))
    error = ((y - first.float()).norm() / first.float().norm()).item()
    print(f"relative error of seven inversions in {dtype}: {error:.1e}")
    assert error < limit


def test_every_eighth_output_is_stored_and_not_the_first() -> None:
    stored = {depths: [d + 1 for d in range(depths) if Tape("", depths).is_anchor(d)] for depths in (1, 2, 8, 9, 24)}
    assert stored == {1: [], 2: [2], 8: [8], 9: [9], 24: [8, 16, 24]}


def relative(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Error of each tensor; the βs, sums in which much cancels, are components of one vector."""

    def joined(found: dict[str, Tensor]) -> dict[str, Tensor]:
        betas = torch.cat([grad for name, grad in found.items() if name.endswith("beta")])
        return {"betas": betas, **{name: grad for name, grad in found.items() if not name.endswith("beta")}}

    one, other = joined(one), joined(other)
    return {name: ((one[name] - other[name]).norm() / other[name].norm()).item() for name in other}


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("layers", [2, 8, 10, 17])
def test_gradients_are_the_same_with_outputs_rebuilt(layers: int, every: int, build: Callable[..., Any]) -> None:
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = build(layers, dtype)
        expected = gradients(model)
        loss = loss_of(model, a_batch()).detach()
        checkpoint(model, keep_recurrence, every=every)
        errors = relative(gradients(model), expected)
        assert max(errors.values()) < limit, max(errors, key=errors.get)
        assert torch.equal(loss_of(model, a_batch()).detach(), loss)


def test_in_double_precision_every_beta_gets_its_gradient(build: Callable[..., Any]) -> None:
    model = build(9, torch.float64)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("beta"):
                parameter.fill_((0.5 + i % 7 / 6) * (-1) ** i)
    expected = gradients(model)
    checkpoint(model, keep_recurrence)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.7, 0.5, -0.3, 0.1, 0.02, 0.0])
@pytest.mark.parametrize(("dtype", "autocast", "limit"), [(torch.float32, False, 1e-5), (torch.float32, True, 5e-2)])
def test_small_betas_store_more_outputs_for_equal_gradients(
    beta: float, dtype: torch.dtype, autocast: bool, limit: float, build: Callable[..., Any]
) -> None:
    model = build(16, dtype, beta=beta)
    results: list[tuple[Tensor, ...]] = []
    for policy in (None, keep_recurrence):
        checkpoint(model, policy)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, a_batch())
        model.zero_grad()
        loss.backward()
        named = [(name, p.grad.flatten()) for name, p in model.named_parameters()]
        results.append(tuple(torch.cat([g for name, g in named if name.endswith(end)]) for end in ("", "beta")))
    for one, other in zip(*results, strict=True):
        assert ((one - other).norm() / one.norm()).item() < limit


def test_the_growth_of_errors_decides_where_outputs_are_stored() -> None:
    def stored(beta: float, dtype: torch.dtype, depths: int = 17) -> list[int]:
        tape = Tape("", depths)
        return [d + 1 for d in range(depths - 1) if not tape.may_drop(d, dtype, lambda: beta)]

    assert stored(1.0, torch.bfloat16) == stored(0.6, torch.float32) == [9]
    assert stored(0.5, torch.bfloat16) == [3, 6, 9, 12, 15]  # 1 / 0.5² = 4 is allowed, 1 / 0.5³ is not
    assert stored(0.2, torch.bfloat16) == list(range(1, 17))


def test_rebuilding_works_in_bfloat16_and_under_autocast(build: Callable[..., Any]) -> None:
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model = build(4, dtype)
        results = []
        for policy in (None, keep_recurrence):
            checkpoint(model, policy)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, a_batch())
            model.zero_grad()
            loss.backward()
            results.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
        assert ((results[1] - results[0]).norm() / results[0].norm()).item() < 0.03


def kept(model: Any, policy: Any) -> Counter[int]:
    """How many tensors of which size wait for the backward pass, for one sequence."""
    checkpoint(model, policy)
    ids = a_batch(rows=1)
    found = measure_saved(model, {"input_ids": ids, "labels": ids})
    assert all(not tape.waiting for tape in tapes(model))
    return Counter(torch.Size(shape).numel() for shape in found.shapes if len(shape) > 1)  # not the random state


def sizes(nd: int = 0, nf: int = 0, nr: int = 0) -> Counter[int]:
    return Counter({size: count for size, count in ((N * D, nd), (N * D_FF, nf), (N * R, nr)) if count})


def test_a_block_keeps_input_and_bottlenecks_every_eighth_more(
    build: Callable[..., Any],
) -> None:
    one, two, eight, nine, ten = (kept(build(layers), keep_recurrence) for layers in (1, 2, 8, 9, 10))
    outputs = sizes(nd=5, nf=2)
    assert two - one == sizes(nd=1, nr=7) + outputs  # the last
    assert eight - two == sizes(nd=6, nr=42)
    assert nine - eight == sizes(nd=1, nr=7)
    assert ten - nine == sizes(nd=1, nr=7) + outputs  # the second and the tenth
    assert not (one - two) + (two - eight) + (eight - nine) + (nine - ten)


def test_the_other_policies_keep_what_was_handed_over_too(build: Callable[..., Any]) -> None:
    for policy, per_block in ((keep_bottlenecks, sizes(nd=6, nf=2, nr=7)), (keep_nothing, sizes(nd=6, nf=2))):
        three, four = (kept(build(layers), policy) for layers in (3, 4))
        assert four - three == per_block


def flash_forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, n, width = query
    return 4 * batch * heads * n * n * width


def backward_flops(model: Any) -> int:
    loss = loss_of(model, a_batch(rows=1))
    counted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash_forward}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_rebuilding_costs_one_b_product_per_projection(build: Callable[..., Any]) -> None:
    model = build(3)
    plain = backward_flops(model)
    checkpoint(model, keep_recurrence)
    attention, b_products = 4 * N**2 * D, 2 * N * R * (5 * D + 2 * D_FF)
    dense = 2 * N * (4 * D * D + 2 * D * D_FF)  # the first block, but for down, whose output is not needed
    assert backward_flops(model) - plain == 3 * attention + 2 * b_products + dense


# ---- a chain in use


POLICIES = [None, keep_bottlenecks, keep_bottlenecks_and_attention, keep_nothing, keep_recurrence]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], policy: Any) -> None:
    if policy is keep_recurrence:
        assert max(relative(one, other).values()) < 1e-5
    else:
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("policy", POLICIES)
def test_several_forward_passes_may_wait_for_backward(policy: Any, build: Callable[..., Any]) -> None:
    model = build(3)
    expected = gradients(model, a_batch(0), a_batch(1), a_batch(2))
    checkpoint(model, policy)
    model.zero_grad()
    first, second, third = (loss_of(model, a_batch(seed)) for seed in range(3))
    first.backward()  # not the last one first
    (second + third).backward()
    assert_same({name: parameter.grad for name, parameter in model.named_parameters()}, expected, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_other_calls_between_forward_and_backward_are_harmless(policy: Any, build: Callable[..., Any]) -> None:
    model, other = build(3), build(3, beta=0.5)
    expected, expected_other = gradients(model), gradients(other, a_batch(5))
    for one in (model, other):
        checkpoint(one, policy)
        one.zero_grad()
    loss, loss_other = loss_of(model, a_batch()), loss_of(other, a_batch(5))
    model.eval()
    model(a_batch(1, rows=3))
    model.generate(a_batch(2), max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train()
    with torch.no_grad():
        loss_of(model, a_batch(3))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    loss.backward()
    loss_other.backward()
    assert_same({name: parameter.grad for name, parameter in model.named_parameters()}, expected, policy)
    assert_same({name: parameter.grad for name, parameter in other.named_parameters()}, expected_other, policy)
    assert_same(gradients(copied), expected, policy)


def test_a_policy_is_called_once_per_operation_of_the_first_run(build: Callable[..., Any]) -> None:
    model = build(3)
    expected = gradients(model)
    asked = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        assert not context.is_recompute
        asked.append(op)
        return CheckpointPolicy.PREFER_SAVE if op is torch.ops.aten.silu.default else len(asked) % 3 == 0

    checkpoint(model, policy)
    loss = loss_of(model, a_batch())
    count = len(asked)
    assert asked.count(torch.ops.aten.silu.default) == 3
    model.zero_grad()
    loss.backward()
    assert len(asked) == count
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("policy", [keep_nothing, keep_recurrence])
def test_a_graph_that_is_retained_can_be_run_through_twice(policy: Any, build: Callable[..., Any]) -> None:
    model = build(3)
    checkpoint(model, policy)
    expected = gradients(model)
    model.zero_grad()
    loss = loss_of(model, a_batch())
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same({name: parameter.grad / 2 for name, parameter in model.named_parameters()}, expected, policy)


def test_a_tape_is_empty_after_use_and_copies_share_another(build: Callable[..., Any]) -> None:
    model = build(3)
    assert len(tapes(model)) == 7
    loss_of(model, a_batch()).backward()
    assert all(not tape.waiting for tape in tapes(model))
    assert not any("tape" in name for name in model.state_dict())
    model.model.layers[0](
        numbers(1, 4, D, dtype=torch.float32),
        position_embeddings=model.model.rotary_emb(numbers(1, 4, D, dtype=torch.float32), torch.arange(4)[None]),
    )
    assert all(tape.waiting for tape in tapes(model))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(not tape.waiting for tape in tapes(copied))
        assert len(tapes(copied)) == 7
        assert not tapes(copied) & tapes(model)
        assert {tape.role for tape in tapes(copied)} == {tape.role for tape in tapes(model)}


@pytest.mark.parametrize("policy", POLICIES)
def test_no_memory_is_kept_after_backward_or_without_it(policy: Any, build: Callable[..., Any]) -> None:
    model = build(3)
    checkpoint(model, policy)
    gc.collect()
    gc.disable()  # no cycles either

    def alive() -> int:
        return sum(type(left) in (Slot, Rerun) for left in gc.get_objects())

    try:
        before = alive()
        for backward in (True, False):
            loss = loss_of(model, a_batch())
            if backward:
                loss.backward()
            del loss
            assert alive() == before
    finally:
        gc.enable()


def test_a_loss_from_a_middle_block_needs_kept_outputs(build: Callable[..., Any]) -> None:
    model = build(4)
    middle = lambda: model(a_batch(), output_hidden_states=True, use_cache=False).hidden_states[2].square().mean()  # noqa: E731
    checkpoint(model, keep_bottlenecks)
    middle().backward()
    checkpoint(model, keep_recurrence)
    with pytest.raises(RuntimeError, match=r"depth 1 cannot be rebuilt before depth 2; .* keep_bottlenecks"):
        middle().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_does_not_know_of_tapes_is_refused(reentrant: bool, build: Callable[..., Any]) -> None:
    model = build(3)
    expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(RuntimeError, match="activation checkpointing must be turned on by lorank.checkpoint"):
        gradients(model)
    checkpoint(model, keep_nothing)
    assert_same(gradients(model), expected, keep_nothing)


def test_blocks_out_of_order_or_with_other_tokens_are_refused() -> None:
    x = numbers(2, 10)
    a, b, c = chain(3)
    a(x), b(x), c(x)
    with pytest.raises(
        RuntimeError, match="somewhere: depth 2 finds no output of depth 1; blocks must run in order, once each"
    ):
        c(x)
    a(x)
    with pytest.raises(RuntimeError, match="depth 2 finds no output of depth 1"):
        c(x)
    with pytest.raises(RuntimeError, match=r"depth 0 left an output \[2, 14\] for depth 1, which needs \[1, 14\]"):
        b(x[:1])
    a(x), b(x), a(x)  # broken off, begun anew
    with pytest.raises(RuntimeError, match="depth 2 finds no output of depth 1"):
        c(x)


# ---- β in single precision


def test_beta_stays_in_single_precision_to_the_bit(build: Callable[..., Any], tmp_path: Path) -> None:
    model = build(3, beta=0.123456789)
    exact = torch.tensor([0.123456789])
    gradients(model)

    def check(model: Any, dtype: torch.dtype, wide: torch.dtype = torch.float32) -> None:
        for name, parameter in model.named_parameters():
            is_beta = name.endswith("beta")
            assert parameter.dtype == (wide if is_beta else dtype), name
            assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name
            assert not is_beta or torch.equal(parameter.float(), exact), name

    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        check(copy.deepcopy(model).to(dtype), dtype)
        check(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), dtype)
        check(type(model)._from_config(model.config, dtype=dtype), dtype)
    check(model.bfloat16(), torch.bfloat16)
    model.save_pretrained(tmp_path)
    check(AutoModelForCausalLM.from_pretrained(tmp_path), torch.bfloat16)
    check(model.double(), torch.float64, torch.float64)
    check(model.float(), torch.float32)


def test_bfloat16_sums_in_single_precision_without_wide_copies() -> None:
    _, layer = chain(2, dtype=torch.bfloat16)
    layer.beta.data.fill_(1.001)  # a bfloat16 would be 1
    previous, change = torch.full((4, 14), 256.0).bfloat16(), torch.full((4, 14), 0.75).bfloat16()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = next_output(previous.requires_grad_(), change, bounded(layer.beta))
    assert y.dtype == torch.bfloat16
    assert y[0, 0] == torch.tensor(256 * 1.001001 + 0.75).bfloat16() != torch.tensor(256.75).bfloat16()
    assert {t.dtype for t in saved if t.numel() > 1} <= {torch.bfloat16}


# ---- refusals


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, {}])
def test_ranks_that_make_no_sense_are_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match="rank must"):
        CRNet(rank=rank)


@pytest.mark.parametrize("beta", [float("nan"), float("inf"), True, "1"])
def test_beta_is_a_finite_number(beta: Any) -> None:
    with pytest.raises(ValueError, match="beta must be a finite number, got"):
        CRNet(beta=beta)


def test_a_projection_chosen_at_some_depths_only_is_refused(small: Callable[..., Any]) -> None:
    model = small("llama", num_hidden_layers=4)
    message = r"crnet chains model\.layers\.\*\.mlp\.up_proj .* depth 2 was chosen without depth 1; choose neighbouring"
    with pytest.raises(ValueError, match=message):
        convert(model, CRNet(), exclude=r"layers\.1\.mlp\.up_proj")
    assert type(model) is LlamaForCausalLM


def test_neighbouring_blocks_are_chained_whichever_they_are(small: Callable[..., Any]) -> None:
    model = convert(small("llama", num_hidden_layers=4), CRNet(), targets=r"layers\.[12]\..*q_proj").train()
    kinds = [type(block.self_attn.q_proj) for block in model.model.layers]
    assert kinds == [nn.Linear, CRNetDense, CRNetLinear, nn.Linear]
    expected = gradients(model)
    for policy in (keep_bottlenecks, keep_recurrence):
        checkpoint(model, policy)
        assert_same(gradients(model), expected, policy)


def test_widths_that_differ_between_depths_are_refused() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8 * i, 8 * i + 8)) for i in (1, 2))

    with pytest.raises(
        ValueError, match=r"blocks\.\*\.0 from block to block, but it is 16 wide at depth 0 and 24 wide at depth 1"
    ):
        convert(Growing(), CRNet(rank=2))


def test_a_rank_for_the_dense_block_alone_decides_nothing(small: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="decides nothing"):
        convert(small("llama"), CRNet(rank={r"layers\.0\.": 4, ".*": 8}))


def test_the_plan_says_that_the_first_block_stays_dense() -> None:
    from lorank.plan.dry_run import plan
    from lorank.train.recipe import Recipe

    becomes = {row.after for row in plan(Recipe(method="crnet", rank=8)).rows}
    assert becomes == {"CRNetDense(), then CRNetLinear(rank=8)"}


def test_it_cannot_be_merged(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="crnet cannot be merged: a layer's output depends on the layer before"):
        merge(build(2))
