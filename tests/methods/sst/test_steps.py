"""SST: what happens between steps, sampling, costs, new SVDs and swaps."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lorank import SST, convert, step_hook
from lorank.accounting import count_parameters
from lorank.method import seeded_generator
from lorank.methods.sst import SSTLinear, probabilities
from tests.methods.sst.conftest import (
    SHAPES,
    assert_orthonormal,
    factors,
    layer_of,
    layers_of,
    numbers,
    pairs,
    prepared,
    product,
    train,
)

# ---- check 3: between steps


def test_frozen_vectors_stay_and_active_ones_have_length_one(small: Callable[..., Any], tokens: Tensor) -> None:
    model, optimizer, _ = prepared(small, lr=0.05, interval=4)
    layers = layers_of(model)
    moved, clipped = False, False
    for iteration in range(3):
        before = [(layer.U_frozen.clone(), layer.V_frozen.clone(), layer.U_active.clone()) for layer in layers]
        for step in range(4 * iteration, 4 * iteration + 4):
            for layer, (U, V, _) in zip(layers, before, strict=True):
                assert torch.equal(layer.U_frozen, U) and torch.equal(layer.V_frozen, V)
            train(model, optimizer, tokens, range(step, step + 1))
            for layer in layers:
                for vectors in (layer.U_active, layer.V_active):
                    torch.testing.assert_close(vectors.norm(dim=0), torch.ones(layer.rank), rtol=0, atol=1e-6)
                assert (layer.S >= 0).all()
                clipped |= bool((layer.S == 0).any())
        moved |= any(not torch.equal(layer.U_active, U) for layer, (_, _, U) in zip(layers, before, strict=True))
    assert moved and clipped, "a learning rate at which both rules are needed"


def test_an_iteration_exchanges_the_pairs_its_seed_draws(small: Callable[..., Any], tokens: Tensor) -> None:
    """A swap seen from outside: every pair is where it was or in the other block, and the function is the same."""
    model, optimizer, hook = prepared(small, interval=8, restart_warmup_steps=0)
    train(model, optimizer, tokens, range(7))
    logits = model(tokens).logits
    before = [pairs(layer) for layer in layers_of(model)]
    active = [set(layer.index[: layer.rank].tolist()) for layer in layers_of(model)]
    expected = []
    for layer in layers_of(model):
        draw = torch.multinomial(
            (1 / len(layer.S) + layer.S.detach().double() / layer.S.detach().double().sum()) / 2,
            layer.rank,
            generator=seeded_generator(3, 1, layer.key),
        )
        expected.append(set(layer.index[draw].tolist()))
    optimizer.param_groups[0].update(lr=0.0)
    train(model, optimizer, tokens, range(7, 8))  # moves nothing of itself, but ends the iteration
    assert hook.step == 8
    changed = 0
    for layer, old, was, drawn in zip(layers_of(model), before, active, expected, strict=True):
        now = set(layer.index[: layer.rank].tolist())
        assert now == drawn
        changed += now != was
        for number, vectors in pairs(layer).items():
            for a, b in zip(vectors, old[number], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # vectors were normalised once more
    assert changed
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-5)


# ---- check 4: sampling


@pytest.mark.parametrize("m", [1, 2, 7, 768])
def test_probabilities_sum_to_one_and_are_at_least_half_uniform(m: int) -> None:
    for S in (numbers(m).abs(), torch.ones(m), torch.zeros(m), torch.eye(m)[0], 1e30 * torch.ones(m)):
        p = probabilities(S)
        assert p.sum().item() == pytest.approx(1, abs=1e-12)
        assert (p >= 1 / (2 * m) - 1e-15).all()
    for constant in (0.0, 0.3, 50.0):
        torch.testing.assert_close(probabilities(torch.full((m,), constant)), torch.full((m,), 1 / m).double())
    assert probabilities(torch.eye(m)[0])[0].item() == pytest.approx((1 + 1 / m) / 2)


@pytest.mark.parametrize("exploration", [0.0, 0.2, 1.0])
def test_exploration_is_the_uniform_part_of_the_draws(exploration: float) -> None:
    S = torch.tensor([3.0, 1.0, 0.0, 0.0])
    expected = [exploration / 4 + (1 - exploration) * share for share in (0.75, 0.25, 0, 0)]
    assert probabilities(S, exploration).tolist() == pytest.approx(expected, abs=1e-15)
    layer = layer_of(4, 4, 3, S.diag().double(), exploration=exploration)
    assert len(set(layer.index[:3].tolist())) == 3, "also where fewer values are above zero"
    if not exploration:
        assert {0, 1} <= set(layer.index[:3].tolist())


def test_draws_follow_the_probabilities_and_are_distinct() -> None:
    weight = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])).double()
    counts = torch.zeros(5, dtype=torch.float64)
    layer = layer_of(5, 5, 1)
    for i in range(2000):
        layer.decompose(weight)
        layer.resample(seeded_generator(0, i, "x"))
        counts[layer.index[0]] += 1
    expected = (1 / 5 + torch.tensor([8.0, 4, 2, 1, 1]).double() / 16) / 2
    assert (counts / 2000 - expected).abs().max() < 4 * math.sqrt(0.25 / 2000)
    for i in range(50):
        layer = layer_of(16, 16, 7, seed=i)
        assert sorted(layer.index.tolist()) == list(range(16))
        assert layer.U_active.shape == (16, 7)


def test_each_layer_iteration_and_seed_has_repeatable_draws() -> None:
    def first(*arguments: Any) -> int:
        return int(torch.randint(2**60, (), generator=seeded_generator(*arguments)))

    keys = [(seed, iteration, key) for seed in (0, 1, 12) for iteration in (0, 1, 12) for key in ("a.1", "a.11", "a.2")]
    assert len({first(*key) for key in keys}) == len(keys)
    assert [first(*key) for key in keys] == [first(*key) for key in keys]
    state = torch.get_rng_state()
    layer_of(16, 16, 4).resample(seeded_generator(0, 1, "x"))
    torch.manual_seed(0)
    layer = SSTLinear(16, 16, 4)
    after_init = torch.get_rng_state()
    layer.resample(seeded_generator(0, 2, "x"))
    assert torch.equal(torch.get_rng_state(), after_init), "drawing leaves the global generator alone"
    torch.set_rng_state(state)


# ---- checks 5 and 6: what is trained and what it costs


def test_768_by_768_at_rank_64_trains_99072_numbers() -> None:
    layer = SSTLinear(768, 768, 64, device=torch.device("meta"))
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trained == 99_072
    assert round(100 * trained / 768**2, 1) == 16.8
    assert sum(p.numel() for p in layer.parameters()) == 768 * (768 + 768 + 1)


def test_parameters_of_a_model_are_the_closed_form(architecture: Any) -> None:
    dense = count_parameters(architecture.dense())
    found = count_parameters(convert(architecture.dense(), SST(rank=0.25)))
    weights, stored, trained = 0, 0, 0
    for d_in, d_out in architecture.projections.values():
        m = min(d_in, d_out)
        weights += 2 * d_in * d_out  # two blocks
        stored += 2 * m * (d_in + d_out + 1)
        trained += 2 * (m // 4 * (d_in + d_out) + m)
    assert found.total == dense.total - weights + stored
    assert found.blocks == dense.blocks - weights + stored
    assert found.trainable == dense.total - weights + trained


def test_the_optimizer_keeps_no_moments_of_frozen_vectors(small: Callable[..., Any], tokens: Tensor) -> None:
    model, optimizer, _ = prepared(small)
    train(model, optimizer, tokens, range(5))
    for layer in layers_of(model):
        held = 0
        for parameter in layer.parameters():
            state = optimizer.state.get(parameter, {})
            assert bool(state) == parameter.requires_grad
            held += sum(state[name].numel() for name in ("exp_avg", "exp_avg_sq") if state)
        assert held == 2 * (layer.rank * (layer.d_in + layer.d_out) + min(layer.d_in, layer.d_out))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_swap_resets_vectors_and_moves_the_moments_of_s(
    small: Callable[..., Any], tokens: Tensor, amsgrad: bool
) -> None:
    model = convert(small("llama"), SST(rank=0.25, interval=4, restart_warmup_steps=0)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, amsgrad=amsgrad)
    hook = step_hook(model, optimizer, steps=8)
    twin = copy.deepcopy(model)
    alone = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, amsgrad=amsgrad)
    for step in range(4):
        train(model, optimizer, tokens, range(step, step + 1))
        train(twin, alone, tokens, range(step, step + 1))
        for layer in layers_of(twin):
            layer.normalise()
    assert hook is not None and hook.step == 4
    names = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if amsgrad else [])
    for layer, other in zip(layers_of(model), layers_of(twin), strict=True):
        assert not torch.equal(layer.index, other.index)
        for vectors in (layer.U_active, layer.V_active):
            assert all(not optimizer.state[vectors][name].any() for name in [*names, "step"])
        place = {int(number): i for i, number in enumerate(other.index)}
        order = [place[int(number)] for number in layer.index]
        assert torch.equal(layer.S, other.S[order])
        for name in names:
            assert torch.equal(optimizer.state[layer.S][name], alone.state[other.S][name][order])
        assert optimizer.state[layer.S]["step"] == 4


def test_flops_and_kept_activations_are_those_of_the_docstring() -> None:
    n, r = 10, 3
    for d_in, d_out in SHAPES:
        m = min(d_in, d_out)
        layer = layer_of(d_in, d_out, r)
        x = numbers(n, d_in).requires_grad_()
        known = {t.untyped_storage()._cdata for t in layer.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, known: set[int] = known, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                kept[storage._cdata] = storage.nbytes() // tensor.element_size()
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = layer(x)
            assert counter.get_total_flops() == 2 * n * m * (d_in + d_out)
            y.sum().backward()
        assert counter.get_total_flops() == 2 * n * (2 * m + r) * (d_in + d_out)
        assert sum(kept.values()) == n * d_in + n * m


# ---- check 7: a new SVD


def test_a_new_svd_keeps_the_function_and_resets_s(small: Callable[..., Any], tokens: Tensor) -> None:
    model, optimizer, hook = prepared(small, lr=0.02)
    train(model, optimizer, tokens, range(3))
    skewed = [max((Q.T @ Q - torch.eye(Q.shape[1])).abs().max() for Q in factors(la)[::2]) for la in layers_of(model)]
    assert min(skewed) > 1e-3, "three steps have bent the vectors"
    before, logits = [product(layer) for layer in layers_of(model)], model(tokens).logits
    optimizer.param_groups[0].update(lr=0.0)
    train(model, optimizer, tokens, range(3, 4))
    assert hook.step == 4
    for layer, weight in zip(layers_of(model), before, strict=True):
        assert (product(layer) - weight).abs().max() < 1e-5 * weight.norm()
        assert_orthonormal(layer)
        spectrum = torch.linalg.svdvals(weight)
        torch.testing.assert_close(layer.S.detach()[layer.index.argsort()].double(), spectrum, rtol=1e-4, atol=1e-5)
        for parameter in (layer.S, layer.U_active, layer.V_active):
            assert all(not value.any() for value in optimizer.state[parameter].values())
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-5)


def test_the_iterations_of_a_round_can_be_given(small: Callable[..., Any], tokens: Tensor) -> None:
    model, optimizer, _ = prepared(small, rank=8, interval=1, iterations_per_round=3)
    fresh = []
    for step in range(7):
        train(model, optimizer, tokens, range(step, step + 1))
        fresh.append([not optimizer.state[layer.S]["step"] for layer in layers_of(model)])
    assert [step for step, reset in enumerate(fresh, 1) if all(reset)] == [3, 6]
    assert not any(any(reset) for step, reset in enumerate(fresh, 1) if step % 3)


def test_a_round_covers_the_spectrum_of_each_matrix(small: Callable[..., Any], tokens: Tensor) -> None:
    """An integer rank under grouped-query attention: m/r is 32/8 for queries and 16/8 for keys."""
    model, optimizer, _ = prepared(small, rank=8, interval=1)
    query, key = model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj
    assert (len(query.S), len(key.S)) == (32, 16)
    fresh = []
    for step in range(8):
        train(model, optimizer, tokens, range(step, step + 1))
        fresh.append([not optimizer.state[layer.S]["step"] for layer in (query, key)])
    assert [step for step, (q, _) in enumerate(fresh, 1) if q] == [4, 8]
    assert [step for step, (_, k) in enumerate(fresh, 1) if k] == [2, 4, 6, 8]


# ---- check 9: swap


@pytest.mark.parametrize("d_in, d_out", SHAPES)
def test_a_swap_moves_whole_pairs_in_place_and_undoes_itself(d_in: int, d_out: int) -> None:
    layer = layer_of(d_in, d_out, 5)
    before, old = copy.deepcopy(layer.state_dict()), pairs(layer)
    addresses = [tensor.data_ptr() for tensor in layer.state_dict().values()]
    x = numbers(4, d_in)
    y = layer(x)
    leaving, entering = torch.tensor([0, 2, 3]), torch.tensor([9, 5, 11])
    layer.swap(leaving, entering)
    assert torch.equal(layer.index[leaving], before["index"][entering])
    assert torch.equal(layer.index[entering], before["index"][leaving])
    for number, vectors in pairs(layer).items():
        assert all(map(torch.equal, vectors, old[number]))
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    assert [tensor.data_ptr() for tensor in layer.state_dict().values()] == addresses
    layer.swap(leaving, entering)
    assert all(map(torch.equal, layer.state_dict().values(), before.values()))
    layer.swap(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64))
    assert all(map(torch.equal, layer.state_dict().values(), before.values()))
