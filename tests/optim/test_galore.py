"""GaLore against its equations, written out in float64 one matrix at a time, and against torch's optimizers in its limits."""

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorank import DCTAdamW, Fira, GaLore, Trion
from lorank.optim import low_rank_groups
from lorank.optim.bases import randomised_basis, sides, singular_basis, svd_basis
from lorank.optim.step import LowRankOptimizer
from tests.optim.conftest import gradients, made, matrices, run

SHAPES = [(12, 20), (20, 12), (16, 16)]


def galore_by_hand(
    W: Tensor, grads: list[Tensor], rank: int, *, lr: float, T: int, alpha: float, eps: float, wd: float
) -> Tensor:
    """The specification's lines for one matrix, with the projector of the longer side."""
    W, M, V, (b1, b2) = W.clone(), 0.0, 0.0, (0.9, 0.999)
    for t, G in enumerate(grads):
        right = G.shape[0] >= G.shape[1]
        if t % T == 0:
            U, _, Vt = torch.linalg.svd(G, full_matrices=False)
            P = Vt[:rank] if right else U[:, :rank]
            for vector in P if right else P.T:  # a singular vector is one up to its sign
                vector *= vector[vector.abs().argmax()].sign()
        R = G @ P.T if right else P.T @ G
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R * R
        N = M / (V**0.5 + eps)
        update = alpha * (N @ P if right else P @ N)
        W = W - lr * (1 - b2 ** (t + 1)) ** 0.5 / (1 - b1 ** (t + 1)) * update
        W = W - lr * wd * W
    return W


@pytest.mark.parametrize("shape", SHAPES)
def test_the_equations(shape: tuple[int, int]) -> None:
    [p] = matrices(shape)
    start = p.detach().clone()
    settings = {"lr": 0.02, "eps": 1e-3}
    run(made(GaLore, [{"params": [p], "rank": 4, "update_gap": 3}], **settings, weight_decay=0.1), [p], range(8))
    grads = [gradients(step, [p])[0] for step in range(8)]
    expected = galore_by_hand(start, grads, 4, T=3, alpha=0.25, wd=0.1, **settings)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)


def test_matrices_in_one_product_are_those_one_by_one() -> None:
    shapes = [(12, 20), (20, 12), (12, 20), (12, 20)]
    together, alone = matrices(*shapes), matrices(*shapes)
    run(made(GaLore, [{"params": together, "rank": 4, "update_gap": 2}], lr=0.1), together, range(5))
    for i, p in enumerate(alone):
        optimizer = made(GaLore, [{"params": [p], "rank": 4, "update_gap": 2}], lr=0.1)
        for step in range(5):
            p.grad = gradients(step, alone)[i]
            optimizer.step()
        torch.testing.assert_close(p, together[i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("projection", "m", "n", "expected"),
    [
        ("std", 20, 12, (False, True)),
        ("std", 12, 20, (True, False)),
        ("std", 16, 16, (False, True)),
        ("reverse_std", 20, 12, (True, False)),
        ("reverse_std", 12, 20, (False, True)),
        ("reverse_std", 16, 16, (True, False)),
        ("left", 20, 12, (True, False)),
        ("right", 12, 20, (False, True)),
        ("full", 12, 20, (True, True)),
    ],
)
def test_sides_and_shapes_of_each_projection(projection: Any, m: int, n: int, expected: tuple[bool, bool]) -> None:
    assert sides(projection, m, n) == expected
    [p] = matrices((m, n))
    optimizer = made(GaLore, [{"params": [p], "rank": 4, "projection": projection}], lr=0.1)
    run(optimizer, [p], range(1))
    state = optimizer.state[p]
    moment = (4 if expected[0] else m, 4 if expected[1] else n)
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == moment
    assert {k: tuple(state[k].shape) for k in ("left", "right") if k in state} == (
        ({"left": (m, 4)} if expected[0] else {}) | ({"right": (4, n)} if expected[1] else {})
    )
    for side, basis in (("left", state.get("left")), ("right", state.get("right"))):
        if basis is not None:
            gram = basis.T @ basis if side == "left" else basis @ basis.T
            torch.testing.assert_close(gram, torch.eye(4, dtype=gram.dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("projection", ["std", "reverse_std", "left", "right", "full"])
def test_the_equations_of_each_projector_type(projection: Any, shape: tuple[int, int]) -> None:
    [p] = matrices(shape)
    W, M, V = p.detach().clone(), 0.0, 0.0
    optimizer = made(GaLore, [{"params": [p], "rank": 4, "update_gap": 3}], lr=0.1, projection=projection)
    run(optimizer, [p], range(5))
    tall = shape[0] >= shape[1]
    on_right = {"std": tall, "reverse_std": not tall, "left": False, "right": True, "full": True}[projection]
    on_left = projection == "full" or not on_right
    for t in range(5):
        [G] = gradients(t, [p])
        if t % 3 == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            left, right = U[:, :4], Vh[:4]
            left = left * left.gather(0, left.abs().argmax(0)[None]).sign()
            right = right * right.gather(1, right.abs().argmax(1)[:, None]).sign()
        R = left.T @ G if on_left else G
        R = R @ right.T if on_right else R
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R * R
        N = M / (V**0.5 + 1e-8) * (1 - 0.999 ** (t + 1)) ** 0.5 / (1 - 0.9 ** (t + 1))
        N = left @ N if on_left else N
        W = W - 0.1 * 0.25 * (N @ right if on_right else N)
    torch.testing.assert_close(p.detach(), W, rtol=1e-7, atol=1e-7)


def test_a_step_that_failed_half_way_may_be_taken_again() -> None:
    failures = [False, True, *[False] * 9]  # the second matrix's first basis

    def fragile(G: Tensor, rank: int) -> Tensor:
        if failures.pop(0):
            raise RuntimeError("no basis")
        return singular_basis(G, rank)

    ours, theirs = matrices((12, 20), (20, 12)), matrices((12, 20), (20, 12))
    optimizer = made(GaLore, [{"params": ours, "rank": 4}], lr=0.1, basis=fragile)
    for p, gradient in zip(ours, gradients(0, ours), strict=True):
        p.grad = gradient
    with pytest.raises(RuntimeError, match="no basis"):
        optimizer.step()
    run(optimizer, ours, range(3))
    run(made(GaLore, [{"params": theirs, "rank": 4}], lr=0.1), theirs, range(3))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_new_subspace_holds_the_largest_singular_values() -> None:
    [p] = matrices((20, 12))
    optimizer = made(GaLore, [{"params": [p], "rank": 4}], lr=0.1)
    run(optimizer, [p], range(1))
    G = gradients(0, [p])[0]
    R = G @ optimizer.state[p]["right"].T
    assert R.norm() ** 2 == pytest.approx(torch.linalg.svdvals(G)[:4].square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_the_first_step(eps: float) -> None:
    [p] = matrices((20, 12))
    before = p.detach().clone()
    optimizer = made(GaLore, [{"params": [p], "rank": 4, "scale": 0.5}], lr=0.1, eps=eps)
    run(optimizer, [p], range(1))
    Q = optimizer.state[p]["right"]
    R = gradients(0, [p])[0] @ Q.T
    expected = 0.1 * 0.5 * (R / (R.abs() + eps / (1 - 0.999) ** 0.5)) @ Q
    torch.testing.assert_close(before - p.detach(), expected, rtol=1e-8, atol=1e-10)


def test_bases_change_at_0_T_2T_and_moments_stay() -> None:
    [p] = matrices((20, 12))
    optimizer = made(GaLore, [{"params": [p], "rank": 4, "update_gap": 3}], lr=0.1)
    bases = []
    for step in range(7):
        run(optimizer, [p], range(step, step + 1))
        bases.append(optimizer.state[p]["right"].clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert changed == [False, False, True, False, False, True]
    M = optimizer.state[p]["exp_avg"].clone()
    p.grad = torch.zeros_like(p)
    p.grad[0, 0] = 1e-30  # nothing to see, and no refresh: the moments decay by beta and nothing else
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.9 * M)


def test_scale_is_linear_and_weight_decay_does_not_know_it() -> None:
    moved = {}
    for scale in (0.25, 0.5):
        for decay in (0.0, 0.1):
            [p] = matrices((20, 12))
            before = p.detach().clone()
            run(made(GaLore, [{"params": [p], "rank": 4, "scale": scale}], lr=0.1, weight_decay=decay), [p], range(1))
            moved[scale, decay] = p.detach() - before
    torch.testing.assert_close(moved[0.5, 0.0], 2 * moved[0.25, 0.0])
    for scale in (0.25, 0.5):
        after = matrices((20, 12))[0].detach() + moved[scale, 0.0]
        torch.testing.assert_close(moved[scale, 0.1], moved[scale, 0.0] - 0.1 * 0.1 * after)


def test_at_full_rank_with_the_identity_as_basis_it_is_adam() -> None:
    ours, theirs = matrices((12, 20)), matrices((12, 20))

    def identity(G: Tensor, rank: int) -> Tensor:
        return torch.eye(G.shape[1]).expand(len(G), -1, -1)[..., :rank]

    group = {"params": ours, "rank": 12, "scale": 1.0, "update_gap": 2}
    run(made(GaLore, [group], lr=0.1, eps=0.0, basis=identity), ours, range(6))
    run(torch.optim.AdamW(theirs, lr=0.1, eps=0.0, weight_decay=0.0), theirs, range(6))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)


def test_a_transposed_gradient_takes_a_transposed_step() -> None:
    [wide] = matrices((12, 20))
    tall = nn.Parameter(wide.detach().T.clone())
    a, b = (made(GaLore, [{"params": [p], "rank": 4, "update_gap": 2}], lr=0.1) for p in (wide, tall))
    for step in range(5):
        wide.grad = gradients(step, [wide])[0]
        tall.grad = wide.grad.T.clone()
        a.step()
        b.step()
    torch.testing.assert_close(wide, tall.T, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "muon"])
def test_every_rule_moves_within_the_subspace(rule: Any) -> None:
    [p] = matrices((20, 12))
    before = p.detach().clone()
    run(made(GaLore, [{"params": [p], "rank": 3}], lr=0.01, rule=rule), [p], range(4))
    assert torch.linalg.matrix_rank(p.detach() - before, rtol=1e-4) == 3


@pytest.mark.parametrize("rule", ["adafactor", "muon"])
def test_at_full_rank_a_rule_is_torchs_own(rule: Any, as_torchs_muon: None) -> None:
    """With the identity as basis; Adafactor's step grows with the size of the weights also from inside."""
    ours, theirs = matrices((12, 20), (12, 20)), matrices((12, 20), (12, 20))
    eye = lambda G, rank: torch.eye(G.shape[1], dtype=G.dtype).expand(len(G), -1, -1)  # noqa: E731
    run(made(GaLore, [{"params": ours, "rank": 12, "scale": 1.0}], lr=0.01, basis=eye, rule=rule), ours, range(4))
    torchs: dict[str, Any] = {
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.0),
        "muon": lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    }
    run(torchs[rule](theirs), theirs, range(4))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9)


def test_parameters_without_rank_are_adamw() -> None:
    ours, theirs = matrices((12, 20)), matrices((12, 20))
    run(made(GaLore, ours, lr=0.1, eps=0.0), ours, range(5))
    run(torch.optim.AdamW(theirs, lr=0.1, eps=0.0, weight_decay=0.0), theirs, range(5))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)


def test_a_state_from_a_safe_file_goes_on_bit_by_bit() -> None:
    for stop in range(7):
        whole, broken = matrices(*SHAPES), matrices(*SHAPES)

        def make(p: list[nn.Parameter]) -> LowRankOptimizer:
            return made(GaLore, [{"params": p[:2], "rank": 4, "update_gap": 3}, {"params": p[2:]}], lr=0.1)

        run(make(whole), whole, range(7))
        first = make(broken)
        run(first, broken, range(stop))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = make(broken)
        second.load_state_dict(torch.load(file, weights_only=True))
        run(second, broken, range(stop, 7))
        assert all(map(torch.equal, whole, broken)), stop


def test_a_schedule_on_the_optimizer_reaches_the_subspace() -> None:
    [p] = matrices((20, 12))
    optimizer = made(GaLore, [{"params": [p], "rank": 4}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    before = p.detach().clone()
    run(optimizer, [p], range(1))
    assert torch.equal(p, before)
    schedule.step()
    run(optimizer, [p], range(1, 2))
    assert not torch.equal(p, before)


def test_state_of_the_60m_model_is_what_the_paper_counts() -> None:
    d, d_ff, layers, r = 512, 1376, 8, 128
    shapes = ([(d, d)] * 4 + [(d_ff, d)] * 2 + [(d, d_ff)]) * layers
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes]
    basis = lambda G, rank: torch.zeros(len(G), G.shape[1], rank)  # noqa: E731
    optimizer = made(GaLore, [{"params": parameters, "rank": r}], lr=0.01, basis=basis)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = list(optimizer.state.values())
    assert sum(s[k].numel() for s in states for k in ("exp_avg", "exp_avg_sq")) == 12_648_448
    assert sum(s[k].numel() for s in states for k in ("left", "right") if k in s) == 3_670_016
    assert {name for s in states for name in s} == {"exp_avg", "exp_avg_sq", "left", "right", "step", "steps"}


@pytest.mark.parametrize("kind", [GaLore, Fira, DCTAdamW, Trion])
def test_bytes_of_the_60m_models_state_are_the_formulas(kind: Any) -> None:
    """Of the model itself, embeddings, head and norms included: everything that is a tensor, under whatever name."""
    d, d_ff, layers, vocabulary, r = 512, 1376, 8, 32_000, 128
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=d, intermediate_size=d_ff, num_hidden_layers=layers, num_attention_heads=8)
        )
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data, p.grad = torch.zeros_like(p), torch.zeros_like(p)
    zeros = {"basis": lambda G, rank: torch.zeros(len(G), G.shape[1], rank)} if issubclass(kind, GaLore) else {}
    optimizer = made(kind, low_rank_groups(model, r), lr=0.01, **zeros)
    optimizer.step()

    def count(state: Any) -> int:
        if isinstance(state, dict):
            return sum(map(count, state.values()))
        return (
            state.numel() * state.element_size() if isinstance(state, Tensor) and state.ndim else 0
        )  # counters left out

    matrices = ([(d, d)] * 4 + [(d_ff, d)] * 2 + [(d, d_ff)]) * layers
    numbers = {
        GaLore: lambda m, n: 2 * r * max(m, n) + r * min(m, n),
        Fira: lambda m, n: 2 * r * max(m, n) + r * min(m, n),  # and a norm, which has no dimension
        DCTAdamW: lambda m, n: 2 * r * max(m, n) + r,
        Trion: lambda m, n: m * n,
    }[kind]
    others = 2 * vocabulary * d + (2 * layers + 1) * d
    assert count(dict(optimizer.state)) == 4 * (sum(numbers(m, n) for m, n in matrices) + 2 * others)


def test_the_randomised_basis_keeps_nearly_as_much() -> None:
    """Of gradients whose singular values fall like 1/i: within 1 % of the exact basis's energy."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(3, n, n)).Q for n in (64, 96))
    G = U @ torch.diag(1 / torch.arange(1, 65.0)) @ V[:, :64]
    exact, quick = ((basis(G, 8).mT @ G).norm() for basis in (singular_basis, randomised_basis))
    assert 0.99 * exact < quick <= exact * (1 + 1e-5)


def test_a_randomised_basis_does_not_depend_on_the_stack() -> None:
    """So that processes that share out the matrices find what one process finds."""
    stack = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for G, P in zip(stack, randomised_basis(stack, 4), strict=True):
        torch.testing.assert_close(randomised_basis(G, 4), P, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_the_singular_basis_is_closer_than_an_svd_in_fp32(shape: tuple[int, int]) -> None:
    G = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)) ** 3
    exact = torch.linalg.svd(G.double()).U[..., :8]
    errors = [
        (P.double() @ P.double().mT - exact @ exact.mT).norm().item() for P in (singular_basis(G, 8), svd_basis(G, 8))
    ]
    assert errors[0] < errors[1] < 1e-4
    torch.testing.assert_close(singular_basis(G, 8).mT @ singular_basis(G, 8), torch.eye(8).expand(2, 8, 8))


@pytest.mark.parametrize("basis", [singular_basis, svd_basis])
def test_where_a_decomposition_fails_there_is_another_way(basis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    G = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(0))

    def fails(*args: Any, **kwargs: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, fails)
    assert torch.equal(basis(G, 4), randomised_basis(G, 4))


def test_refusals() -> None:
    for fields, words in (
        ({"projection": "up"}, "projection must be 'std', 'reverse_std', 'left', 'right' or 'full', got 'up'"),
        ({"basis": "dct"}, "basis must be 'singular', 'svd', 'randomised' or a function, got 'dct'"),
        ({"scale": "abc"}, "scale must be a positive number, got 'abc'"),
        ({"update_gap": 0.5}, "update_gap must be a positive integer, got 0.5"),
        ({"rule": "sgd"}, "rule must be 'adamw', 'adamw-8bit', 'adafactor' or 'muon', got 'sgd'"),
        ({"stagger": 1}, "stagger must be true or false, got 1"),
    ):
        with pytest.raises(ValueError, match=words):
            GaLore(**fields)
