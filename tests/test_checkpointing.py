"""What a block remembers and what it computes again, counted in numbers and floating-point operations.

Memory is a census: every storage that an operation of the forward pass gave birth to and that is still alive when only the
loss is held. It sees what autograd saves, what selective checkpointing caches, and anything else, without asking either.
The difference between a model of four blocks and one of three is what one block keeps.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
)

from lorank import (
    CoLA,
    CoLAM,
    LowRank,
    checkpoint,
    convert,
    keep_bottlenecks,
    keep_bottlenecks_and_attention,
)
from lorank.checkpointing import POLICIES, keep_nothing

D, D_FF, HEADS, N, R = 48, 112, 4, 20, 9
"""Chosen so that nd, nr, n d_ff, n h and n² h are all different."""


@pytest.fixture
def block_model(small: Callable[..., Any]) -> Callable[..., Any]:
    """A converted Llama with as many key as query heads, so that all seven ranks are R and attention is d wide."""

    def build(layers: int, method: Any = CoLA(rank=R), attention: str = "sdpa") -> Any:  # noqa: B008
        shape = {
            "hidden_size": D,
            "intermediate_size": D_FF,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
        }
        dense = small("llama", **shape, num_hidden_layers=layers, attn_implementation=attention)
        return convert(dense, method).train()

    return build


def a_sequence(batch: int = 1) -> Tensor:
    return torch.randint(3, 96, (batch, N), generator=torch.Generator().manual_seed(0))


# ---- memory


class Census(TorchDispatchMode):
    """Remembers every storage that an operation returns; weak references tell later which of them live."""

    def __init__(self) -> None:
        super().__init__()
        self.born: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.born.setdefault(StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self, model: nn.Module) -> Counter[int]:
        """Size in bytes -> how many storages of it live, other than the model's own."""
        own = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
        return Counter(
            size for reference, size in self.born.items() if reference not in own and not reference.expired()
        )


def kept_by(model: Any) -> Counter[int]:
    tokens = a_sequence()
    with Census() as census:
        loss = model(tokens, labels=tokens, use_cache=False).loss
    alive = census.alive(model)
    loss.backward()  # the graph was whole
    return alive


def kept_by_one_block(build: Callable[..., Any], policy: Any, **options: Any) -> Counter[int]:
    alive = []
    for layers in (3, 4):
        model = build(layers, **options)
        checkpoint(model, policy)
        alive.append(kept_by(model))
    three, four = alive
    assert not three - four
    return four - three


def floats(**counts: int) -> Counter[int]:
    """Sizes in bytes of single-precision tensors by their names: nd, nr, nh."""
    numel = {"nd": N * D, "nr": N * R, "nh": N * HEADS}
    return Counter({4 * numel[name]: count for name, count in counts.items()})


def test_cola_m_keeps_a_blocks_input_and_seven_bottlenecks(
    block_model: Callable[..., Any],
) -> None:
    assert kept_by_one_block(block_model, keep_bottlenecks) == floats(nd=1, nr=7)


def test_the_method_named_cola_m_keeps_the_same(block_model: Callable[..., Any]) -> None:
    three, four = (kept_by(block_model(layers, CoLAM(rank=R))) for layers in (3, 4))
    assert four - three == floats(nd=1, nr=7)


def test_linear_bottlenecks_are_kept_alike(block_model: Callable[..., Any]) -> None:
    assert kept_by_one_block(block_model, keep_bottlenecks, method=LowRank(rank=R)) == floats(nd=1, nr=7)


@pytest.mark.parametrize("name", ["llama", "opt"])  # without and with biases
def test_of_a_dense_block_only_narrowing_maps_are_kept(name: str, small: Callable[..., Any]) -> None:
    """Square maps, [n, 32] from [n, 32], and widening ones are recomputed; down, [n, 32] from [n, 80], is kept."""
    alive = []
    for layers in (3, 4):
        model = small(name, num_hidden_layers=layers, **({"num_key_value_heads": 4} if name == "llama" else {})).train()
        checkpoint(model, keep_bottlenecks)
        alive.append(kept_by(model))
    assert alive[1] - alive[0] == Counter({4 * N * 32: 2})  # the block's input, and down


def test_kept_attention_adds_its_output_and_logsumexp(block_model: Callable[..., Any]) -> None:
    assert kept_by_one_block(block_model, keep_bottlenecks_and_attention) == floats(nd=2, nr=7, nh=1)


def test_block_checkpointing_keeps_the_input_of_a_block_only(block_model: Callable[..., Any]) -> None:
    assert kept_by_one_block(block_model, keep_nothing) == floats(nd=1)


def test_without_a_policy_both_sides_of_activations_are_kept(block_model: Callable[..., Any]) -> None:
    kept = kept_by_one_block(block_model, None)
    assert kept[4 * N * R] == 14  # A x and silu(A x)
    assert sum(size * count for size, count in kept.items()) > 4 * (17 * N * D + 14 * N * R)


def test_no_score_matrix_survives_when_attention_is_recomputed(block_model: Callable[..., Any]) -> None:
    scores = 4 * N * N * HEADS
    assert kept_by_one_block(block_model, None, attention="eager")[scores] >= 1
    assert kept_by_one_block(block_model, keep_bottlenecks, attention="eager") == floats(nd=1, nr=7)


def test_of_every_second_block_only_the_bottlenecks_are_kept(block_model: Callable[..., Any]) -> None:
    full = kept_by_one_block(block_model, None)
    thin = floats(nd=1, nr=7)
    alive = []
    for layers in (2, 4):
        model = block_model(layers)
        checkpoint(model, keep_bottlenecks, every=2)
        alive.append(kept_by(model))
    # the input of a checkpointed block may be one that its neighbour keeps anyway, hence counted in bottlenecks
    two_more = alive[1] - alive[0]
    assert two_more[4 * N * R] == full[4 * N * R] + thin[4 * N * R] == 14 + 7
    assert two_more[4 * N * D_FF] == full[4 * N * D_FF]


def test_autograds_hooks_see_one_tensor_per_block(block_model: Callable[..., Any]) -> None:
    """What autograd itself saves for a block under the policy is the block's input [1, n, d]; the rest is the cache's."""
    seen = []
    for layers in (3, 4):
        model = block_model(layers)
        checkpoint(model, keep_bottlenecks)
        shapes: list[tuple[int, ...]] = []
        tokens = a_sequence()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, shapes=shapes: (shapes.append(tuple(t.shape)), t)[1], lambda t: t
        ):
            model(tokens, labels=tokens, use_cache=False).loss.backward()
        seen.append(Counter(shapes))
    per_block = seen[1] - seen[0]
    assert per_block[1, N, D] == 1
    assert not any(shape[-1:] in ((R,), (D_FF,)) for shape in per_block)


# ---- floating-point operations


def flash_forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, n, width = query  # Q K' and scores V: 2 n² width each
    return 4 * batch * heads * n * n * width


COUNT_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash_forward}
"""The counter knows CUDA's fused attention, not the CPU's; its backward is left out, the same in every run."""


def backward_flops(model: Any, batch: int = 1) -> int:
    tokens = a_sequence(batch)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    with FlopCounterMode(display=False, custom_mapping=COUNT_ATTENTION) as counter:
        loss.backward()
    return counter.get_total_flops()


def recomputed(model: Any, policy: Any, batch: int = 1, **options: Any) -> int:
    checkpoint(model, None)
    without = backward_flops(model, batch)
    checkpoint(model, policy, **options)
    return backward_flops(model, batch) - without


B_FACTORS = 2 * N * R * (4 * D + 2 * D_FF)
A_FACTORS = 2 * N * R * (4 * D + 2 * D + D_FF)
ATTENTION = 4 * N**2 * D


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (keep_bottlenecks, B_FACTORS + ATTENTION),
        (keep_nothing, A_FACTORS + B_FACTORS + ATTENTION),
    ],
)
def test_a_block_computes_again_exactly_what_the_docstring_says(
    policy: Any, expected: int, attention: str, batch: int, block_model: Callable[..., Any]
) -> None:
    layers = 3
    assert recomputed(block_model(layers, attention=attention), policy, batch) == layers * batch * expected


def test_with_attention_kept_only_the_b_factors_run_again(block_model: Callable[..., Any]) -> None:
    assert recomputed(block_model(3), keep_bottlenecks_and_attention) == 3 * B_FACTORS


def test_every_other_block_is_recomputed(block_model: Callable[..., Any]) -> None:
    assert recomputed(block_model(4), keep_bottlenecks, every=2) == 2 * (B_FACTORS + ATTENTION)
    assert recomputed(block_model(3), keep_bottlenecks, every=3) == B_FACTORS + ATTENTION
    assert recomputed(block_model(3), keep_bottlenecks, every=1) == 3 * (B_FACTORS + ATTENTION)


def test_none_turns_checkpointing_off_and_policies_switch(block_model: Callable[..., Any]) -> None:
    model = block_model(2, CoLAM(rank=R))
    assert model.is_activation_checkpointing
    assert recomputed(model, keep_nothing) == 2 * (A_FACTORS + B_FACTORS + ATTENTION)
    assert recomputed(model, keep_bottlenecks) == 2 * (B_FACTORS + ATTENTION)
    assert recomputed(model, None) == 0
    assert not model.is_activation_checkpointing


# ---- the same numbers


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy])
@pytest.mark.parametrize(
    "method", [CoLA(rank=R), CoLA(rank=R, nonlinearity="low-rank"), LowRank(rank=R), None], ids=str
)
def test_loss_and_gradients_are_bitwise_those_without(
    policy: str, method: Any, block_model: Callable[..., Any], small: Callable[..., Any]
) -> None:
    model = block_model(3, method) if method else small("llama").train()
    tokens = a_sequence(2)

    def step() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    expected_loss, expected = step()
    checkpoint(model, POLICIES[policy])
    loss, gradients = step()
    assert torch.equal(loss, expected_loss)
    assert all(map(torch.equal, gradients, expected))


def test_dropout_is_drawn_the_same_when_a_block_runs_again(architectures: Any) -> None:
    model = convert(architectures["gpt2"].dense(resid_pdrop=0.5), CoLA()).train()
    tokens = a_sequence(2)
    gradients = []
    for policy in (None, keep_bottlenecks):
        checkpoint(model, policy)
        model.zero_grad()
        torch.manual_seed(0)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_evaluation_and_cached_generation_still_work(small: Callable[..., Any]) -> None:
    model = convert(small("llama"), CoLA())
    tokens = a_sequence()
    expected = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    checkpoint(model, keep_bottlenecks)
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)


# ---- refusals


@pytest.mark.parametrize("every", [0, -1])
def test_every_must_be_positive(every: int, small: Callable[..., Any]) -> None:
    model = small("llama")
    with pytest.raises(ValueError, match=f"every must be a positive integer, got {every}"):
        checkpoint(model, keep_bottlenecks, every=every)
    assert not model.is_activation_checkpointing


def test_a_model_without_blocks_to_checkpoint_is_refused(small: Callable[..., Any]) -> None:
    for model in (nn.Sequential(nn.Linear(4, 4)), small("llama").model.layers[0]):
        with pytest.raises(ValueError, match=f"blocks that transformers can checkpoint, got {type(model).__name__}"):
            checkpoint(model, keep_bottlenecks)


def test_a_policy_by_name_is_refused_with_the_way_to_it(small: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="POLICIES"):
        checkpoint(small("llama"), "bottlenecks")


def test_every_is_an_integer(small: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"every must be a positive integer, got 1\.5"):
        checkpoint(small("llama"), keep_bottlenecks, every=1.5)  # type: ignore[arg-type]


def test_switching_policies_leaves_no_hooks_behind(small: Callable[..., Any]) -> None:
    model = small("llama")
    for policy in (*POLICIES.values(), keep_bottlenecks):
        checkpoint(model, policy)
    assert not any(module._forward_hooks for module in model.modules())


def test_attention_that_cannot_be_kept_is_not_promised(architectures: Any) -> None:
    config = architectures["llama"].config()
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="attn_implementation must be 'sdpa' to keep attention outputs, got 'eager'"):
        checkpoint(eager, keep_bottlenecks_and_attention)
    assert not eager.is_activation_checkpointing
    dropping = AutoModelForCausalLM.from_config(architectures["llama"].config(attention_dropout=0.1))
    with pytest.warns(UserWarning, match=r"attention dropout is 0\.1"):
        checkpoint(dropping, keep_bottlenecks_and_attention)
