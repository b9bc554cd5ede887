"""SLTrain against its paper: equation, gradients, support, initial values, sizes, what is kept, what it costs."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AutoModelForCausalLM

import lorank
from lorank import LowRank, Site, SLTrain, accounting, convert
from lorank.architectures import llama_config
from lorank.checkpointing import POLICIES
from lorank.methods.sltrain import SLTrainLinear, draw_support, site_seed, support_size
from lorank.papers import formulas
from lorank.sizes import SIZES

PUBLISHED = {  # density, entries of all supports
    "60m": (0.03, 758_888),
    "130m": (0.03, 2_547_972),
    "350m": (0.03, 9_071_400),
    "1b": (0.03, 36_237_240),
    "7b": (0.05, 323_800_128),
}


def empty(size: str, **changes: Any) -> Any:
    """The paper's model of a size, without memory for its weights."""
    config = llama_config(size)
    config.update(changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return convert(model, SLTrain(rank=SIZES[size].rank, density=PUBLISHED[size][0]))


def layer(
    d_in: int = 10,
    d_out: int = 14,
    rank: int = 4,
    *,
    started: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> SLTrainLinear:
    """One layer; `started`: with a B that is no longer zero."""
    torch.manual_seed(0)
    options = {"scale": 0.25, "nnz": 21, "seed": 5, **options}
    made = SLTrainLinear(d_in, d_out, rank, dtype=dtype, **options)
    if started:
        nn.init.normal_(made.B.weight, std=0.3)
    return made


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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


def test_the_seed_of_a_site_is_the_same_in_another_process(fresh_python: Callable[..., str]) -> None:
    program = "from lorank.methods.sltrain import site_seed; print(site_seed(3, 'model.layers.7.mlp.up_proj'))"
    assert int(fresh_python(program)) == site_seed(3, "model.layers.7.mlp.up_proj")


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


# ---- sizes


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_papers_models_have_the_papers_supports(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 1; nothing is drawn or allocated on the meta device, not even a support."""
    monkeypatch.setattr("lorank.methods.sltrain.draw_support", None)
    model = empty(size)
    _, places = PUBLISHED[size]
    assert sum(p.numel() for name, p in model.named_parameters() if name.endswith("values")) == places
    supports = [b for name, b in model.named_buffers() if name.endswith("support")]
    assert sum(b.numel() for b in supports) == places
    assert all(t.is_meta for t in [*model.parameters(), *supports])


@pytest.mark.parametrize(("d_out", "nnz"), [(512, 7_864), (1376, 21_135)])
def test_the_number_of_entries_is_rounded_down_for_each_matrix(d_out: int, nnz: int) -> None:
    site = Site("q", "q", 0, nn.Linear(512, d_out, bias=False, device="meta"))
    made: Any = SLTrain(rank=128).build(site)
    assert len(made.values) == len(made.support) == nnz
    assert sum(p.numel() for p in made.parameters()) == 128 * (512 + d_out) + nnz


@pytest.mark.parametrize(("size", "gigabytes"), [("60m", 0.267), ("1b", 4.163)])
def test_memory_of_weights_moments_and_indices_is_the_papers(size: str, gigabytes: float) -> None:
    """Check 6: 6 bytes per parameter in bf16, 8 per index."""
    (_, places), model = PUBLISHED[size], empty(size)
    parameters = model.num_parameters()
    memory = accounting.memory_estimate(model, batch=1, sequence_length=8)
    assert memory.weights_bytes + memory.optimizer_bytes == 6 * parameters + 8 * places
    assert (memory.weights_bytes + memory.optimizer_bytes) / 1e9 == pytest.approx(gigabytes, abs=5e-4)
    assert memory.gradients_bytes == 2 * parameters


def test_the_optimizer_keeps_nothing_for_the_support(small: Callable[..., Any], tokens: Tensor) -> None:
    model = convert(small("llama"), SLTrain()).train()
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert sum(t.numel() for t in moments) == 2 * sum(p.numel() for p in model.parameters())
    assert not any(name.endswith("support") for name, _ in model.named_parameters())


# ---- what is kept for backward, and what lives for moments


def kept(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    tensors: list[Tensor] = []
    with saved_tensors_hooks(lambda t: (tensors.append(t), t)[1], lambda t: t):
        y = function(x)
    return y, tensors


def test_no_matrix_of_the_dense_layers_size_is_kept() -> None:
    """Check 5: x, B, s A, v and I."""
    made, x = layer(64, 96, 8, nnz=50), numbers(2, 16, 64).requires_grad_()
    _, tensors = kept(made, x)
    assert sorted(tuple(t.shape) for t in tensors) == [(2, 16, 64), (8, 64), (50,), (50,), (96, 8)]
    assert {t.data_ptr() for t in tensors} >= {t.data_ptr() for t in (x, made.B.weight, made.values, made.support)}


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, as it imports Inductor
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_no_such_matrix_is_kept_by_a_compiler_either(backend: str) -> None:
    """Compilers share equal expressions between forward and backward, and W is one; the second is Inductor's partition."""
    torch._dynamo.reset()
    made, x = layer(64, 96, 8, nnz=50), numbers(2, 16, 64).requires_grad_()
    expected = torch.autograd.grad(made(x).square().sum(), [x, *made.parameters()])
    y, tensors = kept(torch.compile(made, fullgraph=True, backend=backend), x)
    assert max(t.numel() for t in tensors) == x.numel() < 64 * 96
    found = torch.autograd.grad(y.square().sum(), [x, *made.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


class Alive(TorchDispatchMode):
    """The largest number of tensors of `numel` elements that operations made and that lived at one time."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.made, self.peak = numel, {}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == self.numel:
            self.made[out.untyped_storage()._cdata] = StorageWeakRef(out.untyped_storage())
        self.made = {key: ref for key, ref in self.made.items() if not ref.expired()}
        self.peak = max(self.peak, len(self.made))
        return out


def test_at_most_two_dense_matrices_exist_at_a_time() -> None:
    """Check 5."""
    made, x = layer(64, 96, 8, nnz=50), numbers(2, 16, 64).requires_grad_()
    with Alive(64 * 96) as alive:
        y = made(x)
        assert alive.peak == 2
        dy = torch.ones_like(y)  # an operation, after which the dead are counted out
        assert not alive.made
        alive.peak = 0
        y.backward(dy)
        assert alive.peak == 2
        y.sum()
        assert not alive.made


def keep_all_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    product = op is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE


def loss_and_gradients(model: Any, tokens: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("rank", [8, 40])
@pytest.mark.parametrize("policy", [*filter(None, POLICIES.values()), keep_all_products])
def test_checkpointing_changes_no_bit_even_if_products_are_kept(
    policy: Any, rank: int, small: Callable[..., Any], tokens: Tensor
) -> None:
    """A rank above the width makes W = B A the output of a map narrower than its input, which policies keep."""
    wide = (
        pytest.warns(UserWarning, match="not smaller than the dense layer") if rank > 32 else contextlib.nullcontext()
    )
    with wide:
        model = convert(small("llama"), SLTrain(rank={"up_proj": rank, ".*": 4}))
    for made in filter(lambda m: isinstance(m, SLTrainLinear), model.modules()):
        nn.init.normal_(made.B.weight, std=0.1)
    model.train()
    plain = loss_and_gradients(model, tokens)
    lorank.checkpoint(model, policy)
    assert all(map(torch.equal, loss_and_gradients(model, tokens), plain))


def test_compiled_and_checkpointed_it_has_the_same_gradients(small: Callable[..., Any], tokens: Tensor) -> None:
    torch._dynamo.reset()
    model = convert(small("llama"), SLTrain()).train()
    plain = loss_and_gradients(model, tokens)
    lorank.checkpoint(model, lorank.keep_bottlenecks)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, expected in zip(loss_and_gradients(compiled, tokens), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_under_autocast_it_computes_and_keeps_half_precision() -> None:
    made, x = layer(64, 96, 8, nnz=50, bias=True, dtype=torch.float32), numbers(4, 64).float().requires_grad_()
    exact = made(x)
    exact.sum().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in made.parameters())]
    x.grad = None
    made.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y, tensors = kept(made, x)
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in tensors} == {torch.bfloat16, torch.int64}
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    y.sum().backward()
    for found, gradient in zip([x.grad, *(p.grad for p in made.parameters())], expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, gradient, rtol=0.05, atol=0.1)


def test_gradients_of_micro_batches_add_up_to_the_batchs() -> None:
    made, x, dy = layer(), numbers(8, 10), numbers(8, 14, seed=1)
    made(x).backward(dy)
    whole = [p.grad.clone() for p in made.parameters()]
    made.zero_grad()
    for part in (slice(0, 3), slice(3, 8)):
        made(x[part]).backward(dy[part])
    for p, expected in zip(made.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-12)


# ---- cost


def test_flops_beyond_the_dense_block() -> None:
    """Check 9, by the counter, on a block of the 1B model: the paper's 24 d² r + 18 d d_ff r are the backward pass alone
    (W again, and two gradients); forming W in the forward pass is a third of that once more."""
    d, f, r, n = 2048, 5461, 512, 256
    one, two = (accounting.measure_flops(empty("1b", num_hidden_layers=k), sequence_length=n) for k in (1, 2))
    dense = formulas.block_forward_flops("dense", d, f, r, n)
    forward, backward = two.forward - one.forward - dense, two.backward - one.backward - 2 * dense
    assert backward == 24 * d * d * r + 18 * d * f * r == 154_612_531_200
    assert forward == 8 * d * d * r + 6 * d * f * r == backward // 3
    assert two.forward - one.forward == formulas.block_forward_flops("sltrain", d, f, r, n)


def test_the_overhead_does_not_depend_on_the_number_of_tokens() -> None:
    found = []
    for n in (16, 64):
        flops = accounting.measure_flops(empty("60m", num_hidden_layers=1), sequence_length=n)
        dense = formulas.block_forward_flops("dense", 512, 1376, 128, n) + 2 * n * 512 * 32_000  # and the head
        found.append(flops.total - 3 * dense)
    assert found[0] == found[1] == 32 * 512**2 * 128 + 24 * 512 * 1376 * 128
    model = empty("60m", num_hidden_layers=1)
    per_token = [accounting.flops_per_token(model, 16, batch=batch) for batch in (1, 4)]
    assert per_token[0] - per_token[1] == found[0] / 16 - found[0] / 64


# ---- merging, and what is refused


def test_merged_weights_can_be_trained_on(small: Callable[..., Any], tokens: Tensor) -> None:
    model = convert(small("gpt2"), SLTrain())
    dense = lorank.merge(model)
    assert all(p.requires_grad for p in dense.parameters())
    torch.testing.assert_close(dense(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": math.inf}, "alpha must be a positive number, got inf"),
        ({"alpha": "32"}, "alpha must be a positive number, got '32'"),
        ({"density": -0.1}, "density must be a number from 0 to 1, got -0.1"),
        ({"density": 3}, "density must be a number from 0 to 1, got 3"),
        ({"density": math.nan}, "density must be a number from 0 to 1, got nan"),
        ({"density": True}, "density must be a number from 0 to 1, got True"),
        ({"support_seed": 0.5}, "support_seed must be an integer, got 0.5"),
        ({"rank": 0}, "rank must be a positive integer, .* got 0"),
    ],
)
def test_settings_without_sense_are_refused_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SLTrain(**settings)
    assert "\n" not in str(caught.value)


def test_a_rank_table_without_use_leaves_the_model_dense(small: Callable[..., Any]) -> None:
    model = small("llama")
    with pytest.raises(ValueError, match="'nowhere' decides nothing"):
        convert(model, SLTrain(rank={"nowhere": 4, ".*": 8}))
    assert not any(isinstance(module, SLTrainLinear) for module in model.modules())


def test_a_layer_shows_its_shape_when_printed() -> None:
    assert "d_in=10, d_out=14, rank=4, nnz=21, scale=0.25" in repr(layer())
