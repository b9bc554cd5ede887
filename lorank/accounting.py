"""What training costs: parameters, FLOPs and bytes, in closed form and measured on the model itself.

The closed forms are those of the papers, for one Llama block with its seven projections on a sequence of n tokens; a
multiply-add counts as two floating-point operations (FLOPs). The measurements take any transformers model and need no
memory for its weights: they run a twin of it whose tensors have shapes but no data.
"""

import contextlib
import copy
import gc
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lorank.conversion import blocks
from lorank.parametrization import SHARED

# ---------------------------------------------------------------------------------------------------------------------
# Closed forms: d = hidden size, d_ff = intermediate size, r = rank, n = tokens of a sequence
# ---------------------------------------------------------------------------------------------------------------------

Method = Literal["dense", "cola", "relora", "sltrain", "galore"]


def dense_parameters(vocab_size: int, d: int, d_ff: int, layers: int) -> int:
    """Parameters of an untied Llama: 2 V d + L (4 d² + 3 d d_ff + 2 d) + d.

    >>> dense_parameters(32_000, 512, 1376, 8)
    58073600
    """
    return 2 * vocab_size * d + layers * (4 * d * d + 3 * d * d_ff + 2 * d) + d


def cola_parameters(vocab_size: int, d: int, d_ff: int, layers: int, r: int) -> int:
    """The same with CoLA in all seven projections: 2 V d + L (8 d r + 3 r (d + d_ff) + 2 d) + d.

    >>> cola_parameters(32_000, 512, 1376, 8, 128)
    42770944
    """
    return 2 * vocab_size * d + layers * (8 * d * r + 3 * r * (d + d_ff) + 2 * d) + d


def crnet_parameters(vocab_size: int, d: int, d_ff: int, layers: int, r: int) -> int:
    """With CR-Net: 2 V d + L 2 d + d + (4 d² + 3 d d_ff) + (L - 1) (11 d r + 3 d_ff r + 7) (arXiv 2509.18993).

    >>> crnet_parameters(32_000, 2048, 5461, 24, 448)
    582441057
    """
    first, later = 4 * d * d + 3 * d * d_ff, 11 * d * r + 3 * d_ff * r + 7
    return 2 * vocab_size * d + layers * 2 * d + d + first + (layers - 1) * later


def block_forward_flops(method: Method, d: int, d_ff: int, r: int, n: int) -> int:
    """Forward FLOPs of one block on one sequence (arXiv 2502.10940, table of compute; re-derived)."""
    dense = 8 * n * d * d + 6 * n * d * d_ff
    attention = 4 * n * n * d
    factors = 16 * n * d * r + 6 * n * r * (d + d_ff)
    rebuilt = 8 * d * d * r + 6 * d * d_ff * r  # SLTrain forms W = B A once per call
    return attention + {
        "dense": dense,
        "cola": factors,
        "relora": dense + factors,
        "sltrain": dense + rebuilt,
        "galore": dense,
    }[method]  # fmt: skip


def block_training_flops(method: Method, d: int, d_ff: int, r: int, n: int) -> int:
    """Forward and backward FLOPs of one block on one sequence (arXiv 2502.10940, table of compute; re-derived).

    Backward is twice forward, but ReLoRA's frozen weights need no gradient, and GaLore adds the projection of
    gradients, down and up. What SLTrain and GaLore add does not depend on n: it is paid per call and per optimizer
    step.

    >>> block_training_flops("dense", 512, 1376, 128, 256), block_training_flops("cola", 512, 1376, 128, 256)
    (5259657216, 2321547264)
    """
    forward = block_forward_flops(method, d, d_ff, r, n)
    if method == "relora":
        return 3 * forward - (8 * n * d * d + 6 * n * d * d_ff)
    return 3 * forward + (16 * d * d * r + 12 * d * d_ff * r if method == "galore" else 0)


def break_even_ratio(d: int, d_ff: int) -> float:
    """r / d below which CoLA costs less than dense: (24 d² + 18 d d_ff) / (48 d + 18 (d + d_ff)) / d.

    >>> round(break_even_ratio(512, 1376), 4), round(break_even_ratio(2048, 5461), 4)
    (0.6328, 0.6316)
    """
    return (24 * d * d + 18 * d * d_ff) / (48 * d + 18 * (d + d_ff)) / d


def recompute_flops(scheme: Literal["blocks", "cola-m", "cola-m authors"], d: int, r: int, n: int) -> float:
    """FLOPs that backward spends on one block's forward pass again, at d_ff = 2.5 d (arXiv 2502.10940, section 4).

    "blocks" is vanilla checkpointing of a dense block, 23 n d² + 4 n² d. CoLA-M is quoted with 18.5 n d r + 4 n² d,
    half of a CoLA block's factors; the authors' code re-runs A as well and spends 37 n d r + 4 n² d. For what ours
    spends see `bottleneck_recompute_flops`.

    >>> round(recompute_flops("blocks", 2048, 512, 256) / recompute_flops("cola-m", 2048, 512, 256), 3)
    4.585
    """
    products = {"blocks": 23 * n * d * d, "cola-m": 18.5 * n * d * r, "cola-m authors": 37 * n * d * r}
    return products[scheme] + 4 * n * n * d


def bottleneck_recompute_flops(d: int, d_ff: int, r: int, n: int) -> int:
    """What `lorank.keep_bottlenecks` re-runs per block, at any d_ff: 2 n r (4 d + 2 d_ff) + 4 n² d.

    The B factors of q, k, v, o (d wide) and gate, up (d_ff wide), and attention. Down's B is not re-run: the backward
    pass needs its input, not its output. At d_ff = 2.5 d that is 18 n d r + 4 n² d, a little below the paper's 18.5.
    """
    return 2 * n * r * (4 * d + 2 * d_ff) + 4 * n * n * d


def block_activations(
    scheme: Literal["dense", "blocks", "cola", "cola-m"], d: int, r: int, n: int, heads: int
) -> float:
    """Numbers that one block keeps for backward at d_ff = 2.5 d (arXiv 2502.10940, table of memory).

    The 2 n² heads are the scores and their softmax, absent with fused attention.
    """
    scores = 2 * n * n * heads
    return {
        "dense": 20 * n * d + scores,
        "blocks": n * d,
        "cola": 17.5 * n * d + scores + 14 * n * r,
        "cola-m": 2 * n * d + 7 * n * r,
    }[scheme]


def training_state_bytes(parameters: int, *, weights: int = 2, gradients: int = 2, moments: int = 4) -> int:
    """Bytes of weights, gradients and Adam's two moments; 8 per parameter in pure bf16, as in the paper's memory
    column."""
    return parameters * (weights + gradients + moments)


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


class Parameters(NamedTuple):
    """How many numbers a model holds; what is shared counts once."""

    total: int
    trainable: int
    blocks: int
    """Inside the repeated blocks, or shared by them; the rest is embeddings, head and final norm."""


class Flops(NamedTuple):
    """FLOPs of one training call: matrix products and attention, the latter in full also when causal."""

    forward: int
    backward: int
    recompute: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recompute


class Saved(NamedTuple):
    """What a forward pass leaves for backward, parameters not counted."""

    bytes: int
    shapes: list[tuple[int, ...]]
    """Of each storage that stays, as one of the tensors that look at it."""


class Memory(NamedTuple):
    """Bytes of training on one device."""

    weights_bytes: int
    """Parameters, and buffers that are saved with them."""
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: float
    """Not a number where it is unknown: mixtures of experts."""

    @property
    def total_bytes(self) -> float:
        return sum(self)


def shared_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of what the blocks of a converted model share."""
    return [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2].startswith(SHARED)]


def count_parameters(model: nn.Module) -> Parameters:
    """Counts over distinct parameters; works on the meta device."""

    def total(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    inside = {parameter for _, _, block in blocks(model) for parameter in block.parameters()}
    inside |= {p for _, module in shared_modules(model) for p in module.parameters()}
    return Parameters(total(model.parameters()), total(p for p in model.parameters() if p.requires_grad), total(inside))


def _twin(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shape but no data; call it inside a FakeTensorMode. Its device is the CPU."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo).train()


def _has_experts(model: nn.Module) -> bool:
    """Whether blocks hold experts, which transformers keeps in one tensor [experts, d_out, d_in]."""
    return any(parameter.ndim == 3 for _, _, block in blocks(model) for parameter in block.parameters())


def _example(batch: int, sequence_length: int) -> dict[str, Tensor]:
    ids = torch.zeros(batch, sequence_length, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * sdpa_flop_count(
        q, k, v
    )  # as the closed forms; that flash attention forms the scores again is not counted


CPU_ATTENTION = {  # missing in torch's own table of FLOPs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@contextlib.contextmanager
def _told_as(what: str) -> Iterator[None]:
    """ValueError for modelling code that cannot run without data, or on such a shape."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model cannot be {what} without its data: {reason}") from error


def measure_flops(model: nn.Module, *, batch: int = 1, sequence_length: int = 256) -> Flops:
    """Count the FLOPs of a causal language model's training call, [batch, sequence_length] tokens, head and loss
    included.

    Runs a data-free twin under PyTorch's counter; recomputation is what checkpointing adds to the backward pass.

    Raises:
        ValueError: modelling code that looks into the data, or a shape it cannot run.
    """

    def count(model: nn.Module) -> tuple[int, int]:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            loss = model(**_example(batch, sequence_length)).loss
            forward = counter.get_total_flops()
            loss.backward()
        return forward, counter.get_total_flops() - forward

    with FakeTensorMode(), _told_as("counted"):
        twin = _twin(model)
        if _has_experts(twin):  # the grouped product, the default, takes bf16 only where there are no data
            twin.set_experts_implementation("batched_mm")  # type: ignore[operator]
        forward, backward = count(twin)
        recompute = 0
        if getattr(twin, "is_activation_checkpointing", False):
            twin.activation_checkpointing_disable()  # type: ignore[operator]
            plain = count(twin)[1]
            backward, recompute = plain, backward - plain
    return Flops(forward, backward, recompute)


def flops_per_token(model: nn.Module, sequence_length: int, *, batch: int = 1) -> float:
    """Training FLOPs per token, forward and backward, recomputation not counted: the numerator of MFU (arXiv
    2204.02311). The batch matters where a method works on its weights once per call, as SLTrain does."""
    found = measure_flops(model, batch=batch, sequence_length=sequence_length)
    return (found.forward + found.backward) / (batch * sequence_length)


def measure_saved(model: nn.Module, inputs: dict[str, Tensor], *, autocast: bool = False) -> Saved:
    """What a model keeps alive between its forward and its backward pass, from the tensors themselves.

    Two sources together: autograd's saved tensors, seen by hooks; and everything else that is alive afterwards and was
    not before, seen by the garbage collector: the inputs of checkpointed blocks and the cache of selective
    checkpointing, which hooks do not see. One storage counts once, parameters, buffers and inputs not at all.
    """
    known = {_storage(t) for t in [*model.parameters(), *model.buffers(), *inputs.values()]}
    known |= {_storage(t) for t in _alive()}
    found: dict[int, tuple[int, tuple[int, ...]]] = {}

    def note(tensor: Tensor) -> None:
        if _storage(tensor) not in known:
            found.setdefault(_storage(tensor), (tensor.untyped_storage().nbytes(), tuple(tensor.shape)))

    def pack(tensor: Tensor) -> Tensor:
        note(tensor)
        return tensor.detach()  # a node that held its own output would never be freed

    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=autocast)  # its cache of weights ends with it
    with saved_tensors_hooks(pack, lambda tensor: tensor), bf16:
        loss = model(**inputs).loss  # noqa: F841 (keeps the graph alive)
    for tensor in _alive():
        note(tensor)
    return Saved(sum(size for size, _ in found.values()), [shape for _, shape in found.values()])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _alive() -> list[Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.layout is torch.strided]


def memory_estimate(
    model: nn.Module,
    *,
    optimizer_bytes: int | None = None,
    batch: int,
    sequence_length: int,
    autocast: bool = False,
) -> Memory:
    """Bytes of training `model` on micro-batches [batch, sequence_length]: exact for the state, measured on a twin for
    activations.

    Without `optimizer_bytes`, those of AdamW: two moments per trainable number.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = sum(t.numel() * t.element_size() for t in set(model.state_dict(keep_vars=True).values()))
    gradients = sum(p.numel() * p.element_size() for p in parameters)
    moments = 2 * gradients if optimizer_bytes is None else optimizer_bytes
    activations = math.nan
    if not _has_experts(model):
        with FakeTensorMode(), _told_as("measured"):
            activations = measure_saved(_twin(model), _example(batch, sequence_length), autocast=autocast).bytes
    return Memory(weights, gradients, moments, activations)


PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}  # fmt: skip
"""bf16 FLOP/s of dense matrix products, from the makers' data sheets (SXM parts), by a piece of the device's name."""


def achievable_flops() -> tuple[float, str]:
    """(FLOP/s of one device, where the number comes from): a data sheet's, or else measured on a matrix product, in 0.3
    s."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for piece, rate in PEAK_FLOPS.items():
            if piece in name:
                return rate, f"data sheet of {piece}, bf16"
    device, size, best = ("cuda" if torch.cuda.is_available() else "cpu"), 1024, 0.0
    a = torch.randn(size, size, device=device)
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best, f"fastest {size} x {size} fp32 matrix product measured on this {device}"
