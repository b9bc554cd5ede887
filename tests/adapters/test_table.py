"""What every adapter of the table must do in training, in a few steps each; lorank/testing has the rest of the contract."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lorank
from lorank.adapters.gated import Adapted
from lorank.table import find, method_names

ADAPTERS = [name for name in method_names("method") if find(name).adapts]


def start(small: Any, name: str) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = lorank.convert(small("llama", num_hidden_layers=1), find(name)(**find(name).soon)).train()
    optimizer = lorank.optimizer(model, lr=1e-2, weight_decay=0.1)
    return model, optimizer, lorank.step_hook(model, optimizer, steps=4)


def backward(model: Any, rows: Tensor, share: float = 1.0) -> None:
    (model(input_ids=rows, labels=rows).loss * share).backward()


def rows(seed: int) -> Tensor:
    return torch.randint(0, 90, (4, 8), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ADAPTERS)
def test_micro_batches_add_up_and_a_resumed_run_is_the_same(name: str, small: Any) -> None:
    """Four steps, and the last two again from what was saved after two. The first gradient is that of two micro-batches too."""
    model, optimizer, hook = start(small, name)
    halves = copy.deepcopy(model)
    backward(model, rows(0))
    for half in rows(0).chunk(2):
        backward(halves, half, 0.5)
    for p, q in zip(model.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
    saved: Any = None
    for step in range(4):
        if step:
            backward(model, rows(step))
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), hook and hook.state_dict()))
    again, its, other = start(small, name)
    for one, state in zip((again, its, other), saved, strict=True):
        if one is not None:
            one.load_state_dict(state)
    for step in (2, 3):
        backward(again, rows(step))
        its.step()
        its.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert hook is None or hook.step == other.step == 4


@pytest.mark.parametrize("name", [name for name in ADAPTERS if find(name).layer.next_task is not Adapted.next_task])
def test_the_next_task_begins_alike_in_every_replica(name: str, small: Any) -> None:
    """Whatever the state of the global generator, which stays as it is; other weights begin otherwise."""
    models = [copy.deepcopy(start(small, name)[0]) for _ in range(3)]
    with torch.no_grad():
        for p in models[2].parameters():
            p.add_(0.01)
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        lorank.next_task(model)
        assert torch.initial_seed() == seed and torch.equal(
            torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(seed))
        )
    one, same, other = ([*model.state_dict().values()] for model in models)
    assert all(torch.equal(p, q) for p, q in zip(one, same, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
