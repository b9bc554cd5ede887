"""Break-for-Make: halves that never move, and two adapters joined."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank.adapters.break_for_make import BreakForMakeLinear, join, preconditioned
from lorank.testing.structure import TOKENS


def layer(d_in: int = 11, d_out: int = 9, rank: int = 3) -> BreakForMakeLinear:
    torch.manual_seed(0)
    return BreakForMakeLinear(nn.Linear(d_in, d_out).double(), rank, scale=2.0)


def filled(module: BreakForMakeLinear) -> BreakForMakeLinear:
    nn.init.normal_(module.A.weight)
    nn.init.normal_(module.B.weight)
    return module


def test_it_begins_as_the_dense_layer_and_both_halves_learn() -> None:
    module, x = layer(), torch.randn(5, 11, dtype=torch.float64)
    assert torch.equal(module(x), module.W(x))
    module(x).sin().sum().backward()
    assert module.A.weight.grad.abs().min() > 0 and module.B.weight.grad.abs().min() > 0


def test_its_equation_and_its_forms() -> None:
    module, x = filled(layer()), torch.randn(5, 11, dtype=torch.float64)
    A, B = module.whole()
    Q = torch.cat([module.Q_A.T, module.Q_B])
    torch.testing.assert_close(Q.T @ Q, torch.eye(3, dtype=torch.float64))
    constant = torch.zeros(9, 11, dtype=torch.float64)
    constant[:4, :5] = module.Q_B @ module.Q_A
    update = 2.0 * (B @ A - constant)
    torch.testing.assert_close(module(x), module.W(x) + x @ update.T)
    torch.testing.assert_close(module.product(), update)
    left, right = lorank.BreakForMake().pair(module)
    assert right.shape == (6, 11)
    torch.testing.assert_close(left @ right, update)
    even = layer(12, 8, 4)
    assert (
        sum(p.numel() for p in even.trained())
        == 4 * (12 + 8) // 2
        == sum(p.numel() for p in even.parameters() if not p.requires_grad) - 8 * 13
    )


def test_frozen_halves_do_not_decay() -> None:
    module = filled(layer())
    for p in module.parameters():
        p.requires_grad_(p is module.A.weight or p is module.B.weight)
    before = [module.Q_A.clone(), module.Q_B.clone(), module.A.weight.clone()]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        module(torch.randn(4, 11, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.Q_A, before[0]) and torch.equal(module.Q_B, before[1])
    assert not torch.isclose(module.A.weight, before[2]).any()


def test_a_preconditioned_step_knows_only_the_product() -> None:
    torch.manual_seed(0)
    A, B, M, G = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 8), (7, 3), (3, 3), (7, 8)))

    def stepped(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        dA, dB = preconditioned(A, B, B.T @ G, G @ A.T, 0.0)  # G is the gradient of the product
        return (B - 0.1 * dB) @ (A - 0.1 * dA)

    torch.testing.assert_close(stepped(A, B), stepped(torch.linalg.solve(M, A), B @ M), rtol=1e-9, atol=1e-9)
    assert not torch.allclose((B - 0.1 * G @ A.T) @ (A - 0.1 * B.T @ G), stepped(A, B))


def test_two_adapters_are_joined_and_preconditioned(small: Any) -> None:
    style = lorank.convert(small("llama"), lorank.BreakForMake(rank=4, delta=0.5))
    content = copy.deepcopy(style)
    for seed, model in enumerate((style, content)):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, BreakForMakeLinear):
                filled(module)
    name = "model.layers.1.mlp.up_proj"
    one, other = style.get_submodule(name), content.get_submodule(name)
    B = one.B.weight.clone()
    join(style, content)
    assert torch.equal(one.A.weight, other.A.weight) and torch.equal(one.B.weight, B)
    assert style.config.lorank["arguments"]["precondition"] is True
    optimizer = torch.optim.SGD([p for p in style.parameters() if p.requires_grad], lr=1.0)
    lorank.step_hook(style, optimizer, steps=2)
    style(TOKENS, labels=TOKENS).loss.backward()
    (_, whole_B), before = one.whole(), one.A.weight.clone()
    expected = torch.linalg.inv(whole_B.T @ whole_B + 0.5 * torch.eye(4)) @ one.A.weight.grad
    optimizer.step()
    torch.testing.assert_close(one.A.weight, before - expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="both models must have the adapter break-for-make"):
        join(style, small("llama"))
    with torch.no_grad():
        other.Q_B[0, 0] += 1
        content.model.layers[0].mlp.up_proj.A.weight.zero_()
    with pytest.raises(ValueError, match=f"must have the same frozen halves, but those of {name} differ"):
        join(style, content)
    assert style.model.layers[0].mlp.up_proj.A.weight.any(), "nothing was joined"
