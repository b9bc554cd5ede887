"""Bytes of training: what is kept for backward, the peak of a step, and the optimizer's state."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from lorank.accounting.flops import MORE_FLOPS
from lorank.accounting.meter import Meter, storage_of, tensors_alive
from lorank.accounting.twin import example, twin_of, without_data
from lorank.loss import gives_loss, head_of, next_token_loss


class Saved(NamedTuple):
    """What a forward pass leaves for backward, parameters not counted."""

    bytes: int
    shapes: list[tuple[int, ...]]
    """One for each storage that stays: the shape of one of its tensors."""


class Memory(NamedTuple):
    """Bytes of training on one device."""

    weights_bytes: int
    """Parameters, and buffers that are saved with them."""
    gradients_bytes: int
    optimizer_bytes: int
    """Its state, and what a method keeps to undo the rounding of weights that it edits (`rests_bytes`)."""
    activations_bytes: int
    """What a forward pass leaves for backward."""
    peak_bytes: int
    """The most that a step holds at once, see `measure_peak` and `measure_step`. It is below the total where gradients
    replace activations, and above it where backward needs more, such as the gradient of the logits."""
    peak_when: Literal["forward", "backward", "step"]

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


def measure_saved(model: nn.Module, inputs: dict[str, Tensor], *, autocast: bool = False) -> Saved:
    """What a model keeps alive between its forward and its backward pass, from the tensors themselves.

    Two sources: hooks see autograd's saved tensors; the garbage collector sees what else is alive afterwards and was not
    before (the inputs of checkpointed blocks, the cache of selective checkpointing). Each storage counts once.
    Parameters, buffers and inputs do not count.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # its cache of weights ends with it
        return saved_by(model, lambda: next_token_loss(model, inputs).total, inputs.values())


def saved_by(model: nn.Module, forward: Callable[[], Tensor], inputs: Iterable[Tensor] = ()) -> Saved:
    """As `measure_saved`, of any forward pass of a model."""
    known = {storage_of(t) for t in [*model.parameters(), *model.buffers(), *inputs]}
    known |= {storage_of(t) for t in tensors_alive()}
    found: dict[int, tuple[int, tuple[int, ...]]] = {}

    def note(tensor: Tensor) -> None:
        if storage_of(tensor) not in known:
            found.setdefault(storage_of(tensor), (tensor.untyped_storage().nbytes(), tuple(tensor.shape)))

    def pack(tensor: Tensor) -> Tensor:
        note(tensor)
        return tensor.detach()  # a node that held its own output would never be freed

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # noqa: F841 (keeps the graph alive)
    for tensor in tensors_alive():
        note(tensor)
    for gradient in _made_in_forward(model):
        same = (key for key, (_, shape) in found.items() if shape == tuple(gradient.shape))
        found.pop(next(same, -1), None)
    return Saved(sum(size for size, _ in found.values()), [shape for _, shape in found.values()])


def _made_in_forward(model: nn.Module) -> list[nn.Parameter]:
    """Parameters whose gradients a head makes with the loss: they wait for the backward pass, but as gradients."""
    return [p for p in head_of(model).parameters() if p.requires_grad] if gives_loss(model) else []


class Peak(NamedTuple):
    """Bytes in addition to weights and optimizer state."""

    activations_bytes: int
    """What the forward pass left for backward."""
    most_bytes: int
    """The most that forward and backward held at once, gradients included."""
    when: Literal["forward", "backward", "step"]
    """When that was; "step" is the end of backward, when all gradients wait for the optimizer."""


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

    Tensors only: neither the scratch memory of a kernel nor what an allocator wastes is included.

    Args:
        accumulate: gradients of earlier micro-batches exist already.
        padded: some tokens are padding, so that attention has a mask.
        kept_gradients: parameter -> shape of what replaces its gradient as soon as backward has made it.
    """
    kept: dict[nn.Parameter, Tensor] = {}

    def arrive(parameter: nn.Parameter, shape: tuple[int, ...]) -> None:
        smaller = parameter.new_empty(shape)  # both exist for a moment, also where it is added to an earlier one
        kept.setdefault(parameter, smaller)
        parameter.grad = None

    with without_data("measured"):
        twin, inputs = twin_of(model), example(batch, sequence_length, padded)
        shapes = {ours: kept_gradients.get(p) for p, ours in zip(model.parameters(), twin.parameters(), strict=True)}
        meter = Meter([*twin.parameters(), *twin.buffers(), *inputs.values()])
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
                loss = next_token_loss(twin, inputs).total
            activations = meter.now - before - sum(p.numel() * p.element_size() for p in _made_in_forward(twin))
            meter.phase = "backward"
            loss.backward()
        when = "step" if meter.now >= 0.99 * meter.most else meter.when
        return Peak(activations, meter.most, when)  # type: ignore[arg-type]


def measure_call(model: nn.Module, call: Callable[[Any], object]) -> tuple[int, int]:
    """FLOPs of `call` on a data-free twin of a model, without autograd, and the most bytes that it held at once in
    addition to the weights."""
    with without_data("counted"), torch.no_grad():
        twin = twin_of(model)
        meter = Meter([*twin.parameters(), *twin.buffers()])
        with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter, meter:
            call(twin)
    return counter.get_total_flops(), meter.most


class Step(NamedTuple):
    """Bytes of an optimizer's step, in addition to weights."""

    kept_bytes: int
    """State after the step."""
    most_bytes: int
    """The most that was held at once: state, gradients and temporary tensors."""


def measure_step(model: nn.Module, build: Callable[[nn.Module], Optimizer]) -> Step:
    """Follow every tensor of two optimizer steps on a data-free twin; in the second, all state exists already.

    Tensors only, as in `measure_peak`. Matrices are stacked as on a CPU: one by one, except for small ones.

    Args:
        build: makes the optimizer for a model's parameters.
    """
    with without_data("stepped"):
        twin = twin_of(model)
        trained = [p for p in twin.parameters() if p.requires_grad]
        integers = [p for p in twin.parameters() if not p.is_floating_point()]  # moved by sums of other integers
        meter = Meter([*twin.parameters(), *twin.buffers()])
        with meter:
            optimizer = build(twin)
            for _ in range(2):
                if trained:
                    torch.stack([p.sum() for p in trained]).sum().backward()
                for p in integers:
                    p.grad_dtype = torch.int32
                    p.grad = torch.zeros_like(p, dtype=torch.int32)
                optimizer.step()
                optimizer.zero_grad()
        return Step(meter.now, meter.most)


def held_bytes(model: nn.Module) -> int:
    """What a model's parameters and buffers take, each once."""
    return sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})


def rests_bytes(model: nn.Module) -> int:
    """What hooks keep of 16-bit weights that they edit in place (`lorank.rounding`): ReLoRA, SwitchLoRA, SST and CoDyRA in bf16."""
    return sum(getattr(module, "rest_bytes", 0) for module in model.modules())


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
    """Bytes of training `model` on micro-batches [batch, sequence_length].

    The state is exact; activations and peak are measured on a twin. `accumulate` if a step has several micro-batches;
    `padded` and `kept_gradients` are as in `measure_peak`. `optimizer_bytes` are AdamW's by default: two moments per
    trainable number, and `rests_bytes`. Without `step`, the optimizer's step is assumed to need only its state, as a fused AdamW does.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = sum(t.numel() * t.element_size() for t in set(model.state_dict(keep_vars=True).values()))
    gradients = sum(math.prod(kept_gradients.get(p, p.shape)) * p.element_size() for p in parameters)
    moments = optimizer_bytes
    if moments is None:
        moments = 2 * sum(p.numel() * p.element_size() for p in parameters) + rests_bytes(model)
    found = measure_peak(
        model,
        batch=batch,
        sequence_length=sequence_length,
        autocast=autocast,
        accumulate=accumulate,
        padded=padded,
        kept_gradients=kept_gradients,
    )
    held = held_bytes(model)
    peak, when = held + (moments if step is None else step.kept_bytes) + found.most_bytes, found.when
    if step is not None and held + step.most_bytes > peak:
        peak, when = held + step.most_bytes, "step"
    return Memory(weights, gradients, moments, found.activations_bytes, peak, when)


def all_reduce_bytes(gradients_bytes: int, devices: int) -> float:
    """Bytes that each device sends, and as many that it receives, to sum the gradients of `devices` in a ring.

    2 (p - 1) / p of the gradients: p - 1 times a p-th part to sum, p - 1 times to hand the sums round (Patarasuk and
    Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).

    >>> all_reduce_bytes(1000, 1), all_reduce_bytes(1000, 8)
    (0.0, 1750.0)
    """
    return 2 * (devices - 1) / devices * gradients_bytes
