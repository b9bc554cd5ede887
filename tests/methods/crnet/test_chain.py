"""CR-Net: the chain of outputs in use, its precision, and what is refused."""

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lorank import (
    CRNet,
    checkpoint,
    convert,
    keep_bottlenecks,
    keep_bottlenecks_and_attention,
    keep_recurrence,
    merge,
)
from lorank.checkpointing import keep_nothing
from lorank.methods.crnet import (
    CRNetDense,
    CRNetLinear,
    bounded,
    next_output,
)
from lorank.tape import Rerun, Slot
from tests.methods.crnet.conftest import D, a_batch, chain, gradients, loss_of, numbers, relative, tapes

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


def test_trainers_checkpointing_takes_a_policy_that_knows_tapes(build: Callable[..., Any]) -> None:
    model = build(3)
    expected = gradients(model)
    with pytest.raises(ValueError, match="must follow a policy of lorank.checkpoint, got use_reentrant=True"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    model.activation_checkpointing_enable({"use_reentrant": False})
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


@pytest.mark.parametrize(("first_block", "first"), [("dense", "CRNetDense()"), ("low-rank", "CRNetLowRank(rank=8)")])
def test_the_plan_says_what_the_first_block_is(first_block: str, first: str) -> None:
    from lorank.plan.dry_run import plan
    from lorank.train.recipe import Recipe

    becomes = {row.after for row in plan(Recipe(method="crnet", rank=8, options={"first_block": first_block})).rows}
    assert becomes == {f"{first}, then CRNetLinear(rank=8)"}


def test_it_cannot_be_merged(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="crnet cannot be merged: a layer's output depends on the layer before"):
        merge(build(2))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_fixed_beta_stays_and_changes_no_other_gradient(build: Any, recompute: bool) -> None:
    found = []
    for learn_beta in (True, False):
        torch.manual_seed(0)
        model = build(3, beta=0.5, learn_beta=learn_beta)
        if recompute:
            checkpoint(model, keep_recurrence)
        ids = torch.arange(3, 43).view(2, 20)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    learnt, fixed = found
    assert any("beta" in name for name in learnt)
    for name, gradient in fixed.items():
        if "beta" in name:
            assert gradient is None and learnt[name] is not None
        else:
            torch.testing.assert_close(gradient, learnt[name])
