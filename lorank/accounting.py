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
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import masking_utils

from lorank.accelerators import ACCELERATORS
from lorank.method import SHARED
from lorank.sites import blocks

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


def all_reduce_bytes(gradients_bytes: int, devices: int) -> float:
    """Bytes that each device sends, and as many that it receives, to sum the gradients of `devices` in a ring.

    2 (p - 1) / p of the gradients: p - 1 times a p-th part to sum, p - 1 times to hand the sums round (Patarasuk and
    Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).

    >>> all_reduce_bytes(1000, 1), all_reduce_bytes(1000, 8)
    (0.0, 1750.0)
    """
    return 2 * (devices - 1) / devices * gradients_bytes


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
    activations_bytes: int
    """What a forward pass leaves for backward."""
    peak_bytes: int
    """The most that is held at once in a step, see `measure_peak` and `measure_step`; below the total where gradients come as activations
    go, above it where the backward pass needs more beside, such as the gradient of the logits."""
    peak_when: Literal["forward", "backward", "step"]

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


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


class _WithoutData(FakeTensorMode):
    """Tensors have shapes alone. torch gives one to the grouped product, by which experts run, in bf16 only; here it has one in any type.

    It is [tokens, d_in] times [experts, d_in, d_out], or for the gradient of the weights [d_in, tokens] times [tokens, d_out], a
    matrix for each expert.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        a, b, offsets = args[:3]
        return a.new_empty(*(offsets.shape if b.ndim == 2 else ()), a.shape[0], b.shape[-1])


@contextlib.contextmanager
def _without_data() -> Iterator[None]:
    """Inside, tensors have shapes alone, and every row is one sequence: transformers looks for several in the positions, and where
    there is nothing to see it makes a mask [n, n] that training has none of."""
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        with _WithoutData():
            yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def _example(batch: int, sequence_length: int, padded: bool = False) -> dict[str, Tensor]:
    ids = torch.zeros(batch, sequence_length, dtype=torch.int64)
    mask = {"attention_mask": torch.ones_like(ids)} if padded else {}  # whether there are zeros in it cannot be seen
    return {"input_ids": ids, "labels": ids, **mask}


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * sdpa_flop_count(
        q, k, v
    )  # as the closed forms; that flash attention forms the scores again is not counted


def _grouped_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Each token is multiplied by the matrix of its own expert alone."""
    return 2 * math.prod(a) * b[-1]


MORE_FLOPS = {  # missing in torch's own table
    torch.ops.aten._grouped_mm: _grouped_flops,
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
        with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
            loss = model(**_example(batch, sequence_length)).loss
            forward = counter.get_total_flops()
            loss.backward()
        return forward, counter.get_total_flops() - forward

    with _without_data(), _told_as("counted"):
        twin = _twin(model)
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


class _Meter(TorchDispatchMode):
    """Follows the bytes of all storages that operations make, while they live; those of `known` tensors are left out."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.phase = self.when = "forward"
        self._seen = {_storage(tensor) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            return (
                True if args[0].dtype == torch.bool else 1
            )  # where a step looks into data, all is well: finite, not zero
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided and _storage(leaf) not in self._seen:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        weakref.finalize(storage, self._forget, key, size).atexit = False
        self.now += size
        if self.now > self.most:
            self.most, self.when = self.now, self.phase

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class Peak(NamedTuple):
    """Bytes beside weights and optimizer state."""

    activations_bytes: int
    """What the forward pass left for backward."""
    most_bytes: int
    """The most that forward and backward held at once, gradients included."""
    when: Literal["forward", "backward", "step"]
    """Where that was; "step" if at the end of backward, when all gradients wait for the optimizer."""


def measure_peak(
    model: nn.Module,
    *,
    batch: int,
    sequence_length: int,
    autocast: bool = False,
    accumulate: bool = False,
    padded: bool = False,
    kept_gradients: Mapping[nn.Parameter, tuple[int, ...]] = MappingProxyType({}),
) -> Peak:
    """Follow every tensor of a training call on [batch, sequence_length] tokens, on a data-free twin.

    Tensors only: neither the scratch memory inside a kernel nor what an allocator wastes between them.

    Args:
        accumulate: gradients of earlier micro-batches are there already.
        padded: there is padding among the tokens, so that attention has a mask.
        kept_gradients: parameter -> shape of what its gradient is replaced by as soon as it is there.
    """
    kept: dict[nn.Parameter, Tensor] = {}

    def arrive(parameter: nn.Parameter, shape: tuple[int, ...]) -> None:
        smaller = parameter.new_empty(shape)  # a moment beside the gradient, also where it is added to an earlier one
        kept.setdefault(parameter, smaller)
        parameter.grad = None

    with _without_data(), _told_as("measured"):
        twin, inputs = _twin(model), _example(batch, sequence_length, padded)
        shapes = {ours: kept_gradients.get(p) for p, ours in zip(model.parameters(), twin.parameters(), strict=True)}
        meter = _Meter([*twin.parameters(), *twin.buffers(), *inputs.values()])
        with meter:
            for parameter, shape in shapes.items():
                if shape is not None:
                    parameter.register_post_accumulate_grad_hook(partial(arrive, shape=shape))
                if accumulate and parameter.requires_grad:
                    if shape is None:
                        parameter.grad = torch.zeros_like(parameter)
                    else:
                        kept[parameter] = parameter.new_zeros(shape)
            before = meter.now
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = twin(**inputs).loss
            activations = meter.now - before
            meter.phase = "backward"
            loss.backward()
        when = "step" if meter.now >= 0.99 * meter.most else meter.when
        return Peak(activations, meter.most, when)  # type: ignore[arg-type]


def measure_call(model: nn.Module, call: Callable[[Any], object]) -> tuple[int, int]:
    """FLOPs of `call` on a data-free twin of a model, and the most bytes that it held at once beside the weights; without autograd."""
    with _without_data(), _told_as("counted"), torch.no_grad():
        twin = _twin(model)
        meter = _Meter([*twin.parameters(), *twin.buffers()])
        with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter, meter:
            call(twin)
    return counter.get_total_flops(), meter.most


class Step(NamedTuple):
    """Bytes of an optimizer's step, beside weights."""

    kept_bytes: int
    """State, as it is after the step."""
    most_bytes: int
    """The most that was held at once: state, gradients, and what the step makes for a while."""


def measure_step(model: nn.Module, build: Callable[[nn.Module], Optimizer]) -> Step:
    """Follow every tensor of two optimizer steps, the second of which finds all state there, on a data-free twin.

    Tensors only, as in `measure_peak`. Matrices are stacked as on a CPU, one by one but for small ones.

    Args:
        build: makes the optimizer of a model's parameters.
    """
    with _without_data(), _told_as("stepped"):
        twin = _twin(model)
        trained = [p for p in twin.parameters() if p.requires_grad]
        meter = _Meter([*twin.parameters(), *twin.buffers()])
        with meter:
            optimizer = build(twin)
            for _ in range(2):
                torch.stack([p.sum() for p in trained]).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return Step(meter.now, meter.most)


def memory_estimate(
    model: nn.Module,
    *,
    optimizer_bytes: int | None = None,
    step: Step | None = None,
    batch: int,
    sequence_length: int,
    autocast: bool = False,
    accumulate: bool = False,
    padded: bool = False,
    kept_gradients: Mapping[nn.Parameter, tuple[int, ...]] = MappingProxyType({}),
) -> Memory:
    """Bytes of training `model` on micro-batches [batch, sequence_length]: exact for the state, measured on a twin for
    activations and peak; `accumulate` if a step has several of them. `padded` and `kept_gradients` are as in `measure_peak`.

    Without `optimizer_bytes`, those of AdamW: two moments per trainable number. Without `step` the optimizer's step is taken
    to need nothing beside its state, which is so of a fused AdamW.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = sum(t.numel() * t.element_size() for t in set(model.state_dict(keep_vars=True).values()))
    gradients = sum(math.prod(kept_gradients.get(p, p.shape)) * p.element_size() for p in parameters)
    moments = 2 * sum(p.numel() * p.element_size() for p in parameters) if optimizer_bytes is None else optimizer_bytes
    found = measure_peak(
        model,
        batch=batch,
        sequence_length=sequence_length,
        autocast=autocast,
        accumulate=accumulate,
        padded=padded,
        kept_gradients=kept_gradients,
    )
    held = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    peak, when = held + (moments if step is None else step.kept_bytes) + found.most_bytes, found.when
    if step is not None and held + step.most_bytes > peak:
        peak, when = held + step.most_bytes, "step"
    return Memory(weights, gradients, moments, found.activations_bytes, peak, when)


def achievable_flops() -> tuple[float, str]:
    """(FLOP/s of one device, where the number comes from): a data sheet's, or else measured on a matrix product, in 0.3
    s."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for accelerator in ACCELERATORS.values():
            if accelerator.device in name:
                return accelerator.flops, f"data sheet of {accelerator.name}, bf16"
    device, size, best = ("cuda" if torch.cuda.is_available() else "cpu"), 1024, 0.0
    a = torch.randn(size, size, device=device)
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best, f"fastest {size} x {size} fp32 matrix product measured on this {device}"
