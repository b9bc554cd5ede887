"""SwitchLoRA: its equation, initial values and exchanges."""

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

from lorank import Site, SwitchLoRA, convert, merge, step_hook
from lorank.methods.switchlora import SwitchLoRALinear, entry_stds, exchange_
from tests.methods.switchlora.conftest import ALWAYS, Bench, numbers


def site(d_in: int, d_out: int, **options: Any) -> Site:
    return Site("layers.0.q", "layers.*.q", 0, nn.Linear(d_in, d_out, **options))


def layer_of(d_in: int, d_out: int, rank: int, **options: Any) -> Any:
    torch.manual_seed(0)
    dense = site(d_in, d_out, **options)
    return SwitchLoRA(rank=rank).build(dense)


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


# ---- alpha, dropout and the LoRA start


@pytest.mark.parametrize("settings", [{"alpha": 3.0}, {"scale": 0.75}], ids=str)
def test_alpha_scales_the_term_and_exchanges_keep_the_function(settings: dict[str, float]) -> None:
    bench = Bench(12, 10, rank=4, interval=1, freeze_steps=0, **settings, **ALWAYS).attach()
    whole = lambda: (bench.W + 3 * bench.B @ bench.A / 4).detach()  # noqa: E731
    start, A = whole(), bench.A.detach().clone()
    x = numbers(5, 12)
    torch.testing.assert_close(bench.layer(x), x @ start.T + bench.layer.W.bias)
    bench.step(0.0)
    assert not torch.equal(bench.A, A)
    torch.testing.assert_close(whole(), start)


def test_the_lora_start_is_the_dense_layer_itself() -> None:
    dense = nn.Linear(48, 16, bias=False)
    before = dense.weight.detach().clone()
    layer: Any = SwitchLoRA(rank=8, start="lora", dropout=0.5).build(Site("layers.0.q", "layers.*.q", 0, dense))
    assert torch.equal(layer.W.weight, before) and not layer.B.weight.any()
    assert layer.A.weight.abs().max() <= 48**-0.5 and layer.A.weight.std().item() == pytest.approx(144**-0.5, rel=0.1)
    x = torch.ones(4, 48)
    nn.init.ones_(layer.B.weight)
    assert not torch.equal(layer(x)[0], layer(x)[1]), "each row has its own mask"
    assert torch.equal(layer.eval()(x)[0], layer(x)[1])
