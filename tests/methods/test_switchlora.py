"""SwitchLoRA against its paper: initial values, exchanges that keep the function, pointers, rests, frequency, memory."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import lorank
from lorank import Site, SwitchLoRA, convert, merge, step_hook
from lorank.checkpointing import POLICIES
from lorank.methods.switchlora import SwitchLoRALinear, entry_stds, exchange_, theta
from lorank.optim.adamw import VectorAdamW


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def site(d_in: int, d_out: int, **options: Any) -> Site:
    return Site("layers.0.q", "layers.*.q", 0, nn.Linear(d_in, d_out, **options))


def layer_of(d_in: int, d_out: int, rank: int, **options: Any) -> Any:
    torch.manual_seed(0)
    dense = site(d_in, d_out, **options)
    return SwitchLoRA(rank=rank).build(dense)


class Net(nn.Module):
    """One block of one linear map, the least that can be converted."""

    def __init__(self, d_in: int, d_out: int, dtype: torch.dtype):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(d_in, d_out, dtype=dtype))])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class Bench:
    """A converted Net with optimizer and hook, to be driven by hand."""

    def __init__(self, d_in: int, d_out: int, lr: float = 0.0, dtype: torch.dtype = torch.float64, **method: Any):
        torch.manual_seed(0)
        self.method = SwitchLoRA(**method)
        self.model = convert(Net(d_in, d_out, dtype), self.method)
        self.layer: Any = self.model.layers[0][0]
        self.A, self.B, self.W = (getattr(self.layer, name).weight for name in "ABW")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = VectorAdamW(trained, lr=lr, eps=1e-30, weight_decay=0.0)

    def attach(self, steps: int = 100, seed: int = 5) -> "Bench":
        self.hook: Any = step_hook(self.model, self.optimizer, steps=steps, seed=seed)
        self.a, self.b = self.hook.pools["layers.0.0"]
        return self

    def step(self, gradient: float = 1.0) -> None:
        for parameter in (self.A, self.B, self.layer.W.bias):
            parameter.grad = torch.full_like(parameter, gradient)
        self.optimizer.step()

    def weight(self) -> Tensor:
        """[d_out, d_in], what the layer amounts to."""
        return (self.W + self.B @ self.A / len(self.A)).detach()


ALWAYS: dict[str, Any] = {"ratio": 1e9}  # the highest frequency throughout: r / interval each step
ONCE: dict[str, Any] = {"frequency": "z", "ratio": 0.005}  # of 100 steps: r / interval at step 0 and then no more


# ---- the equation and its initial values


def test_the_layer_is_w_plus_ba_over_r_and_so_are_its_gradients() -> None:
    layer = layer_of(10, 14, 4, dtype=torch.float64)
    x = numbers(3, 5, 10).requires_grad_()  # [batch, n, d_in]
    g = numbers(3, 5, 14, seed=1)
    A, B, W, b = (p.detach().clone() for p in (layer.A.weight, layer.B.weight, layer.W.weight, layer.W.bias))
    y = layer(x)
    z = torch.einsum("ri,bni->bnr", A, x.detach())
    expected = torch.einsum("oi,bni->bno", W, x.detach()) + torch.einsum("or,bnr->bno", B, z) / 4 + b
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.backward(g)
    gz = torch.einsum("or,bno->bnr", B, g) / 4
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(layer.A.weight.grad, torch.einsum("bnr,bni->ri", gz, x.detach()), **close)
    torch.testing.assert_close(layer.B.weight.grad, torch.einsum("bno,bnr->or", g, z) / 4, **close)
    torch.testing.assert_close(x.grad, torch.einsum("bno,oi->bni", g, W + B @ A / 4), **close)
    torch.testing.assert_close(layer.W.bias.grad, g.sum((0, 1)), **close)
    assert layer.W.weight.grad is None
    assert not layer.W.weight.requires_grad


@pytest.mark.parametrize(
    ("d_out", "d_in", "std_A", "std_B"),
    [(1024, 1024, 0.537285, 0.537285), (2736, 1024, 0.607515, 0.475174), (1024, 2736, 0.371662, 0.475174)],
)
def test_the_initial_values_have_the_published_spread(d_out: int, d_in: int, std_A: float, std_B: float) -> None:
    assert entry_stds(d_in, d_out, 256) == pytest.approx((std_A, std_B), abs=1e-6)
    layer = layer_of(d_in, d_out, 256, bias=False)
    for weight, std in ((layer.A.weight, std_A), (layer.B.weight, std_B)):
        assert weight.std().item() == pytest.approx(std, rel=0.01)
        assert weight.abs().max().item() == pytest.approx(math.sqrt(3) * std, rel=1e-3)  # uniform
    product = layer.B.weight @ layer.A.weight / 256
    assert product.std().item() == pytest.approx(0.577350 / math.sqrt(d_in), rel=0.02)
    if d_in == 1024:
        assert product.std().item() == pytest.approx(0.018042, rel=0.02)


def test_the_layer_starts_as_the_dense_one() -> None:
    torch.manual_seed(0)
    dense = site(96, 64)
    W_0, b_0 = dense.linear.weight.detach().clone(), dense.linear.bias.detach().clone()
    layer: Any = SwitchLoRA(rank=16).build(dense)
    assert (layer.W.weight + layer.B.weight @ layer.A.weight / 16 - W_0).abs().max() < 1e-6
    assert (layer.W.weight - W_0).abs().max() > 0.01
    assert torch.equal(layer.W.bias, b_0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "opt"])
def test_converted_and_merged_models_have_the_dense_outputs(
    name: str, small: Callable[..., Any], tokens: Tensor
) -> None:
    dense = small(name)
    expected = dense(tokens).logits
    model = convert(dense, SwitchLoRA())
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merge(model)(tokens).logits, expected, rtol=1e-4, atol=1e-5)


# ---- doors through which initial values come


def starts_as_a_dense_llama(model: Any) -> bool:
    """Each layer's W + (1/r) B A is spread as transformers draws a dense weight, 0.02, and not wider: B A has 0.1."""
    layers = [module for module in model.modules() if isinstance(module, SwitchLoRALinear)]
    assert layers
    weights = torch.cat([(module.W.weight + module.product()).flatten() for module in layers])
    return bool(abs(weights.std() / 0.02 - 1) < 0.05)


def test_from_config_and_meta_start_as_dense_models_do(small: Callable[..., Any], tmp_path: Path) -> None:
    convert(small("llama"), SwitchLoRA()).save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert starts_as_a_dense_llama(fresh)
    with torch.device("meta"):
        empty = convert(small("llama"), SwitchLoRA())
    empty.to_empty(device="cpu").init_weights()
    assert starts_as_a_dense_llama(empty)
    assert not [n for n, p in empty.named_parameters() if p.requires_grad == n.endswith("proj.W.weight")]


def test_loaded_values_are_not_drawn_again_unless_all_are(small: Callable[..., Any]) -> None:
    model = convert(small("llama"), SwitchLoRA())
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)  # transformers' mark that a module has been drawn
    model.init_weights()
    assert starts_as_a_dense_llama(model)
    assert not any(torch.equal(value, before[n]) for n, value in model.state_dict().items() if "proj" in n)


def test_a_loaded_dense_model_is_converted_like_any_other(
    small: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    small("llama").save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)  # its weights bear transformers' mark of loaded ones
    expected = dense(tokens).logits
    torch.testing.assert_close(convert(dense, SwitchLoRA())(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["A", "B", "W"])
def test_what_a_file_lacks_is_drawn_and_what_it_has_is_kept(
    part: str, small: Callable[..., Any], tmp_path: Path
) -> None:
    model = convert(small("llama", hidden_size=128, intermediate_size=320), SwitchLoRA())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = f"model.layers.0.mlp.up_proj.{part}.weight"
    weights.pop(missing)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {missing}
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in weights.items())
    layer = loaded.model.layers[0].mlp.up_proj
    if part == "W":
        assert (layer.W.weight + layer.product()).std().item() == pytest.approx(0.02, rel=0.02)
    else:
        std = dict(zip("AB", entry_stds(128, 320, 32), strict=True))[part]
        assert getattr(layer, part).weight.std().item() == pytest.approx(std, rel=0.05)
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == [
        n for n, p in model.named_parameters() if not p.requires_grad
    ]


# ---- exchanges


@pytest.mark.parametrize("rows", [[3], [1, 2, 3], [6, 7, 0, 1]], ids=["one", "block", "around the end"])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_an_exchange_keeps_the_function(rows: list[int], factor: str, dtype: torch.dtype, tolerance: float) -> None:
    layer = layer_of(40, 24, 8, dtype=dtype)
    x = numbers(50, 40, dtype=dtype)
    A, B, W = (getattr(layer, name).weight for name in "ABW")
    before, old_W = layer(x), W.clone()
    chosen = torch.tensor(rows)
    if factor == "A":
        new = numbers(len(rows), 40, seed=2, dtype=dtype)
        exchange_(W, A, B.T, chosen, new)
        assert torch.equal(A[chosen], new)
    else:
        new = numbers(len(rows), 24, seed=2, dtype=dtype)
        exchange_(W.T, B.T, A, chosen, new)
        assert torch.equal(B[:, chosen], new.T)
    assert (layer(x) - before).norm() < tolerance * before.norm()
    assert (W - old_W).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["continuous", "discontinuous"])
@pytest.mark.parametrize(
    ("d_in", "d_out", "rank", "interval", "freeze"),
    [
        (16, 24, 8, 4, 2),
        (20, 12, 7, 1, 0),
        (9, 40, 7, 2, 1),  # more at once than the pool has spare ones
        (16, 16, 3, 2, 1),
        (30, 24, 10, 10, 5),
        (30, 24, 7, 6, 3),  # pointers run up against what rests
        (30, 40, 9, 8, 4),
        (6, 8, 2, 1, 0),
    ],
)
def test_pointers_pools_and_rests_over_many_steps(
    mode: str, d_in: int, d_out: int, rank: int, interval: int, freeze: int
) -> None:
    """Nothing is in use twice, nothing that rests is exchanged, what was put away comes back, the function stays."""
    bench = Bench(d_in, d_out, rank=rank, interval=interval, freeze_steps=freeze, mode=mode, **ALWAYS).attach()
    x = numbers(30, d_in)
    put_away: dict[tuple[str, int], Tensor] = {}
    returned = exchanged = 0
    for step in range(150):
        with torch.no_grad():  # training
            bench.A.add_(numbers(*bench.A.shape, seed=2 * step), alpha=0.01)
            bench.B.add_(numbers(*bench.B.shape, seed=2 * step + 1), alpha=0.01)
        output = bench.layer(x)
        pools, views = {"A": bench.a, "B": bench.b}, {"A": bench.A, "B": bench.B.T}
        before = {f: (pools[f].selected.clone(), pools[f].frozen.clone(), views[f].clone()) for f in "AB"}
        bench.step()
        assert (bench.layer(x) - output).norm() < 1e-12 * output.norm()
        for factor in "AB":
            selected, frozen, vectors = before[factor]
            assert len(set(pools[factor].selected.tolist())) == rank
            changed = (vectors != views[factor]).any(1).nonzero().flatten().tolist()
            assert not frozen[changed].any(), "it rested"
            exchanged += len(changed)
            for i in changed:
                put_away[factor, int(selected[i])] = vectors[i]
                assert torch.equal(pools[factor].candidates[selected[i]], vectors[i])
            for i in changed:
                if (coming := (factor, int(pools[factor].selected[i]))) in put_away:
                    returned += 1
                    assert torch.equal(views[factor][i], put_away[coming]), "it came back changed"
    assert exchanged > 100
    assert returned > 20


def test_in_continuous_mode_candidates_come_in_turn() -> None:
    bench = Bench(16, 24, rank=8, interval=4, freeze_steps=2, **ALWAYS).attach()
    for pool, pointer in ((bench.a, 0), (bench.b, 4)):
        assert pool.pointer == pointer
        assert [int(pool.selected[(pointer + i) % 8]) for i in range(8)] == list(range(8, 16))  # the last 8 of 16
    taken: dict[str, list[int]] = {"A": [], "B": []}
    for _ in range(60):
        before = {"A": bench.a.selected.clone(), "B": bench.b.selected.clone()}
        pointers = {"A": int(bench.a.pointer), "B": int(bench.b.pointer)}
        bench.step()
        for factor, pool in (("A", bench.a), ("B", bench.b)):
            moved = int(pool.pointer - pointers[factor]) % 8
            rows = [(pointers[factor] + i) % 8 for i in range(moved)]
            assert torch.equal(before[factor] != pool.selected, torch.isin(torch.arange(8), torch.tensor(rows)))
            taken[factor] += pool.selected[rows].tolist()
    for order in taken.values():
        assert len(order) > 48
        assert order == [i % 16 for i in range(len(order))]


def test_in_discontinuous_mode_any_free_candidate_may_come() -> None:
    taken: list[int] = []
    for seed in range(200):
        bench = Bench(12, 20, rank=4, interval=4, freeze_steps=0, mode="discontinuous", **ALWAYS).attach(seed=seed)
        bench.step()
        taken.append(int(bench.a.selected[0]))
    counts = torch.bincount(torch.tensor(taken), minlength=12)
    assert counts[8:].sum() == 0  # in use
    assert counts[:8].min() > 10  # 25 expected


def test_a_rank_that_uses_the_whole_pool_exchanges_nothing() -> None:
    with pytest.warns(UserWarning, match="not smaller than the dense layer"):
        bench = Bench(8, 12, rank=8, interval=1, freeze_steps=0, **ALWAYS)
    assert bench.model.layers[0][0].A.out_features == 8
    hook = step_hook(bench.model, bench.optimizer, steps=10)
    before = bench.A.clone()
    bench.step()
    assert torch.equal(bench.A, before)
    assert hook is not None
    assert hook.state_dict().keys() == {"step"}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["none", "blocks"])
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
    bench = Bench(40, 40, rank=16, interval=40, ratio=0.5).attach(steps=2_000)
    moved = 0
    for _ in range(2_000):
        before = int(bench.a.pointer)
        bench.step()
        moved += int(bench.a.pointer - before) % 16
    expected = sum(16 / 40 * 0.3 ** ((s + 1) / 1_000) for s in range(2_000))  # 302
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
    with pytest.raises(ValueError, match=r"must be lorank\.optim\.VectorAdamW with switchlora, got AdamW"):
        step_hook(model, torch.optim.AdamW(model.parameters()), steps=10)
    with pytest.raises(ValueError, match=r"lacks the factors of model\.layers\.0\.self_attn\.q_proj"):
        step_hook(model, VectorAdamW(model.lm_head.parameters()), steps=10)
    optimizer = VectorAdamW(model.parameters())
    model.model.layers[1].mlp.up_proj.A.weight.device_mesh = object()  # as a sharded parameter has
    with pytest.raises(ValueError, match=r"the factors of model\.layers\.1\.mlp\.up_proj are sharded"):
        step_hook(model, optimizer, steps=10)
