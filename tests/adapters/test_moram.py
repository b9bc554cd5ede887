"""MoRAM: ranks that score themselves, and grow by task."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank.adapters.gated import gathered
from lorank.adapters.moram import MoRAMLinear, scores, weights


def layer(rank: int = 4, **changes: Any) -> MoRAMLinear:
    torch.manual_seed(0)
    settings = {"tasks": 1, "top_k": None, "temperature": 0.3, "threshold": 0.0}
    made = MoRAMLinear(nn.Linear(12, 10), rank, **{**settings, **changes})
    nn.init.normal_(made.B.weight)
    return made


def test_with_all_ranks_it_is_a_softmax_weighted_lora() -> None:
    made, x = layer(), torch.randn(3, 5, 12)
    z = x @ made.A.weight.T
    w = torch.softmax(z / z.square().sum(-1, keepdim=True).sqrt() / 0.3, dim=-1)
    torch.testing.assert_close(made(x), made.W(x) + (w * z) @ made.B.weight.T)


def test_the_threshold_acts_in_evaluation_only() -> None:
    """And what it drops is missing: the weights then sum to less than one, as in the paper."""
    made, without, x = layer(threshold=0.2), layer(), torch.randn(50, 12)
    assert torch.equal(made.train()(x), without.train()(x))
    assert not torch.allclose(made.eval()(x), without.eval()(x))
    s = scores(made.A(x))
    w, chosen = weights(s, 4, 0.3, threshold=0.2)
    assert (w.sum(-1) < 0.999).any()
    assert torch.equal(w == 0, s.gather(-1, chosen) < 0.2)
    assert (s < 0).any(), "scores keep their sign"


def test_a_zero_input_weighs_all_alike() -> None:
    made, x = layer(), torch.zeros(1, 12, requires_grad=True)
    w, chosen = weights(scores(made.A(x)), 3, 0.03)
    assert torch.equal(w, torch.full((1, 3), 1 / 3)) and len(set(chosen[0].tolist())) == 3
    made(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *made.trained()))  # type: ignore[union-attr]


def test_gathered_ranks_give_the_layer_too() -> None:
    made, x = layer(rank=8, top_k=3, threshold=0.2).eval(), torch.randn(20, 12)
    w, chosen = weights(scores(made.A(x)), 3, 0.3, threshold=0.2)
    torch.testing.assert_close(made.W(x) + gathered(x, made.A.weight, made.B.weight, chosen, w), made(x))


def test_at_most_k_ranks_answer_and_at_least_two() -> None:
    made = layer(rank=8, top_k=1)
    gate = made.gate(x := torch.randn(20, 12), made.A(x))
    assert torch.equal(gate.count_nonzero(dim=-1), torch.full((20,), 2))


def test_new_ranks_change_the_function_and_old_ones_stay() -> None:
    """B = 0 keeps no function here, because new ranks take part in the softmax."""
    made, x = layer(), torch.randn(6, 12)
    before, A, B = made(x), made.A.weight.clone(), made.B.weight.clone()
    assert made.next_task() and made.A.weight.shape == (4, 12) and not made.B.weight.any()
    assert not torch.allclose(made(x), before, rtol=1e-2)
    with torch.no_grad():
        made.B.weight.normal_()
    made.next_task()
    A3, B3 = made.factors()
    torch.testing.assert_close(made(x), made.W(x) + (made.gate(x, x @ A3.T) * (x @ A3.T)) @ B3.T)
    assert made.latent(x).shape == (6, 12) and [*map(len, made.factors())] == [12, 10]
    assert torch.equal(made.earlier.A.weight[:4], A) and torch.equal(made.earlier.B.weight[:, :4], B)  # type: ignore[union-attr]
    made(x).square().sum().backward()
    assert all(p.grad is None for p in made.earlier.parameters())  # type: ignore[union-attr]
    assert made.gate(x, made.latent(x)).count_nonzero(dim=-1).max() <= 4


@pytest.mark.parametrize("name", ["moram", "codyra"])
def test_tasks_are_saved_and_a_resumed_stream_is_the_same(name: str, small: Any, tmp_path: Any) -> None:
    """Two tasks of three steps; the second half is repeated from what was saved after step 4."""

    def start(model: Any) -> tuple[Any, Any, Any]:
        optimizer = lorank.optimizer(model.train(), lr=1e-2)
        return model, optimizer, lorank.step_hook(model, optimizer, steps=3)

    def step(model: Any, optimizer: Any, seed: int) -> None:
        tokens = torch.randint(0, 90, (2, 8), generator=torch.Generator().manual_seed(seed))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    model, optimizer, hook = start(lorank.convert(small("llama"), name))
    for seed in range(3):
        step(model, optimizer, seed)
    A, logits = model.model.layers[1].mlp.up_proj.A.weight, model.eval()(torch.arange(8)[None]).logits
    assert hook is None or hook.step == 3
    lorank.next_task(model, optimizer)
    assert hook is None or hook.step == 0
    assert model.model.layers[1].mlp.up_proj.A.weight is A and not optimizer.state
    if name == "codyra":  # what was learned is in W
        torch.testing.assert_close(model(torch.arange(8)[None]).logits, logits, rtol=1e-4, atol=1e-5)
    step(model.train(), optimizer, 3)
    model.save_pretrained(tmp_path)
    loaded = start(type(model).from_pretrained(tmp_path))
    loaded[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if hook is not None:
        loaded[2].load_state_dict(hook.state_dict())
    for seed in (4, 5):
        step(model, optimizer, seed)
        step(*loaded[:2], seed)
    ours, theirs = model.state_dict(), loaded[0].state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert model.config.lorank["arguments"].get("tasks", 2) == 2
    fresh = lorank.convert(small("llama"), lorank.conversion.method_of(model))  # type: ignore[attr-defined]
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in ours.items()}
