"""Fira against its equations in float64, in both readings, and in the limits in which it is GaLore."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank import Fira, GaLore
from lorank.optim.fira import column_factors, limited
from lorank.train.methods import build_optimizer, with_changed_defaults
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe
from tests.optim.conftest import gradients, made, matrices, run


def fira_by_hand(
    W: Tensor, grads: list[Tensor], rank: int, *, lr: float, T: int, alpha: float, repo: bool, matrix: bool
) -> Tensor:
    W, M, V, stored, (b1, b2) = W.clone(), 0.0, 0.0, None, (0.9, 0.999)
    for t, G in enumerate(grads):
        right = G.shape[0] >= G.shape[1]
        if t % T == 0:
            U, _, Vt = torch.linalg.svd(G, full_matrices=False)
            P = Vt[:rank] if right else U[:, :rank]
            for vector in P if right else P.T:  # a singular vector is one up to its sign
                vector *= vector[vector.abs().argmax()].sign()
        R = G @ P.T if right else P.T @ G
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R * R
        correction = (1 - b2 ** (t + 1)) ** 0.5 / (1 - b1 ** (t + 1))
        N = M / (V**0.5 + 1e-8) * (1 if repo else correction)  # the repository corrects the whole update, at the end
        inside = R @ P if right else P @ R
        E = G - (alpha if repo else 1) * inside
        if matrix:
            S = N.norm() / (R.norm() + 1e-8) * E
        elif right:
            S = (N.norm(dim=1) / (R.norm(dim=1) + 1e-8))[:, None] * E
        else:
            S = (N.norm(dim=0) / (R.norm(dim=0) + 1e-8))[None, :] * E
        if stored is not None:
            S = S * 1.01 / max(S.norm().item() / (stored + 1e-8), 1.01)
        stored = S.norm().item()
        update = N @ P if right else P @ N
        W = W - lr * (correction * (alpha * update + S) if repo else alpha * (update + S))
    return W


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("residual", ["paper", "repo"])
@pytest.mark.parametrize("scaling", ["column", "matrix"])
def test_the_equations(shape: tuple[int, int], residual: Any, scaling: Any) -> None:
    [p] = matrices(shape)
    start = p.detach().clone()
    group = {"params": [p], "rank": 4, "update_gap": 3}
    run(made(Fira, [group], lr=0.02, residual=residual, scaling=scaling), [p], range(8))
    expected = fira_by_hand(
        start, [gradients(s, [p])[0] for s in range(8)], 4, lr=0.02, T=3, alpha=0.25,
        repo=residual == "repo", matrix=scaling == "matrix",
    )  # fmt: skip
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)


def test_a_warm_up_from_zero_has_its_first_step_count() -> None:
    [p] = matrices((12, 20))
    start = p.detach().clone()
    optimizer = made(Fira, [{"params": [p], "rank": 4}], lr=0.0)
    first, second = (gradients(step, [p])[0] for step in range(2))
    for lr, gradient in ((0.0, 1e-3 * first), (0.02, second)):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = gradient
        optimizer.step()
    [q] = matrices((12, 20))
    other = made(Fira, [{"params": [q], "rank": 4}], lr=0.02)
    for gradient in (1e-3 * first, second):
        before = q.detach().clone()
        q.grad = gradient
        other.step()
    torch.testing.assert_close(p - start, q - before)


def test_a_first_gradient_of_zero_limits_nothing() -> None:
    [p] = matrices((12, 20))
    optimizer = made(Fira, [{"params": [p], "rank": 4, "update_gap": 1}], lr=0.01)
    for gradient in (torch.zeros_like(p), *(gradients(step, [p])[0] for step in range(3))):
        p.grad = gradient
        optimizer.step()
    assert optimizer.state[p]["norm"] > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["paper", "repo"])
def test_a_gradient_of_the_rank_limits_nothing(dtype: torch.dtype, residual: Any) -> None:
    """Nothing but rounding is left of the first, from which the limiter would grow by a hundredth a step for ever."""
    [p] = matrices((24, 40), dtype=dtype)
    before = p.detach().clone()
    optimizer = made(Fira, [{"params": [p], "rank": 4}], lr=0.01, residual=residual)
    first, second = gradients(0, [p])[0].double(), gradients(1, [p])[0]
    for G in (first[:, :4] @ first[:4], second):
        before, p.grad = p.detach().clone(), G.to(dtype)
        optimizer.step()
    P, moved = optimizer.state[p]["left"].double(), (p.detach() - before).double()
    outside = (moved - P @ (P.mT @ moved)).norm() / moved.norm()
    assert outside > 0.1
    assert optimizer.state[p]["norm"] > 0.1


def test_the_default_is_the_authors_code() -> None:
    assert Fira().residual == "repo"
    assert {m.residual for m in (Fira(**Fira.published[size]) for size in Fira.published)} == {"repo"}  # type: ignore[arg-type]


def test_bf16_holds_columns_of_zeros_and_small_gradients() -> None:
    [p] = matrices((12, 20), dtype=torch.bfloat16)
    optimizer = made(Fira, [{"params": [p], "rank": 4}], lr=0.01)
    for size in (1.0, 1e-6, 0.0, 1.0):
        p.grad = size * gradients(0, [p])[0]
        p.grad[:, 3] = 0
        optimizer.step()
        assert p.isfinite().all()
        assert optimizer.state[p]["norm"].dtype == torch.float32


def test_without_the_residual_it_is_galore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorank.optim.fira.limited", lambda residual, before: torch.zeros_like(residual))
    ours, theirs = matrices((12, 20)), matrices((12, 20))
    run(made(Fira, [{"params": ours, "rank": 4}], lr=0.1), ours, range(4))
    run(made(GaLore, [{"params": theirs, "rank": 4}], lr=0.1), theirs, range(4))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)


def test_state_is_galores_and_one_number_per_matrix() -> None:
    sizes = []
    for kind in (GaLore, Fira):
        parameters = matrices((12, 20), (20, 12))
        optimizer = made(kind, [{"params": parameters, "rank": 4}], lr=0.1)
        run(optimizer, parameters, range(2))
        flat = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        sizes.append(sum(t.numel() for t in flat))
    assert sizes[1] == sizes[0] + 2


def test_at_full_rank_nothing_is_left_and_fira_is_galore() -> None:
    ours, theirs = matrices((12, 20)), matrices((12, 20))
    run(made(Fira, [{"params": ours, "rank": 12}], lr=0.1, residual="paper"), ours, range(4))
    run(made(GaLore, [{"params": theirs, "rank": 12}], lr=0.1), theirs, range(4))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_a_residual_grows_by_a_hundredth_at_most() -> None:
    shape = torch.ones(1, 2, 2) / 2  # norm 1
    stored, norms = torch.tensor([-1.0]), []
    for norm in (1.0, 10.0, 10.0, 0.5, 0.4):
        S = limited(norm * shape, stored)
        stored = S.norm(dim=(-2, -1))
        norms.append(stored.item())
    assert norms == pytest.approx([1, 1.01, 1.0201, 0.5, 0.4], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_small_residual_is_limited_by_its_true_norm(dtype: torch.dtype) -> None:
    """Of what a step moves, from weights of zero, only S lies outside of the subspace."""
    torch.manual_seed(0)
    [p] = matrices((24, 40), dtype=dtype)
    optimizer = made(Fira, [{"params": [p], "rank": 4}], lr=1.0, residual="paper")
    low_rank, norms = torch.randn(24, 4) @ torch.randn(4, 40), []
    for noise in (1e-3, 1e-3, 1.0, 1.0, 1e-4):
        nn.init.zeros_(p)
        p.grad = (low_rank + noise * torch.randn(24, 40)).to(dtype)
        optimizer.step()
        P, moved = optimizer.state[p]["left"].double(), p.detach().double() / 0.25
        norms.append((moved - P @ (P.mT @ moved)).norm().item())
        assert optimizer.state[p]["norm"].item() == pytest.approx(norms[-1], rel=1e-3)
    for before, after in itertools.pairwise(norms):
        assert after <= 1.01 * before * (1 + 1e-3)
    assert norms[4] < norms[3] / 2, "and it shrinks freely"


def test_one_factor_per_column_or_per_row() -> None:
    R = torch.randn(2, 4, 20)
    assert column_factors(R, R, columns=True).shape == (2, 1, 20)
    assert column_factors(R.mT, R.mT, columns=False).shape == (2, 20, 1)
    zero = torch.zeros(1, 4, 3, dtype=torch.bfloat16)
    assert torch.equal(column_factors(zero, zero, columns=True), torch.zeros(1, 1, 3))


def test_the_limiter_outlives_a_refresh_and_a_restart() -> None:
    whole, broken = matrices((12, 20)), matrices((12, 20))
    make = lambda p: made(Fira, [{"params": p, "rank": 4, "update_gap": 2}], lr=0.1)  # noqa: E731
    run(make(whole), whole, range(6))
    first = make(broken)
    run(first, broken, range(3))
    second = make(broken)
    second.load_state_dict(first.state_dict())
    run(second, broken, range(3, 6))
    assert torch.equal(whole[0], broken[0])


def test_a_transposed_gradient_takes_a_transposed_step() -> None:
    [wide] = matrices((12, 20))
    tall = torch.nn.Parameter(wide.detach().T.clone())
    a, b = (made(Fira, [{"params": [p], "rank": 4, "update_gap": 9}], lr=0.1) for p in (wide, tall))
    for step in range(5):
        wide.grad = gradients(step, [wide])[0]
        tall.grad = wide.grad.T.clone()
        a.step()
        b.step()
    torch.testing.assert_close(wide, tall.T, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual": "both"}, "residual must be 'paper' or 'repo', got 'both'"),
        ({"scaling": "row"}, "scaling must be 'column' or 'matrix', got 'row'"),
        ({"projection": "full"}, "projection must be .*, got 'full'"),
        ({"rule": "muon"}, "rule must be 'adamw', got 'muon'"),
        ({"in_backward": True}, "in_backward must be False with fira"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(Fira, [{"params": matrices((12, 20)), "rank": 4}], lr=0.1, **changes)


def test_a_full_projection_is_refused_when_added_later_too() -> None:
    p, later = matrices((12, 20)), matrices((12, 20))
    optimizer = made(Fira, [{"params": p, "rank": 4}], lr=0.1)
    with pytest.raises(ValueError, match="projection must be .*, got 'full'"):
        optimizer.add_param_group({"params": later, "rank": 4, "projection": "full"})
    run(optimizer, p, range(2))


def test_a_state_of_version_0_1_goes_on_with_the_papers_form() -> None:
    """Its groups name neither a rule nor a form; those of today name both."""
    saved = {}
    for form in ("paper", "repo"):
        p = matrices((12, 20))
        optimizer = made(Fira, [{"params": p, "rank": 4}], lr=0.1, residual=form)
        run(optimizer, p, range(2))
        saved[form] = optimizer.state_dict()
    old = saved["paper"]
    for name in ("rule", "residual"):
        del old["param_groups"][0][name]
    for state, form in ((old, "paper"), (saved["repo"], "repo")):
        p = matrices((12, 20))
        optimizer = made(Fira, [{"params": p, "rank": 4}], lr=0.1)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["residual"] == form


@pytest.mark.parametrize("form", ["paper", "repo"])
def test_a_run_of_version_0_1_keeps_the_form_of_its_recipe(form: str) -> None:
    """Also the one that is the default today."""
    recipe = Recipe(size="tiny", vocab_size=128, method="fira", rank=8, options={"residual": form})
    model = build_model(recipe, build_config(recipe))
    old: Any = build_optimizer(recipe, model).state_dict()
    for group in old["param_groups"]:
        for name in {"rule", "residual", "expert_matrices"} & group.keys():
            del group[name]
    optimizer = build_optimizer(with_changed_defaults(recipe, began=True), model)
    optimizer.load_state_dict(old)
    assert {group["residual"] for group in optimizer.param_groups if group["rank"]} == {form}
