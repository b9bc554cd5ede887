"""PERK: gradients through the last steps of an inner loop."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lorank
from lorank.adapters.perk import called, parameters_of, written
from lorank.testing.structure import TOKENS

N = 4


def quadratic() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """H and b of L(φ) = ½ φᵀ H φ - bᵀ φ, a start, and a rate for each entry and step."""
    torch.manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64)
    rates = [torch.rand(5, dtype=torch.float64, requires_grad=True) for _ in range(N)]
    return root @ root.T, torch.randn(5).double(), torch.randn(5, dtype=torch.float64, requires_grad=True), rates


@pytest.mark.parametrize("kept", [0, 2, 4])
def test_the_gradient_is_the_product_of_the_last_jacobians(kept: int) -> None:
    H, b, theta, rates = quadratic()
    loss = lambda phi: 0.5 * phi["x"] @ H @ phi["x"] - b @ phi["x"]  # noqa: E731
    phi = written(loss, {"x": theta}, [{"x": rate} for rate in rates], kept=kept)["x"]
    expected = theta.detach()
    for rate in rates:
        expected = expected - rate.detach() * (H @ expected - b)
    torch.testing.assert_close(phi, expected, rtol=1e-12, atol=1e-12)
    phi.sin().sum().backward()
    gradient = expected.cos()
    for rate in reversed(rates[N - kept :]):  # (I - diag(α) H)ᵀ
        gradient = gradient - H @ (rate.detach() * gradient)
    torch.testing.assert_close(theta.grad, gradient, rtol=1e-12, atol=1e-12)
    assert [rate.grad is not None for rate in rates] == [n >= N - kept for n in range(N)]


def test_through_all_steps_it_is_plain_differentiation() -> None:
    H, b, theta, _ = quadratic()
    loss = lambda phi: (phi["x"].tanh() @ H @ phi["x"].tanh()) - b @ phi["x"]  # noqa: E731
    written(loss, {"x": theta}, [0.01] * N)["x"].square().sum().backward()
    other = theta.detach().requires_grad_()
    phi = other
    for _ in range(N):
        phi = phi - 0.01 * torch.func.grad(lambda x: loss({"x": x}))(phi)
    phi.square().sum().backward()
    torch.testing.assert_close(theta.grad, other.grad, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="kept must be from 0 to the 4 steps, got 5"):
        written(loss, {"x": theta}, [0.01] * N, kept=5)


def test_a_text_is_written_in_any_order_and_the_base_stays(small: Any) -> None:
    model = lorank.convert(small("llama", attn_implementation="eager"), lorank.LoRA(rank=4)).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    theta, segments = parameters_of(model), TOKENS.view(4, 6)
    answers = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        ids = segments[order]
        loss = lambda phi, ids=ids: called(model, phi, input_ids=ids, labels=ids).loss  # noqa: E731
        phi = written(loss, theta, [0.1] * 3, kept=1)
        assert loss(phi) < loss(theta)
        answers.append(phi)
    for name, value in answers[0].items():
        torch.testing.assert_close(value, answers[1][name], rtol=1e-9, atol=1e-12)
    called(model, answers[0], input_ids=segments, labels=segments).loss.backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all((p.grad is not None) == (name in theta) for name, p in model.named_parameters())


def test_what_is_kept_does_not_grow_with_the_steps() -> None:
    """The graph from φ_N back to θ."""
    H, b, theta, _ = quadratic()
    loss = lambda phi: phi["x"].tanh() @ H @ phi["x"].tanh() - b @ phi["x"]  # noqa: E731
    counts = []
    for steps, kept in ((3, 2), (9, 2), (9, 9)):
        nodes: set[Any] = set()
        todo = [written(loss, {"x": theta}, [0.01] * steps, kept=kept)["x"].grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                todo += [parent for parent, _ in node.next_functions]
        counts.append(len(nodes))
    assert counts[0] == counts[1] < counts[2] / 3
