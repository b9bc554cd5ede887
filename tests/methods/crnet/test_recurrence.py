"""CR-Net: outputs that are dropped and rebuilt backwards."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lorank import (
    checkpoint,
    keep_bottlenecks,
    keep_recurrence,
)
from lorank.checkpointing import keep_nothing
from lorank.methods.crnet import (
    bounded,
    next_output,
    previous_output,
)
from lorank.tape import Tape
from tests.methods.crnet.conftest import D_FF, D, N, R, a_batch, gradients, kept, loss_of, numbers, relative


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
    model = build(16, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("beta"):
                parameter.fill_(beta)
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


def sizes(nd: int = 0, nf: int = 0, nr: int = 0) -> Counter[int]:
    return Counter({size: count for size, count in ((N * D, nd), (N * D_FF, nf), (N * R, nr)) if count})


def test_a_block_keeps_input_and_bottlenecks_every_eighth_more(
    build: Callable[..., Any],
) -> None:
    one, two, eight, nine, ten = (kept(build(layers), keep_recurrence) for layers in (1, 2, 8, 9, 10))
    low = kept(build(2, first_block="low-rank"), keep_recurrence)
    assert low - two == sizes(nr=7) and not two - low, "bottlenecks of a first block that has them"
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
