"""SST against its paper: the spectral factors, the enhanced gradient, and what happens between steps."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, TrainerCallback, get_cosine_with_min_lr_schedule_with_warmup

import lorank
from lorank import SST, Site, convert, merge, step_hook
from lorank.accounting import count_parameters
from lorank.method import seeded_generator
from lorank.methods.sst import SSTLinear, probabilities
from lorank.moments import moments
from lorank.sites import find_sites
from lorank.train import run
from lorank.train.folder import history, read_run
from lorank.train.recipe import Recipe

SHAPES = [(12, 20), (20, 12), (16, 16)]
SHORT = {"rank": 0.5, "interval": 2, "restart_warmup_steps": 1}
"""Swaps after steps 2, 4, 6, ...; with half of all pairs active a round is two iterations: new SVDs after 4, 8, ..."""


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def layer_of(d_in: int, d_out: int, rank: int, weight: Tensor | None = None, **options: Any) -> SSTLinear:
    torch.manual_seed(0)
    layer = SSTLinear(d_in, d_out, rank, dtype=torch.float64, **options)
    if weight is not None:
        layer.start_from(weight)
    return layer


def factors(layer: SSTLinear) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, m], S [m], V [d_in, m] in the layer's order of places."""
    U = torch.cat([layer.U_active.detach(), layer.U_frozen], 1)
    V = torch.cat([layer.V_active.detach(), layer.V_frozen], 1)
    return U, layer.S.detach(), V


def product(layer: SSTLinear) -> Tensor:
    U, S, V = factors(layer)
    return torch.einsum("oi,i,ji->oj", U.double(), S.double(), V.double())


def pairs(layer: SSTLinear) -> dict[int, tuple[Tensor, ...]]:
    """(u, s, v) by the number that `index` gives each pair, wherever it is."""
    U, S, V = factors(layer)
    return {int(n): (U[:, i].clone(), S[i].clone(), V[:, i].clone()) for i, n in enumerate(layer.index)}


def layers_of(model: nn.Module) -> list[SSTLinear]:
    return [module for module in model.modules() if isinstance(module, SSTLinear)]


def assert_orthonormal(layer: SSTLinear, tolerance: float = 1e-5) -> None:
    for Q in factors(layer)[::2]:
        assert (Q.T @ Q - torch.eye(Q.shape[1], dtype=Q.dtype)).abs().max() < tolerance


def train(model: Any, optimizer: Any, tokens: Tensor, steps: range) -> None:
    for step in steps:
        ids = tokens.roll(step, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def prepared(small: Callable[..., Any], lr: float = 1e-2, seed: int = 3, **options: Any) -> tuple[Any, Any, Any]:
    model = convert(small("llama"), SST(**{**SHORT, **options})).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    return model, optimizer, step_hook(model, optimizer, steps=8, seed=seed)


# ---- check 1: where it starts


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_conversion_keeps_weights_and_outputs(name: str, small: Callable[..., Any], tokens: Tensor) -> None:
    dense = small(name)
    sites = {site.name: site.linear.weight.clone() for site in find_sites(dense)}
    model = convert(small(name), SST())
    for site, weight in sites.items():
        layer = model.get_submodule(site)
        assert (product(layer) - weight).abs().max() < 1e-5 * weight.norm()
        assert_orthonormal(layer)
        assert (layer.S >= 0).all()
        assert sorted(layer.index.tolist()) == list(range(min(weight.shape)))
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d_in, d_out", SHAPES)
def test_a_layer_starts_from_a_kaiming_uniform_weight(d_in: int, d_out: int) -> None:
    d_in, d_out = 8 * d_in, 8 * d_out
    torch.manual_seed(0)
    expected = nn.Linear(d_in, d_out, bias=False).weight
    torch.manual_seed(0)
    layer = SSTLinear(d_in, d_out, 5)
    assert (product(layer) - expected).abs().max() < 1e-5 * expected.norm()
    assert_orthonormal(layer)


def test_layers_from_the_meta_device_are_drawn(small: Callable[..., Any], tokens: Tensor) -> None:
    with torch.device("meta"):
        dense = small("llama")
    model = convert(dense, SST()).to_empty(device="cpu")
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:  # its buffers are no parameters: take them from a real one
            module.load_state_dict({})
            module.inv_freq.copy_(small("llama").model.rotary_emb.inv_freq)
    model.initialize_weights()
    for layer in layers_of(model):
        assert_orthonormal(layer)
        assert product(layer).abs().max() < layer.d_in**-0.5 + 1e-5
        assert product(layer).std() == pytest.approx((3 * layer.d_in) ** -0.5, rel=0.15)
    assert model(tokens).logits.isfinite().all()


def test_from_a_configuration_it_is_the_svd_of_the_usual_draw(small: Callable[..., Any]) -> None:
    config = convert(small("llama"), SST()).config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    dense = small("llama")
    for site in find_sites(dense):
        layer = model.get_submodule(site.name)
        assert (product(layer) - site.linear.weight).abs().max() < 1e-5 * site.linear.weight.norm()
        assert_orthonormal(layer)


def test_factors_from_a_file_stay_and_missing_ones_are_drawn(
    small: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    model, optimizer, _ = prepared(small)
    train(model, optimizer, tokens, range(3))
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    for layer, again in zip(layers_of(model), layers_of(body), strict=True):
        assert all(map(torch.equal, layer.state_dict().values(), again.state_dict().values()))
        assert layer.key == again.key, "the layers of a body draw as those of the whole model"


# ---- check 2: gradients


@pytest.mark.parametrize("enhanced", [True, False])
@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("d_in, d_out", SHAPES)
def test_gradients_are_products_of_the_dense_one_with_vectors(d_in: int, d_out: int, rank: int, enhanced: bool) -> None:
    layer = layer_of(d_in, d_out, rank, bias=True, enhanced=enhanced)
    U, S, V = factors(layer)
    x = numbers(2, 7, d_in).requires_grad_()
    dy = numbers(2, 7, d_out, seed=1)

    W, x_dense = product(layer).requires_grad_(), x.detach().clone().requires_grad_()
    expected = F.linear(x_dense, W, layer.bias.detach())
    expected.backward(dy)
    G = W.grad
    y = layer(x)
    y.backward(dy)

    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(x.grad, x_dense.grad, **close)
    torch.testing.assert_close(layer.S.grad, (U.T @ G @ V).diag(), **close)
    torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)), **close)
    factor = torch.ones(rank).double() if enhanced else S[:rank]
    for i in range(rank):
        torch.testing.assert_close(layer.U_active.grad[:, i], factor[i] * (G @ V[:, i]), **close)
        torch.testing.assert_close(layer.V_active.grad[:, i], factor[i] * (G.T @ U[:, i]), **close)
    assert layer.U_frozen.grad is None and layer.V_frozen.grad is None


def test_plain_autograd_gives_s_times_the_enhanced_gradient() -> None:
    layer = layer_of(12, 20, 5)
    U, S, V = (t.clone().requires_grad_() for t in factors(layer))
    x, dy = numbers(9, 12), numbers(9, 20, seed=1)
    (x @ V @ S.diag() @ U.T).backward(dy)
    layer(x).backward(dy)
    torch.testing.assert_close(U.grad[:, :5], S[:5] * layer.U_active.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(V.grad[:, :5], S[:5] * layer.V_active.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(S.grad, layer.S.grad, rtol=1e-10, atol=1e-10)


def test_with_true_gradients_autograds_own_check_passes() -> None:
    layer = layer_of(6, 5, 2, enhanced=False)
    layer.requires_grad_()
    x = numbers(3, 6).requires_grad_()
    parameters = {name: p for name, p in layer.named_parameters() if "frozen" not in name}
    f = lambda x, *p: torch.func.functional_call(layer, dict(zip(parameters, p, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, *parameters.values()))


def test_a_singular_value_of_zero_and_its_vectors_learn() -> None:
    layer = layer_of(12, 20, 5)
    layer.S.data[2] = 0
    layer(numbers(9, 12)).backward(numbers(9, 20, seed=1))
    for gradient in (layer.U_active.grad[:, 2], layer.V_active.grad[:, 2], layer.S.grad[2]):
        assert gradient.abs().max() > 0.1


def test_micro_batches_give_the_gradient_of_the_batch() -> None:
    layer = layer_of(12, 20, 5)
    x, dy = numbers(8, 12), numbers(8, 20, seed=1)
    layer(x).backward(dy)
    whole = [p.grad.clone() for p in layer.parameters() if p.requires_grad]
    layer.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        layer(x[half]).backward(dy[half])
    for parameter, expected in zip([p for p in layer.parameters() if p.requires_grad], whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)


def test_under_autocast_gradients_agree_to_bfloat16() -> None:
    layer = layer_of(64, 96, 16, bias=True).float()
    x, dy = numbers(50, 64, dtype=torch.float32), numbers(50, 96, seed=1, dtype=torch.float32)
    layer(x).backward(dy)
    exact = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    for name, gradient in exact.items():
        found = layer.get_parameter(name).grad
        assert found.dtype == torch.float32
        assert (found - gradient).norm() < 0.02 * gradient.norm(), name


# ---- check 8: the limit


def test_with_all_pairs_active_a_step_of_sgd_is_exact() -> None:
    """The limit: rank m, no hook; the dense layer's loss differentiated through its factors by autograd."""
    weight = numbers(20, 12)
    layer = layer_of(12, 20, 12, weight, enhanced=False)
    assert layer.U_frozen.numel() == layer.V_frozen.numel() == 0
    U, S, V = (t.clone().requires_grad_() for t in factors(layer))
    x, target = numbers(9, 12), numbers(9, 20, seed=1)
    F.mse_loss(F.linear(x, U @ S.diag() @ V.T), target).backward()

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    F.mse_loss(layer(x), target).backward()
    optimizer.step()
    for found, before in ((layer.U_active, U), (layer.S, S), (layer.V_active, V)):
        torch.testing.assert_close(found, before - 0.1 * before.grad, rtol=1e-10, atol=1e-12)


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


# ---- schedule


def test_the_schedule_rises_at_each_further_iteration() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    usual = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 7, 100, min_lr_rate=0.1).lr_lambdas[0]
    found = SST(interval=20, restart_warmup_steps=4).schedule(100, 7, 0.1)
    for step in range(101):
        rise = {0: 0.25, 1: 0.5, 2: 0.75}.get(step % 20, 1.0) if step >= 20 else 1.0
        assert found(step) == pytest.approx(rise * usual(step), abs=1e-12)
    plain = SST(interval=20, restart_warmup_steps=0).schedule(100, 0, 0.1)
    assert [plain(step) for step in (0, 20, 100)] == pytest.approx([1.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 5)), 0.1])


# ---- resuming, precision, merging


def test_draws_follow_the_runs_seed_the_first_the_methods(small: Callable[..., Any], tokens: Tensor) -> None:
    def after(steps: int, **options: Any) -> list[list[int]]:
        model, optimizer, _ = prepared(small, **options)
        train(model, optimizer, tokens, range(steps))
        return [layer.index.tolist() for layer in layers_of(model)]

    assert after(0, seed=3) == after(0, seed=4) != after(0, rank=0.25)
    model = convert(small("llama"), SST(**SHORT, seed=1))
    assert [layer.index.tolist() for layer in layers_of(model)] != after(0)
    assert after(3) == after(3) != after(3, seed=4)


@pytest.mark.parametrize("killed_at", [2, 3, 4])
def test_a_killed_run_goes_on_bit_for_bit_around_a_swap(killed_at: int, tmp_path: Path) -> None:
    """Swaps after steps 2, 4 and 6, a new SVD after 4; model, optimizer, scheduler and hook come back from files."""

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == killed_at:
                raise MemoryError("killed by the test")

    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs\n" for i in range(800)))
    recipe = Recipe(
        data=str(text),
        method="sst",
        rank=0.5,
        options={"interval": 2, "restart_warmup_steps": 1},
        vocab_size=300,
        sequence_length=16,
        batch_size=4,
        micro_batch_size=2,
        steps=6,
        warmup_steps=1,
        log_every=1,
        save_every=1,
        eval_every=0,
        lr=1e-2,
    )
    run.pretrain(recipe, tmp_path / "whole")
    with pytest.raises(MemoryError):
        run.pretrain(recipe, tmp_path / "killed", callbacks=[Kill()])
    run.pretrain(read_run(tmp_path / "killed"), tmp_path / "killed", resume=True)
    expected, found = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "killed"))
    assert all(map(torch.equal, expected.state_dict().values(), found.state_dict().values()))
    losses = [[r.get("loss_nats_per_token") for r in history(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1]


def test_in_bfloat16_vectors_keep_their_length(small: Callable[..., Any], tokens: Tensor) -> None:
    model = convert(small("llama").bfloat16(), SST(**SHORT)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step_hook(model, optimizer, steps=8)
    for step in range(5):
        train(model, optimizer, tokens, range(step, step + 1))
        for layer in layers_of(model):
            lengths = torch.cat([layer.U_active, layer.V_active]).float().pow(2).sum(0) / 2
            torch.testing.assert_close(lengths, torch.ones(layer.rank), rtol=0, atol=0.01)
            assert (layer.S >= 0).all()
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("d_in, d_out", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_merged_it_is_u_s_v_with_the_bias(d_in: int, d_out: int, bias: bool) -> None:
    layer: Any = SST(rank=5).build(Site("l.0.q", "l.*.q", 0, nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)))
    weight, b = SST(rank=5).merged(layer)
    torch.testing.assert_close(weight, product(layer), rtol=1e-12, atol=1e-12)
    assert (b is None) != bias
    x = numbers(3, d_in)
    torch.testing.assert_close(F.linear(x, weight, b), layer(x), rtol=1e-12, atol=1e-12)


def test_converted_trained_and_merged_the_model_says_the_same(small: Callable[..., Any], tokens: Tensor) -> None:
    model, optimizer, _ = prepared(small)
    train(model, optimizer, tokens, range(5))
    torch.testing.assert_close(merge(model)(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


# ---- refusals


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": 0}, "rank must be a positive integer, .* got 0"),
        ({"interval": 0}, "interval must be a positive integer, got 0"),
        ({"interval": 2.5}, "interval must be a positive integer, got 2.5"),
        ({"restart_warmup_steps": -1}, "restart_warmup_steps must be an integer of at least 0, got -1"),
        ({"interval": 10}, "restart_warmup_steps must be at most interval=10, .* got 20"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SST(**fields)


@pytest.mark.parametrize(
    "rank, message",
    [
        (17, r"rank must be at most 16, the singular values of model.layers.\*.self_attn.k_proj, got 17; give a table"),
        ({"mlp": 0.25}, "must have a pattern for model.layers.0.self_attn.q_proj"),
        ({".*": 0.25, "mlp": 4}, "'mlp' decides nothing"),
    ],
)
def test_ranks_that_do_not_fit_leave_the_model_dense(rank: Any, message: str, small: Callable[..., Any]) -> None:
    model = small("llama")
    with pytest.raises(ValueError, match=message):
        convert(model, SST(rank=rank))
    assert type(model) is type(small("llama")) and not layers_of(model)


def test_at_full_rank_no_warning_speaks_of_factors(small: Callable[..., Any]) -> None:
    model = convert(small("llama"), SST(rank={"k_proj|v_proj": 16, ".*": 32}))
    assert all(layer.U_frozen.numel() == 0 for layer in layers_of(model))


@pytest.mark.parametrize("optimizer", ["muon", "adafactor", "adamw"])
def test_any_optimizer_restarts_with_the_pairs(optimizer: str, small: Callable[..., Any], tokens: Tensor) -> None:
    model = convert(small("llama"), SST(**SHORT)).train()
    moving = lorank.optimizer(model, optimizer, lr=1e-2)
    step_hook(model, moving, steps=8)
    layers = layers_of(model)
    train(model, moving, tokens, range(1))
    assert all(any(m.any() for m in moments(moving, layer.U_active)) for layer in layers)
    train(model, moving, tokens, range(1, 2))  # other pairs
    for layer in layers:
        for p in (layer.U_active, layer.V_active):
            assert not any(moment.any() for moment in moments(moving, p))
            assert int(moving.state[p].get("step", 0)) == 0
        assert any(moment.any() for moment in moments(moving, layer.S))
    train(model, moving, tokens, range(2, 4))  # other pairs and a new SVD
    assert not any(moment.any() for layer in layers for moment in moments(moving, layer.S))
    before = [layer.U_active.detach().clone() for layer in layers]
    train(model, moving, tokens, range(4, 5))
    assert not any(torch.equal(layer.U_active, U) for layer, U in zip(layers, before, strict=True))


def test_projecting_optimizers_find_no_linear_layer(small: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="no linear layer whose gradient could be projected"):
        lorank.optimizer(convert(small("llama"), SST()), "galore", lr=1e-2)


def test_sharded_vectors_are_refused_before_the_first_step(small: Callable[..., Any], tokens: Tensor) -> None:
    model, optimizer, _ = prepared(small)
    layers_of(model)[0].S.device_mesh = "what a DTensor has"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"sst cannot exchange vectors that are sharded \(FSDP2\)"):
        train(model, optimizer, tokens, range(1))
