"""SLTrain: sizes, memory and FLOPs, merging, and what is refused."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AutoModelForCausalLM

import lorank
from lorank import Site, SLTrain, accounting, convert
from lorank.architectures import llama_config
from lorank.checkpointing import POLICIES
from lorank.methods.sltrain import SLTrainLinear
from lorank.papers import formulas
from lorank.sizes import SIZES
from tests.methods.sltrain.conftest import layer, numbers

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
