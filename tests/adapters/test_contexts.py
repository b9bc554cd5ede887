"""MTLoRA, PETALface and RecLoRA: blocks of one adapter, chosen or mixed by a task, a quality or a user."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import SwinConfig, SwinForImageClassification

import lorank
from lorank.adapters.blocks import KEPT, by_sample
from lorank.adapters.mtlora import MTLoRALinear
from lorank.adapters.petalface import PETALfaceLinear
from lorank.adapters.reclora import RecLoRALinear
from lorank.testing.structure import TOKENS


def filled(layer: Any) -> Any:
    torch.manual_seed(1)
    nn.init.normal_(layer.B.weight)
    return layer


def swin() -> Any:
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
    return SwinForImageClassification(SwinConfig(**shape, num_labels=3)).eval()


def test_only_the_last_block_of_a_stage_has_parts_for_tasks() -> None:
    """And not in query, key and value, as in the authors' Swin; at the start every task is the frozen model."""
    model, image = swin(), torch.randn(2, 3, 16, 16)
    before = model(image).logits
    lorank.convert(model, lorank.MTLoRA(tasks=3, rank=4, task_rank=2))
    own = [name for name, m in model.named_modules() if isinstance(m, MTLoRALinear) and len(m.ranks) == 4]
    shared = [name for name, m in model.named_modules() if isinstance(m, MTLoRALinear) and len(m.ranks) == 1]
    blocks = {re.search(r"layers\.(\d)\.blocks\.(\d)", name).groups() for name in own}  # type: ignore[union-attr]
    assert blocks == {("0", "1"), ("1", "0")} and len(own) == 2 * 3 and len(shared) == 3 * 3 + 3
    assert not any(re.search("query|key|value", name) for name in own)
    for task in (None, 0, 2, torch.tensor([1, 0])):
        lorank.set_context(model, task)
        torch.testing.assert_close(model(image).logits, before, rtol=0, atol=1e-6)


def test_a_task_moves_its_own_part_and_the_shared_one() -> None:
    layer = filled(MTLoRALinear(nn.Linear(384, 384), [64, 4, 4, 4, 4], scale=4.0, with_shared=True))
    assert sum(p.numel() for p in layer.trained()) == 61_440
    layer.context.value = torch.tensor(2)
    layer(torch.randn(5, 384)).square().sum().backward()
    for i in range(5):
        rows = layer.block(i)
        moved = [layer.A.weight.grad[rows].any().item(), layer.B.weight.grad[:, rows].any().item()]
        assert moved == [i in (0, 3)] * 2


def test_samples_may_have_tasks_of_their_own() -> None:
    """Also where the first axis holds windows of each picture, and without the shared part."""
    layer = filled(MTLoRALinear(nn.Linear(12, 10), [3, 2, 2], scale=4.0, with_shared=False))
    x, tasks = torch.randn(6, 5, 12), torch.tensor([1, 0, 1])
    layer.context.value = tasks
    found = layer(x)
    for i in range(6):
        rows = layer.block(int(tasks[i // 2]) + 1)
        expected = layer.W(x[i]) + 4.0 * x[i] @ layer.A.weight[rows].T @ layer.B.weight[:, rows].T
        torch.testing.assert_close(found[i], expected)
    with pytest.raises(ValueError, match="the context must have a row for each sample, got 4 rows for a batch of 6"):
        by_sample(torch.ones(4, 7), x)


def test_a_merged_model_is_that_of_its_task(small: Any) -> None:
    model = lorank.convert(small("llama"), lorank.MTLoRA(tasks=2, rank=4, task_rank=2)).eval()
    for module in model.modules():
        if isinstance(module, MTLoRALinear):
            filled(module)
    outputs = []
    for task in (0, 1):
        lorank.set_context(model, task)
        outputs.append(model(TOKENS).logits)
        torch.testing.assert_close(lorank.merge(model)(TOKENS).logits, outputs[-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*outputs)
    lorank.set_context(model, torch.tensor([0, 1]))
    torch.testing.assert_close(model(TOKENS).logits, torch.stack([outputs[0][0], outputs[1][1]]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the context must be one for all samples here"):
        lorank.merge(model)


def test_quality_blends_two_adapters() -> None:
    layer = filled(PETALfaceLinear(nn.Linear(12, 10), 3, scale=2.0, dropout=0.0, threshold=0.25))
    x = torch.randn(4, 5, 12)
    outputs = {}
    for alpha in (0.0, 0.5, 1.0, 1.5):
        layer.context.value = torch.tensor(alpha - 0.25)  # α = ½ + q - q_0
        outputs[alpha] = layer(x)
        layer.zero_grad()
        outputs[alpha].square().sum().backward()
        moved = [layer.B.weight.grad[:, layer.block(i)].any().item() for i in (0, 1)]
        assert moved == [alpha != 1.0, alpha != 0.0]
    torch.testing.assert_close(outputs[0.5], (outputs[0.0] + outputs[1.0]) / 2)
    torch.testing.assert_close(outputs[1.5], 1.5 * outputs[1.0] - 0.5 * outputs[0.0], rtol=1e-4, atol=1e-5)
    first, second = layer.block(0), layer.block(1)
    torch.testing.assert_close(
        outputs[0.0], layer.W(x) + 2.0 * x @ layer.A.weight[first].T @ layer.B.weight[:, first].T
    )
    with torch.no_grad():
        layer.A.weight[second], layer.B.weight[:, second] = layer.A.weight[first], layer.B.weight[:, first]
    layer.context.value = torch.tensor([0.1, 0.9, -3.0, 0.25])
    torch.testing.assert_close(layer(x), outputs[0.0])


def test_users_with_one_mixture_have_one_model(small: Any) -> None:
    model = lorank.convert(small("llama"), lorank.RecLoRA(rank=2, adapters=3, user_width=5)).eval()
    gate = model.model.lorank_gate
    with torch.no_grad():
        gate.weight[:, 4] = 0  # a feature that changes no mixture
    for module in model.modules():
        if isinstance(module, RecLoRALinear):
            filled(module)
    users = torch.randn(2, 5)
    users[1] = users[0] + torch.tensor([0.0, 0.0, 0.0, 0.0, 7.0])
    tokens = TOKENS[:1].expand(2, -1)
    lorank.set_context(model, users)
    logits = model(tokens).logits
    assert torch.equal(logits[0], logits[1])
    lorank.set_context(model, users[0])
    torch.testing.assert_close(model(tokens).logits, logits)
    layer: Any = model.model.layers[0].mlp.up_proj
    x, a = torch.randn(4, 32), torch.softmax(gate.weight @ users[0] + gate.bias, 0)
    A, B = layer.A.weight.view(3, 2, 32), layer.B.weight.view(80, 3, 2)
    torch.testing.assert_close(layer(x), layer.W(x) + 8.0 * torch.einsum("k,okr,kri,ti->to", a, B, A, x))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lorank.set_context(model, torch.randn(2, 5))
    model(tokens).logits.sum().backward()
    assert count == sum(p.numel() for p in model.parameters() if p.grad is not None), "DDP waits for all of them"
    assert gate.weight.grad.any() and not gate.unknown.grad.any()


@pytest.mark.parametrize(
    ("method", "value", "words"),
    [
        ("mtlora", 4, "a task must be an integer from 0 to 3, or one for each sample, got 4"),
        ("petalface", float("nan"), "a quality must be a finite number"),
        (
            "reclora",
            torch.ones(3),
            r"a user must be a vector of user_width=64 numbers, or one for each sample, got \[3\]",
        ),
        ("lora", 1, "model must have an adapter that follows a context, such as mtlora, got one with lora"),
    ],
)
def test_a_context_must_fit(method: str, value: Any, words: str, small: Any) -> None:
    with pytest.raises(ValueError, match=words):
        lorank.set_context(lorank.convert(small("llama"), method), value)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        (lorank.MTLoRA(tasks=2, rank=4, task_rank=2), [1, 0]),
        (lorank.PETALface(rank=3), [torch.tensor([0.9, 0.3]), 0.2]),
        (lorank.RecLoRA(rank=2, user_width=2), [torch.tensor([1.0, -2.0]), torch.tensor([[0.0, 1.0], [2.0, 1.0]])]),
        (lorank.SplitFlux(rank=4, residual_rank=2), [0.2, torch.linspace(0, 1, 24).view(2, 12)]),
    ],
)
def test_checkpointed_losses_of_several_contexts(method: Any, values: list[Any], small: Any) -> None:
    """One backward pass follows two forward passes, each with a context, and a third context; float64."""
    model = lorank.convert(small("llama"), method).double()
    torch.manual_seed(1)
    moved = [nn.init.normal_(p, std=0.3) for p in model.parameters() if p.requires_grad]
    gradients = []
    for kind in ("none", "policy", "reentrant"):
        if kind == "policy":
            lorank.checkpoint(model.train(), lorank.keep_bottlenecks)
        elif kind != "none":
            model.train().activation_checkpointing_disable()
            model.activation_checkpointing_enable({"use_reentrant": True})
        total = torch.tensor(0.0)
        for weight, value in enumerate(values, start=1):
            lorank.set_context(model, value)
            total = total + weight * model(TOKENS, labels=TOKENS).loss
        lorank.set_context(model, None)
        model.zero_grad()
        total.backward()
        gradients.append([p.grad for p in moved])
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=1e-12, atol=1e-14)


def test_contexts_of_long_ago_are_refused() -> None:
    layer = filled(MTLoRALinear(nn.Linear(4, 4), [2, 2, 2], scale=1.0, with_shared=True))
    layer.context.value = torch.tensor(0)
    y = checkpoint(layer, torch.randn(3, 4, requires_grad=True), use_reentrant=False)
    for _ in range(KEPT):
        layer.context.value = torch.tensor(1)
        y = y + layer(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=f"must follow at most {KEPT} calls of lorank.set_context"):
        y.sum().backward()
