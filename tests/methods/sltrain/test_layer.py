"""SLTrain: its equation, limits, support and initial values."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorank import LowRank, Site, SLTrain, convert
from lorank.methods.sltrain import SLTrainLinear, draw_support, site_seed, support_size
from tests.methods.sltrain.conftest import layer, numbers


def sparse(made: SLTrainLinear) -> Tensor:
    """S entry by entry, from the places as rows and columns."""
    S = torch.zeros(made.B.weight.shape[0], made.A.weight.shape[1], dtype=made.A.weight.dtype)
    for place, value in zip(made.support.tolist(), made.values.tolist(), strict=True):
        S[place // S.shape[1], place % S.shape[1]] = value
    return S


# ---- the equation


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_and_its_gradients_are_the_papers_formulas(bias: bool) -> None:
    made = layer(bias=bias)
    if bias:
        nn.init.normal_(made.B.bias)
    x = numbers(3, 5, 10).requires_grad_()  # [batch, n, d_in]
    dy = numbers(3, 5, 14, seed=1)  # [batch, n, d_out]
    A, B = made.A.weight.detach(), made.B.weight.detach()
    W = 0.25 * torch.einsum("or,ri->oi", B, A) + sparse(made)

    y = made(x)
    expected = torch.einsum("oi,bni->bno", W, x.detach()) + (made.B.bias.detach() if bias else 0)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    y.backward(dy)
    G = torch.einsum("bno,bni->oi", dy, x.detach())
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(x.grad, torch.einsum("bno,oi->bni", dy, W), **close)
    torch.testing.assert_close(made.B.weight.grad, 0.25 * torch.einsum("oi,ri->or", G, A), **close)
    torch.testing.assert_close(made.A.weight.grad, 0.25 * torch.einsum("or,oi->ri", B, G), **close)
    rows, columns = made.support // 10, made.support % 10
    torch.testing.assert_close(made.values.grad, G[rows, columns], **close)
    if bias:
        torch.testing.assert_close(made.B.bias.grad, dy.sum((0, 1)), **close)


def test_gradients_agree_with_finite_differences() -> None:
    """Check 3: in x, A, B and v; and the gradients of the gradients, which nobody wrote down."""
    made = layer(6, 7, 3, nnz=9)
    operands = [p.detach().requires_grad_() for p in (made.A.weight, made.B.weight, made.values)]

    def function(x: Tensor, A: Tensor, B: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(made, {"A.weight": A, "B.weight": B, "values": values}, (x,))

    inputs = (numbers(2, 3, 6).requires_grad_(), *operands)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_in_single_precision_it_equals_a_dense_layer() -> None:
    """Check 4."""
    made = layer(64, 96, 16, nnz=200, dtype=torch.float32)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    trained = [x, made.A.weight, made.B.weight, made.values]
    rows, columns = made.support // 64, made.support % 64
    W = 0.25 * made.B.weight @ made.A.weight + torch.zeros(96, 64).index_put((rows, columns), made.values)
    dense, y = F.linear(x, W), made(x)
    torch.testing.assert_close(y, dense, rtol=1e-6, atol=1e-6)
    weights = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((out * weights).sum(), trained) for out in (y, dense))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(10,), (5, 10), (2, 3, 4, 10), (0, 10)])
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    made, x = layer(), numbers(*shape).requires_grad_()
    y = made(x)
    assert y.shape == (*shape[:-1], 14)
    torch.testing.assert_close(y, F.linear(x, 0.25 * made.B.weight @ made.A.weight + sparse(made)))
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_frozen_tensors_get_no_gradient_and_others_theirs() -> None:
    made, x = layer(), numbers(3, 10)
    made(x).sum().backward()
    expected = made.values.grad.clone()
    made.zero_grad()
    made.A.weight.requires_grad_(False)
    made.B.weight.requires_grad_(False)
    made(x).sum().backward()
    assert made.A.weight.grad is None and made.B.weight.grad is None
    assert torch.equal(made.values.grad, expected)
    made.values.requires_grad_(False)
    x.requires_grad_()
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, (0.25 * made.B.weight @ made.A.weight + sparse(made)).sum(0).expand(3, 10))


# ---- limits


def test_with_an_empty_support_it_is_the_low_rank_layer() -> None:
    site = Site("layers.0.q", "layers.*.q", 0, nn.Linear(12, 20, dtype=torch.float64))
    made: Any = SLTrain(rank=5, alpha=5, density=0).build(site)
    control: Any = LowRank(rank=5).build(site)
    control.load_state_dict(
        {"A.weight": made.A.weight, "B.weight": nn.init.normal_(made.B.weight), "B.bias": made.B.bias}
    )
    x = numbers(3, 7, 12)
    torch.testing.assert_close(made(x), control(x), rtol=1e-12, atol=1e-12)
    assert made.values.numel() == 0


def test_with_a_full_support_and_b_zero_it_is_the_dense_model(small: Callable[..., Any], tokens: Tensor) -> None:
    dense = small("llama").double()
    model = convert(small("llama").double(), SLTrain(density=1, rank=1))
    state = {
        f"{name}.values": p.flatten()
        for name, p in dense.named_modules()
        if isinstance(p, nn.Linear)
        for p in [p.weight]
    }
    model.load_state_dict({**dense.state_dict(), **state}, strict=False)
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-12, atol=1e-12)


# ---- the support


def test_the_support_has_no_place_twice_and_is_sorted() -> None:
    """Check 7."""
    support = draw_support(50, 40, 600, seed=3)
    assert support.dtype == torch.int64 and support.shape == (600,)
    assert (support.diff() > 0).all() and support[0] >= 0 and support[-1] < 2000
    assert torch.equal(draw_support(50, 40, 2000, seed=3), torch.arange(2000))


def test_the_support_is_uniform() -> None:
    """How often each of 36 places is among 9, in 4,000 draws: a quarter, within five standard deviations."""
    draws = torch.stack([draw_support(6, 6, 9, seed) for seed in range(4000)])
    counts = draws.flatten().bincount(minlength=36)
    deviation = math.sqrt(4000 * 0.25 * 0.75)
    assert (counts - 1000).abs().max() < 5 * deviation
    assert counts.float().std().item() == pytest.approx(deviation * math.sqrt(36 / 35), rel=0.4)


def test_the_support_depends_on_seed_and_name_alone(small: Callable[..., Any]) -> None:
    def supports(seed: int, support_seed: int) -> dict[str, Tensor]:
        dense = small("llama")
        torch.manual_seed(seed)
        return dict(convert(dense, SLTrain(support_seed=support_seed)).named_buffers())

    first, again, other = supports(1, 0), supports(2, 0), supports(1, 1)
    names = [name for name in first if name.endswith("support")]
    assert len(names) == 14
    for name in names:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    q, o = (first[f"model.layers.0.self_attn.{name}.support"] for name in ("q_proj", "o_proj"))
    assert not torch.equal(q, o) and not torch.equal(q, first["model.layers.1.self_attn.q_proj.support"])
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    draw_support(5, 5, 3, seed=0)
    assert torch.equal(torch.rand(1), before)


def test_the_seed_of_a_site_is_the_same_in_every_process() -> None:
    assert site_seed(3, "model.layers.7.mlp.up_proj") == 47717697354888833


def test_training_and_resetting_leave_the_support_as_it_is() -> None:
    """Check 3: after 100 steps."""
    made = layer(started=False)
    before = made.support.clone()
    optimizer, target = torch.optim.AdamW(made.parameters(), lr=0.02), numbers(14, 10, seed=2) / 3
    x, losses = numbers(64, 10), []
    for _ in range(100):
        losses.append((made(x) - x @ target.T).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(made.support, before)
    weights = {name: p.clone() for name, p in made.named_parameters()}
    made.reset_parameters()
    assert all(not torch.equal(weights[name], p) for name, p in made.named_parameters())
    assert torch.equal(made.support, before)


def test_a_support_that_came_from_a_file_stays(small: Callable[..., Any], tmp_path: Any) -> None:
    """Another version of torch may draw other permutations: the file is right."""
    model = convert(small("llama"), SLTrain())
    support = model.model.layers[0].mlp.up_proj.support
    support.copy_(torch.arange(len(support)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.layers[0].mlp.up_proj
    assert torch.equal(loaded.support, torch.arange(len(support)))
    assert loaded.support.dtype == torch.int64 and loaded.values.dtype == torch.bfloat16


def test_a_model_from_the_meta_device_has_its_support(small: Callable[..., Any]) -> None:
    with torch.device("meta"):
        model = convert(small("llama"), SLTrain())
    filled = model.to_empty(device="cpu")
    for module in filled.modules():
        if isinstance(module, SLTrainLinear):
            module.reset_parameters()
    expected = dict(convert(small("llama"), SLTrain()).named_buffers())
    assert all(torch.equal(b, expected[name]) for name, b in filled.named_buffers() if name.endswith("support"))


# ---- initial values


def test_at_the_start_the_weight_is_the_sparse_part_alone() -> None:
    """Check 2: exactly nnz non-zeros."""
    made = layer(64, 96, 8, started=False, nnz=support_size(0.03, 64, 96))
    weight, bias = SLTrain().merged(made)
    assert (made.B.weight @ made.A.weight).count_nonzero() == 0
    assert weight.count_nonzero() == 184 == math.floor(0.03 * 64 * 96)
    assert torch.equal(weight, sparse(made)) and bias is None


def test_initial_values_are_within_the_inverse_root_of_d_in() -> None:
    site = Site("layers.0.up", "layers.*.up", 0, nn.Linear(512, 1376))
    torch.manual_seed(0)
    made: Any = SLTrain(rank=128).build(site)
    for drawn in (made.A.weight.detach(), made.values.detach()):
        assert drawn.abs().max() <= 512**-0.5
        assert drawn.min() < -0.999 * 512**-0.5 and drawn.max() > 0.999 * 512**-0.5
        assert drawn.std().item() == pytest.approx(512**-0.5 / math.sqrt(3), rel=0.02)
    assert made.B.weight.count_nonzero() == made.B.bias.count_nonzero() == 0
    # output per unit of input: sqrt(density / 3)
    x = torch.randn(400, 512, generator=torch.Generator().manual_seed(0))
    assert made(x).std().item() == pytest.approx(math.sqrt(0.03 / 3), rel=0.03)


def test_at_the_start_a_has_no_gradient_while_b_and_v_have() -> None:
    """Check 8."""
    made = layer(started=False, nnz=1)
    made(numbers(6, 10)).backward(numbers(6, 14, seed=1))
    assert made.A.weight.grad.count_nonzero() == 0
    assert made.B.weight.grad.count_nonzero() == made.B.weight.numel() and made.values.grad.count_nonzero() == 1


def test_the_scale_is_alpha_over_each_projections_own_rank(small: Callable[..., Any]) -> None:
    block = convert(small("llama"), SLTrain(rank={"k_proj|v_proj": 4, ".*": 0.25}, alpha=2)).model.layers[0]
    assert block.self_attn.k_proj.scale == 0.5 and block.self_attn.k_proj.A.weight.shape == (4, 32)
    assert block.self_attn.q_proj.scale == 0.25 and block.self_attn.q_proj.A.weight.shape == (8, 32)


def test_a_bias_is_kept_where_the_dense_layer_had_one(small: Callable[..., Any]) -> None:
    block = convert(small("llama", attention_bias=True), SLTrain()).model.layers[0]
    assert block.self_attn.q_proj.B.bias.shape == (32,) and block.mlp.up_proj.B.bias is None
