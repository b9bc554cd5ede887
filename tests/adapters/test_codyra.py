"""CoDyRA: a proximal step on the ranks' numbers, and merging what is left."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

import lorank
from lorank.adapters.codyra import CoDyRALinear, Shrink, shrunk


def layer() -> CoDyRALinear:
    torch.manual_seed(0)
    made = CoDyRALinear(nn.Linear(12, 10), 6)
    nn.init.normal_(made.B.weight)
    return made


def test_the_step_is_the_proximal_operator() -> None:
    """Against the least of ½ (u - γ)² + κ |u| on a fine grid."""
    gamma, kappa = torch.linspace(-2, 2, 41, dtype=torch.float64), 0.5
    grid = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    least = (0.5 * (grid - gamma[:, None]).square() + kappa * grid.abs()).argmin(1)
    torch.testing.assert_close(shrunk(gamma, kappa), grid[least], rtol=0, atol=1.1e-3)


def test_what_is_above_kappa_is_kept() -> None:
    """The authors' lines shrink, then compare with κ again, so that all up to 2 κ is lost."""
    gamma = torch.tensor([0.5, 0.9, 1.1, 1.9, -1.5, 2.1])
    theirs = torch.where(gamma > 0, gamma - 1, gamma + 1) * (gamma.abs() - 1 > 1)
    assert shrunk(gamma, 1.0).count_nonzero() == 4 and theirs.count_nonzero() == 1


def test_pruning_and_merging_keep_the_outputs() -> None:
    made, x = layer(), torch.randn(5, 12)
    with torch.no_grad():
        made.gamma[[1, 4]] = 0
    assert "4 ranks left" in repr(made)
    left = made.gamma.nonzero()[:, 0]
    expected = made.W(x) + (x @ made.A.weight[left].T * made.gamma[left]) @ made.B.weight[:, left].T
    assert sum(p.numel() for p in made.trained()) == 6 * (12 + 10 + 1)
    torch.testing.assert_close(made(x), expected)
    made.next_task()
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
    assert not made.B.weight.any() and made.gamma.all()


def test_the_second_half_shrinks_and_kappa_zero_never() -> None:
    for kappa in (0.3, 0.0):
        made = layer()
        with torch.no_grad():
            made.gamma.copy_(torch.tensor([-1.0, 0.5, 0.2, 0.1, 3.0, -0.05]))
        before, optimizer = made.gamma.clone(), torch.optim.SGD([made.gamma], lr=0.0)
        Shrink(lorank.CoDyRA(kappa=kappa), made, optimizer, steps=4)
        made.gamma.grad = torch.ones(6)
        for step in range(1, 5):
            optimizer.step()
            spent = {3: 0.15, 4: 0.45}.get(step, 0.0) if kappa else 0.0
            expected: Any = torch.sign(before) * (before.abs() - spent).clamp(min=0)
            torch.testing.assert_close(made.gamma.detach(), expected)


def test_sixteen_bits_shrink_as_much_as_more_do() -> None:
    """κ_t is below half a unit of the largest γ throughout; also where a run is resumed, and a new task lacks nothing."""
    ends, steps = [], 40
    for dtype in (torch.float64, torch.bfloat16):
        made = layer().to(dtype)
        with torch.no_grad():
            made.gamma.copy_(torch.tensor([3.0, -2.0, 1.0, 0.5, 0.03, 0.0]))
        hook = Shrink(lorank.CoDyRA(kappa=0.007, dense=0.0), made, torch.optim.SGD([made.gamma], lr=0.0), steps)
        for step in range(1, steps + 1):
            if step == 20:
                saved = hook.state_dict()
                hook = Shrink(hook.method, made, torch.optim.SGD([made.gamma], lr=0.0), steps)
                hook.load_state_dict(saved)
            hook.step = step
            hook.after_step()
        ends.append(made.gamma.detach().double())
    assert ends[0][0] == pytest.approx(3.0 - 0.007 * (steps + 1) / 2) and not ends[1][4:].any()
    torch.testing.assert_close(ends[1], ends[0], rtol=2**-8, atol=0)
    assert sum(rest.nbytes for rest in hook.rests.tensors.values()) == made.rest_bytes == 2 * 6
    hook.next_task()
    assert not hook.rests.tensors


def test_a_model_of_two_towers_learns() -> None:
    """CLIP, for which the method was made: it names no input embeddings."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = {"vocab_size": 64, **tower}, {"image_size": 8, "patch_size": 4, **tower}
    model = lorank.convert(CLIPModel(CLIPConfig(text_config=text, vision_config=vision)), lorank.CoDyRA(rank=4)).train()
    optimizer = lorank.optimizer(model, lr=1e-2)
    lorank.step_hook(model, optimizer, steps=2)
    batch = {"input_ids": torch.arange(12).view(2, 6), "pixel_values": torch.randn(2, 3, 8, 8), "return_loss": True}
    losses = []
    for _ in range(2):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]
