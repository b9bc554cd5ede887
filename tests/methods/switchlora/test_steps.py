"""SwitchLoRA: optimizer state, frozen vectors, frequency, costs, and what is refused."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import SwitchLoRA, convert, step_hook
from lorank.checkpointing import POLICIES
from lorank.methods.switchlora import SwitchLoRALinear, entry_stds, theta
from lorank.optim.adamw import VectorAdamW
from tests.methods.switchlora.conftest import ALWAYS, Bench, numbers

ONCE: dict[str, Any] = {"frequency": "z", "ratio": 0.005}  # of 100 steps: r / interval at step 0 and then no more


# ---- optimizer state and rests


def test_what_rests_is_not_moved_by_weight_decay_either() -> None:
    bench = Bench(16, 24, lr=0.1, rank=8, interval=10, freeze_steps=3, **ALWAYS).attach()
    for group in bench.optimizer.param_groups:
        group["weight_decay"] = 0.5
    rested = 0
    for _ in range(12):
        before = bench.B.detach().clone()
        bench.step()
        columns = bench.b.held[0]
        rested += len(columns)
        unchanged = (before == bench.B).all(dim=0)
        assert unchanged[columns].all() and unchanged.sum() == len(columns)
    assert rested > 8


def test_under_a_closure_an_exchange_follows_the_gradients() -> None:
    benches = [Bench(16, 24, lr=0.1, rank=8, interval=10, freeze_steps=3, **ALWAYS).attach() for _ in range(2)]
    x = numbers(5, 16)
    for _ in range(6):
        for bench, closed in zip(benches, (False, True), strict=True):

            def closure(bench: Bench = bench) -> Tensor:
                bench.optimizer.zero_grad()
                loss = (bench.model(x) - 1).square().mean()
                loss.backward()
                return loss

            if closed:
                assert bench.optimizer.step(closure) > 0
            else:
                closure()
                bench.optimizer.step()
    assert all(map(torch.equal, benches[0].model.parameters(), benches[1].model.parameters()))
    assert benches[1].hook.step == 6


@pytest.mark.filterwarnings("ignore:switchlora acts between steps")  # the twin that it is compared with has no hook
def test_an_exchange_restarts_and_freezes_the_counterpart() -> None:
    bench = Bench(24, 32, lr=0.01, rank=10, interval=10, **ONCE)
    for _ in range(3):
        bench.step(2.0)
    bench.attach()
    before = {parameter: copy.deepcopy(state) for parameter, state in bench.optimizer.state.items()}
    A, B = bench.A.detach().clone(), bench.B.detach().clone()
    bench.step(2.0)  # row 0 of A and column 5 of B are exchanged
    assert (bench.a.selected[0], bench.b.selected[5]) == (0, 0)
    state_A, state_B = bench.optimizer.state[bench.A], bench.optimizer.state[bench.B]
    assert (state_A["step"].shape, state_B["step"].shape) == ((10, 1), (1, 10))
    for beta, name, gradient in ((0.9, "exp_avg", 2.0), (0.999, "exp_avg_sq", 4.0)):
        going_on = beta * before[bench.A][name] + (1 - beta) * gradient
        torch.testing.assert_close(state_A[name][:5], going_on[:5])  # row 0, exchanged, among them
        assert (state_A[name][5] == 0).all()
        torch.testing.assert_close(state_B[name][:, 1:], (beta * before[bench.B][name] + (1 - beta) * gradient)[:, 1:])
        assert (state_B[name][:, 0] == 0).all()
    assert state_A["step"].flatten().tolist() == [4, 4, 4, 4, 4, 1, 4, 4, 4, 4]
    assert state_B["step"].flatten().tolist() == [1, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    assert not torch.equal(bench.A[1], A[1])
    for update in range(1, 7):
        assert torch.equal(bench.B[:, 0], B[:, 0]) == (update < 6), update
        assert torch.equal(bench.A[5], A[5]) == (update < 6), update
        assert (bench.B.grad[:, 0] == 0).all() == (update < 6)
        assert (bench.A.grad[5] == 0).all() == (update < 6)
        assert (bench.B.grad[:, 1:] == 2).all()
        if update < 6:
            bench.step(2.0)
    soft = 0.1 / (1 - 0.9**6) / math.sqrt(0.001 / (1 - 0.999**6))
    assert soft == pytest.approx(0.522, abs=5e-4)
    moved = torch.cat([bench.B[:, 0] - B[:, 0], bench.A[5] - A[5]])
    torch.testing.assert_close(moved, torch.full_like(moved, -0.01 * soft), rtol=1e-9, atol=0)


def test_an_oracle_that_moves_one_vector_at_a_time_agrees() -> None:
    """The whole algorithm on lists of vectors, in plain loops, gradients in closed form, over 60 steps of regression."""
    d_in, d_out, r, c, freeze, lr = 16, 24, 8, 16, 2, 0.02
    bench = Bench(d_in, d_out, lr=lr, rank=r, interval=4, freeze_steps=freeze, **ALWAYS).attach()
    bench.layer.W.bias.requires_grad_(False)
    x, target = numbers(40, d_in), numbers(40, d_out, seed=1)
    W, bias = bench.W.detach().clone(), bench.layer.W.bias.detach().clone()
    live = {"A": [*bench.A.detach().clone()], "B": [*bench.B.detach().T.clone()]}
    pool = {"A": bench.a.candidates.clone(), "B": bench.b.candidates.clone()}
    pointer = {"A": 0, "B": r // 2}
    held = {"A": [c - r + i for i in range(r)], "B": [c - r + (i - r // 2) % r for i in range(r)]}
    rest = {"A": [0] * r, "B": [0] * r}
    moments = {f: [(torch.zeros_like(v), torch.zeros_like(v), 0) for v in live[f]] for f in "AB"}

    def room(one: str, other: str) -> int:
        count = 0
        while (row := (pointer[one] + count) % r) != pointer[other] and rest[one][row] == 0:
            count += 1
        return count

    for _ in range(60):
        A, B = torch.stack(live["A"]), torch.stack(live["B"])
        error = 2 * (x @ W.T + x @ A.T @ B / r + bias - target) / target.numel()
        slope = {"A": B @ error.T @ x / r, "B": A @ x.T @ error / r}
        count = min(2, room("A", "B"), room("B", "A"))
        for one, other in (("A", "B"), ("B", "A")):
            for _ in range(count):
                row = pointer[one]
                successor = (held[one][row - 1] + 1) % c
                pool[one][held[one][row]] = live[one][row]
                change = torch.outer(live["B" if one == "A" else "A"][row], live[one][row] - pool[one][successor]) / r
                W = W + (change if one == "A" else change.T)
                live[one][row], held[one][row] = pool[one][successor].clone(), successor
                rest[other][row] = freeze
                moments[other][row] = (torch.zeros_like(live[other][row]), torch.zeros_like(live[other][row]), 0)
                pointer[one] = (row + 1) % r
        for f in "AB":
            for i in range(r):
                g = slope[f][i] * (rest[f][i] == 0)
                rest[f][i] = max(0, rest[f][i] - 1)
                m, v, t = moments[f][i]
                m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, t + 1
                moments[f][i] = m, v, t
                live[f][i] = live[f][i] - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-30)
        loss = (bench.model(x) - target).square().mean()
        bench.optimizer.zero_grad()
        loss.backward()
        bench.optimizer.step()
        close = {"rtol": 1e-8, "atol": 1e-8}
        torch.testing.assert_close(bench.A.detach(), torch.stack(live["A"]), **close)
        torch.testing.assert_close(bench.B.detach(), torch.stack(live["B"]).T, **close)
        torch.testing.assert_close(bench.W, W, **close)
        assert (bench.a.selected.tolist(), bench.b.selected.tolist()) == (held["A"], held["B"])
        assert (bench.a.frozen.tolist(), bench.b.frozen.tolist()) == (rest["A"], rest["B"])
    torch.testing.assert_close(bench.a.candidates, pool["A"], **close)
    torch.testing.assert_close(bench.b.candidates, pool["B"], **close)


@pytest.mark.filterwarnings("ignore:switchlora acts between steps")  # the twin that it is compared with has no hook
def test_without_exchanges_the_hook_changes_no_bit(small: Callable[..., Any], tokens: Tensor) -> None:
    """The limit: plain LoRA on a frozen weight."""
    results = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model = convert(small("llama"), SwitchLoRA(interval=1e9)).train()
        optimizer = VectorAdamW([p for p in model.parameters() if p.requires_grad])
        if hooked:
            step_hook(model, optimizer, steps=4)
        for _ in range(4):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(("dtype", "policy"), [(torch.float32, "blocks"), (torch.bfloat16, "none")])
def test_training_with_accumulation_and_clipping_learns(
    dtype: torch.dtype, policy: str, small: Callable[..., Any], tokens: Tensor
) -> None:
    torch.manual_seed(0)
    model = convert(small("llama").to(dtype), SwitchLoRA(interval=4, freeze_steps=1, ratio=10.0)).train()
    lorank.checkpoint(model, POLICIES[policy])
    optimizer = VectorAdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    hook: Any = step_hook(model, optimizer, steps=30)
    first = last = 0.0
    for step in range(30):
        losses = [model(row[None], labels=row[None]).loss / 2 for row in tokens]
        for loss in losses:
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = sum(loss.item() for loss in losses)
        first = first if step else last
    assert hook.step == 30
    assert any(int(a.pointer) != 0 for a, _ in hook.pools.values())
    assert last < 0.6 * first
    assert all(p.isfinite().all() for p in model.parameters())


# ---- how often


def test_the_exponential_frequency_gives_the_published_count() -> None:
    T, e = 40_000, 4_000
    assert theta(e - 1, T, 0.1, "exponential") == pytest.approx(0.3, rel=1e-12)
    per_step = [256 / 40 * theta(s, T, 0.1, "exponential") for s in range(T)]
    assert per_step[0] == pytest.approx(6.398, abs=5e-4)
    assert sum(per_step) == pytest.approx(21_260, rel=0.01)
    assert sum(per_step) == pytest.approx(256 / 40 * e / math.log(1 / 0.3), rel=1e-3)
    assert theta(10**7, T, 0.1, "exponential") == 1e-8


def test_the_z_frequency_is_a_falling_sigmoid() -> None:
    T, e = 1_000, 100
    for s in (0, 1, 50, 100, 150, 999):
        assert theta(s, T, 0.1, "z") == pytest.approx(1 - 1 / (1 + math.exp(-(10 / e) * (s - e))), rel=1e-9, abs=1e-15)
    assert theta(10**9, T, 0.1, "z") == 0


def test_exchanges_are_as_many_as_the_frequency_says_on_average() -> None:
    bench = Bench(40, 40, rank=16, interval=40, ratio=0.5).attach(steps=600)
    moved = 0
    for _ in range(600):
        before = int(bench.a.pointer)
        bench.step()
        moved += int(bench.a.pointer - before) % 16
    expected = sum(16 / 40 * 0.3 ** ((s + 1) / 300) for s in range(600))  # 91
    assert moved == pytest.approx(expected, abs=4 * math.sqrt(expected))


# ---- what it costs


def test_exactly_the_dense_weights_are_frozen(small: Any) -> None:
    model = convert(small("llama"), SwitchLoRA())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.endswith("proj.W.weight")}


@pytest.mark.parametrize("offload", [True, False])
def test_pools_are_in_host_memory_by_default(offload: bool, small: Any) -> None:
    """The meta device plays the accelerator."""
    with torch.device("meta"):
        model = convert(small("llama"), SwitchLoRA(offload=offload))
        optimizer = VectorAdamW([p for p in model.parameters() if p.requires_grad])
        hook: Any = step_hook(model, optimizer, steps=10)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SwitchLoRALinear)}
    assert hook.pools.keys() == layers.keys()
    for name, layer in layers.items():
        n, m = layer.W.in_features, layer.W.out_features
        candidates = [pool.candidates for pool in hook.pools[name]]
        assert sum(c.numel() for c in candidates) == min(m, n) * (m + n)
        assert {c.device.type for c in candidates} == {"cpu" if offload else "meta"}
    assert not any("candidates" in name for name in model.state_dict())
    assert all(isinstance(value, Tensor) for value in hook.state_dict().values())


def test_pools_are_drawn_from_the_seed_and_the_layer_s_name(small: Callable[..., Any]) -> None:
    def pools(seed: int, **options: Any) -> dict[str, Tensor]:
        model = convert(small("llama"), SwitchLoRA(**options))
        optimizer = VectorAdamW([p for p in model.parameters() if p.requires_grad])
        hook: Any = step_hook(model, optimizer, steps=10, seed=seed)
        return {name: value for name, value in hook.state_dict().items() if name.endswith("candidates")}

    state, again, other = pools(3), pools(3, offload=False), pools(4)
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert not any(torch.equal(value, other[name]) for name, value in state.items())
    drawn = [value.flatten()[:16].tolist() for value in state.values()]
    assert len(set(map(tuple, drawn))) == len(drawn)
    name = "model.layers.1.mlp.up_proj"  # 32 -> 80, r = 8
    for factor, std in zip("AB", entry_stds(32, 80, 8), strict=True):
        assert state[f"{name}.{factor}.candidates"].std().item() == pytest.approx(std, rel=0.05)


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer, .* got 0"),
        ({"interval": 9}, "interval must be at least twice freeze_steps=5, got 9"),
        ({"interval": 39, "freeze_steps": 20}, "interval must be at least twice freeze_steps=20, got 39"),
        ({"interval": 0, "freeze_steps": 0}, "interval must be a number of at least 1, got 0"),
        ({"interval": math.nan}, "interval must be a number of at least 1, got nan"),
        ({"ratio": 0}, "ratio must be a positive number, got 0"),
        ({"ratio": math.nan}, "ratio must be a positive number, got nan"),
        ({"freeze_steps": -1}, "freeze_steps must be an integer of at least 0, got -1"),
        ({"mode": "random"}, "mode must be 'continuous' or 'discontinuous', got 'random'"),
        ({"frequency": "cosine"}, "frequency must be 'exponential' or 'z', got 'cosine'"),
    ],
)
def test_settings_without_sense_are_refused_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        SwitchLoRA(**settings)
    assert "\n" not in str(refusal.value)


def test_the_least_interval_is_twice_the_rest() -> None:
    assert SwitchLoRA(interval=10).freeze_steps == 5
    assert SwitchLoRA(interval=1, freeze_steps=0).interval == 1


def test_an_optimizer_that_cannot_serve_is_refused(small: Callable[..., Any]) -> None:
    model: Any = convert(small("llama"), SwitchLoRA())
    with pytest.raises(ValueError, match=r"must come from lorank\.optimizer with switchlora, got AdamW"):
        step_hook(model, torch.optim.AdamW(model.parameters()), steps=10)
    with pytest.raises(ValueError, match=r"lacks the factors of model\.layers\.0\.self_attn\.q_proj"):
        step_hook(model, VectorAdamW(model.lm_head.parameters()), steps=10)
