"""DCT-AdamW against its equations, one matrix at a time in float64, and where it becomes Adam."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank import DCTAdamW, GaLore, Trion
from lorank.optim.dct import dct_matrix
from tests.optim.conftest import gradients, made, matrices, run

CPU = torch.device("cpu")


def by_hand(
    W: Tensor, grads: list[Tensor], rank: int, *, lr: float, wd: float, gap: int, ef: bool, rotate: bool
) -> Tensor:
    """The specification's lines with explicit matrices, for m >= n."""
    W, (b1, b2), eps, Q = W.clone(), (0.9, 0.999), 1e-8, dct_matrix(W.shape[1], CPU, torch.float64)
    E, M, V, P = torch.zeros_like(W), None, None, None
    for t, G in enumerate(grads, start=1):
        W = W * (1 - lr * wd)
        A = G + E
        refreshed = t == 1 or t % gap == 0
        if refreshed:
            before = P
            chosen = (A @ Q.T).abs().sum(0).argsort(descending=True)[:rank].sort().values
            P = Q[chosen].T  # [n, r]
        a = A @ P
        if ef:
            E = A - a @ P.T
        if t == 1:
            M, V = torch.zeros_like(a), torch.zeros_like(a)
        elif refreshed and rotate:
            R = before.T @ P
            M, V = M @ R, (V @ R).abs()
        M, V = b1 * M + (1 - b1) * a, b2 * V + (1 - b2) * a * a
        u = M / (V.sqrt() + eps * (1 - b2**t) ** 0.5)
        W = W - lr * (1 - b2**t) ** 0.5 / (1 - b1**t) * u @ P.T
    return W


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("ef", [False, True])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("how", ["matmul", "fft"])
def test_the_equations(gap: int, ef: bool, rotate: bool, how: Any) -> None:
    [p] = matrices((20, 12))
    start = p.detach().clone()
    options: dict[str, Any] = {"error_feedback": "full" if ef else "none", "rotate": rotate, "transform": how}
    optimizer = made(DCTAdamW, [{"params": [p], "rank": 4}], lr=0.05, weight_decay=0.1, update_gap=gap, **options)
    run(optimizer, [p], range(8))
    grads = [gradients(step, [p])[0] for step in range(8)]
    expected = by_hand(start, grads, 4, lr=0.05, wd=0.1, gap=gap, ef=ef, rotate=rotate)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-9)


def test_at_full_rank_it_is_adam_in_the_rotated_basis() -> None:
    [p] = matrices((20, 12))
    Q = dct_matrix(12, CPU, torch.float64)
    rotated = nn.Parameter(p.detach() @ Q.T)
    ours = made(DCTAdamW, [{"params": [p], "rank": 12}], lr=0.1, error_feedback="full")
    adam = torch.optim.AdamW([rotated], lr=0.1, weight_decay=0.0)
    for step in range(6):
        p.grad = gradients(step, [p])[0]
        rotated.grad = p.grad @ Q.T
        ours.step()
        adam.step()
    torch.testing.assert_close(p.detach(), rotated.detach() @ Q, rtol=1e-9, atol=1e-9)
    assert ours.state[p]["error"].abs().max() < 1e-12


def test_error_feedback_telescopes() -> None:
    """What was applied in low rank and what is still left out sum up to all gradients."""
    for kind in ("full", "8bit"):
        [p] = matrices((20, 12))
        optimizer = made(DCTAdamW, [{"params": [p], "rank": 4}], lr=0.1, error_feedback=kind)  # type: ignore[arg-type]
        applied, total, left = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
        for step in range(6):
            p.grad = gradients(step, [p])[0]
            total += p.grad
            A = p.grad + left
            optimizer.step()
            state = optimizer.state[p]
            basis = dct_matrix(12, CPU, torch.float64)[state["indices"].long()]
            applied += A @ basis.T @ basis
            if kind == "full":
                left = state["error"].clone()
            else:
                left = (state["error_low"] + state["error_step"] * state["error_codes"]).double()
        if kind == "full":
            torch.testing.assert_close(applied + left, total, rtol=1e-9, atol=1e-9)
        else:  # each of six roundings is off by half a step at most
            assert (applied + left - total).abs().max() < 6 * 0.5 * 12 / 255


@pytest.mark.parametrize("make", [
    lambda p: made(DCTAdamW, [{"params": p, "rank": 4}], lr=0.1, error_feedback="8bit"),
    lambda p: made(Trion, [{"params": p, "rank": 4}], lr=0.1, scale="none"),
], ids=["dct-adamw", "trion"])  # fmt: skip
def test_a_transposed_gradient_takes_a_transposed_step(make: Any) -> None:
    [wide] = matrices((12, 20))
    tall = nn.Parameter(wide.detach().T.clone())
    a, b = make([wide]), make([tall])
    for step in range(5):
        wide.grad = gradients(step, [wide])[0]
        tall.grad = wide.grad.T.clone()
        a.step()
        b.step()
    assert torch.equal(wide, tall.T)


def test_state_bytes() -> None:
    """2 m r moments and r indices; the paper's code keeps the previous r indices too: 5,594,112 bytes with them."""
    p = nn.Parameter(torch.zeros(5461, 2048, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = made(DCTAdamW, [{"params": [p], "rank": 256}], lr=0.1)
    optimizer.step()
    state = [t for name, t in optimizer.state[p].items() if name != "steps"]
    assert sum(t.numel() * t.element_size() for t in state) == 5_594_112 - 256 * 4


@pytest.mark.parametrize("make", [
    lambda p: made(DCTAdamW, [{"params": p[:2], "rank": 4}, {"params": p[2:]}], lr=0.1, update_gap=2, error_feedback="8bit"),
    lambda p: made(Trion, [{"params": p[:2], "rank": 4}, {"params": p[2:]}], lr=0.1),
], ids=["dct-adamw", "trion"])  # fmt: skip
def test_resumed_at_any_step_it_goes_on_bit_by_bit(make: Any, tmp_path: Any) -> None:
    for stop in range(6):
        whole, broken = matrices((12, 20), (20, 12), (16, 16)), matrices((12, 20), (20, 12), (16, 16))
        run(make(whole), whole, range(6))
        first = make(broken)
        run(first, broken, range(stop))
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = make(broken)
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        run(second, broken, range(stop, 6))
        assert all(map(torch.equal, whole, broken)), stop


def test_groups_without_rank_are_adamw() -> None:
    ours, theirs = matrices((12, 20)), matrices((12, 20))
    run(made(DCTAdamW, ours, lr=0.1, weight_decay=0.1), ours, range(5))
    run(torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1), theirs, range(5))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)


def test_gradients_whose_squares_are_infinite_are_refused() -> None:
    [p] = [q.detach().float().requires_grad_() for q in matrices((12, 20))]
    before, optimizer = p.detach().clone(), made(DCTAdamW, [{"params": [p], "rank": 3}], lr=0.1)
    p.grad = 5e20 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(FloatingPointError, match="is not finite"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"error_feedback": "4bit"}, "error_feedback must be 'none', 'full' or '8bit', got '4bit'"),
        ({"transform": "dst"}, "transform must be 'matmul' or 'fft', got 'dst'"),
        ({"update_gap": 0}, "update_gap must be a positive integer, got 0"),
        ({"update_gap": 2.5}, "update_gap must be a positive integer, got 2.5"),
        ({"ell_norm": -1}, "ell_norm must be a positive number, got -1"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DCTAdamW(**options)


@pytest.mark.parametrize("make", [
    lambda p: made(DCTAdamW, [{"params": p, "rank": 4}], lr=0.1, update_gap=500),
    lambda p: made(GaLore, [{"params": p, "rank": 4, "update_gap": 500}], lr=0.1),
], ids=["dct-adamw", "galore"])  # fmt: skip
def test_counters_and_indices_are_exact_after_loading_into_bf16(make: Any) -> None:
    """bf16 has no 257: torch's own loading would cast the counter."""
    broken = [nn.Parameter(torch.zeros(8, 300, dtype=torch.bfloat16))]
    first = make(broken)
    broken[0].grad = torch.ones_like(broken[0])
    for _ in range(257):
        first.step()
    second = make(broken)
    second.load_state_dict(first.state_dict())
    assert int(second.state[broken[0]]["steps"]) == 257
    for name, value in first.state[broken[0]].items():
        if torch.is_tensor(value):
            assert second.state[broken[0]][name].dtype == value.dtype
            assert torch.equal(second.state[broken[0]][name], value)


def test_a_compiled_step_is_the_same_step() -> None:
    weights = []
    for compiled in (False, True):
        parameters = matrices((12, 20))
        optimizer = made(DCTAdamW, [{"params": parameters, "rank": 4}], lr=0.1, transform="fft")
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for seed in range(3):
            for p, gradient in zip(parameters, gradients(seed, parameters), strict=True):
                p.grad = gradient
            step()
        weights.append(parameters[0].detach())
    torch.testing.assert_close(*weights)
