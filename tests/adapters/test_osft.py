"""OSFT and Comp-LoRA: what is protected stays put under Adam, for a thousand steps."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank.adapters.comp_lora import CompLoRALinear
from lorank.adapters.importance import kept_by_importance
from lorank.adapters.osft import FORMS, OSFTLinear
from lorank.adapters.protected import Guard, outside

KEEP = 8


def dense(d_in: int = 24, d_out: int = 40) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out)


def train(layer: Any, optimizer: Any, steps: int) -> None:
    """Towards another linear map."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(40, 24, generator=generator)
    for _ in range(steps):
        x = torch.randn(8, 24, generator=generator)
        (layer(x) - x @ target.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def lost(layer: Any, core: tuple[Tensor, Tensor, Tensor], before: Tensor) -> tuple[float, float]:
    """|U_hᵀ W V_h - S_h| relative to S_h, and which part of the change of W lies in the protected directions of either side; in double
    precision, from W itself."""
    U, S, V = core
    W = layer.merged()[0].detach().double()
    change = W - before.double()
    inside = torch.maximum((U.T @ change).norm(), (change @ V).norm()) / change.norm()
    return ((U.T @ W @ V - S.diag()).norm() / S.norm()).item(), inside.item()


def core_of(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
    return U[:, :KEEP], S[:KEEP], Vh[:KEEP].T


@pytest.mark.parametrize("form", FORMS)
def test_the_core_survives_a_thousand_steps_of_adam(form: str) -> None:
    start = dense()
    core, before = core_of(start.weight), start.weight.detach().clone()
    layer: Any = FORMS[form](start, KEEP)  # type: ignore[call-arg]
    torch.testing.assert_close(layer.merged()[0], before)
    optimizer = torch.optim.AdamW(layer.trained(), lr=1e-2)
    Guard(optimizer, [layer])
    train(layer, optimizer, 1000)
    assert (layer.merged()[0] - before).norm() > before.norm(), "it has learned something else"
    assert max(lost(layer, core, before)) < 1e-6


def test_projected_gradients_alone_lose_it() -> None:
    """As in the authors' code and peft's: Adam divides the projected gradient entry by entry."""
    start = dense()
    core, before = core_of(start.weight), start.weight.detach().clone()
    layer = OSFTLinear(start, KEEP)
    optimizer = torch.optim.AdamW(layer.trained(), lr=1e-2)
    optimizer.register_step_pre_hook(lambda *_: layer.project_gradients())
    train(layer, optimizer, 200)
    assert min(lost(layer, core, before)) > 0.05


def test_gradients_leave_the_core_alone() -> None:
    layer = OSFTLinear(dense(), KEEP)
    layer(torch.randn(5, 24)).square().sum().backward()
    with torch.no_grad():
        layer.project_gradients()
    U, V = layer.U_low.grad, layer.V_low.grad
    assert U is not None and V is not None and U.norm() > 0.1 and layer.U_high.grad is None
    assert (layer.U_high.T @ U).abs().max() < 1e-5 and (layer.V_high.T @ V).abs().max() < 1e-5


def test_with_a_small_core_more_is_trained_than_dense() -> None:
    """(d_in + d_out + 1)(m - k), and d_in d_out where W itself is trained."""
    counts = [sum(p.numel() for p in FORMS[form](dense(), KEEP).trained()) for form in FORMS]  # type: ignore[call-arg]
    assert counts == [(24 + 40 + 1) * (24 - 8), 24 * 40] == [1040, 960]
    assert OSFTLinear(dense(), 100).rank == 23, "one pair trains"


@pytest.mark.parametrize("form", FORMS)
def test_a_task_ends_with_a_new_core(form: str, small: Any, tmp_path: Any) -> None:
    model = lorank.convert(small("llama"), lorank.OSFT(rank=KEEP, form=form)).train()  # type: ignore[arg-type]
    optimizer = lorank.optimizer(model, lr=1e-2)
    lorank.step_hook(model, optimizer, steps=4)
    tokens = torch.arange(12)[None]

    def step(model: Any, optimizer: Any) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    before = model(tokens).logits
    lorank.next_task(model, optimizer)
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
    layer: Any = model.model.layers[1].mlp.up_proj
    W = layer.merged()[0].detach().clone()
    core = core_of(W)
    step(model, optimizer)
    assert max(lost(layer, core, W)) < 1e-5
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    again = lorank.optimizer(loaded, lr=1e-2)
    lorank.step_hook(loaded, again, steps=4)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(loaded, again)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert type(lorank.merge(model).model.layers[1].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("sides", ["both", "output", "input"])
def test_an_update_stays_in_the_complement(sides: Any) -> None:
    start = dense()
    (U, S, V), W = core_of(start.weight), start.weight.detach().clone()
    layer = CompLoRALinear(start, 4, keep=KEEP, sides=sides, scale=1.0)
    optimizer = torch.optim.AdamW(layer.trained(), lr=3e-4)
    Guard(optimizer, [layer])
    train(layer, optimizer, 50)
    update = layer.product().detach().double()
    assert torch.linalg.matrix_rank(update, rtol=1e-5) == 4 and torch.equal(layer.W.weight, W)
    assert bool((U.T @ update).norm() < 1e-5 * update.norm()) is (sides != "input")
    assert bool((update @ V).norm() < 1e-5 * update.norm()) is (sides != "output")
    if sides == "both":
        largest = torch.linalg.svdvals(W.double() + update)[:KEEP]
        torch.testing.assert_close(largest, S, rtol=1e-6, atol=0)


def test_projecting_twice_is_projecting_once() -> None:
    Q, _ = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64))
    X = torch.randn(12, 5, dtype=torch.float64)
    once = outside(Q, X)
    torch.testing.assert_close(outside(Q, once), once, rtol=0, atol=1e-14)
    torch.testing.assert_close(once, (torch.eye(12) - Q @ Q.T) @ X)


def test_blocks_that_change_little_keep_more(small: Any) -> None:
    """Against cosines of the hidden states that the model itself gives."""
    model, ids = small("llama", num_hidden_layers=3), torch.arange(24).view(2, 12)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(60)
    table = kept_by_importance(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}], least=0.25, most=0.5)
    kept: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    states = [
        *model(ids, output_hidden_states=True).hidden_states[:3],
        *kept,
    ]  # the last one of transformers is normalised
    handle.remove()
    cosines = [torch.cosine_similarity(x, y, dim=-1).mean().item() for x, y in itertools.pairwise(states)]
    assert list(table) == [rf"^model\.layers\.{i}\." for i in range(3)]
    expected = [0.25 + 0.25 * one / (sum(cosines) / 3) for one in cosines]
    assert list(table.values()) == pytest.approx(expected, rel=1e-5) and expected[1] == min(expected)
    protected = [m.rank for m in lorank.convert(model, lorank.OSFT(rank=table)).modules() if isinstance(m, OSFTLinear)]
    assert protected[:7:3] == [round(expected[0] * m) for m in (32, 32, 32)] and protected[7] < protected[0]
    with pytest.raises(ValueError, match="batches must reach all of them"):
        kept_by_importance(small("llama"), [])
    with pytest.raises(
        ValueError, match="least and most must be shares above 0 and up to 1, in order, got 0.5 and 0.2"
    ):
        kept_by_importance(small("llama"), [], least=0.5, most=0.2)
