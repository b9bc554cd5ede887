"""FLOPs of a training call, and FLOP/s of a device. A multiply-add counts as two floating-point operations."""

import functools
import math
import time
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lorank.accelerators import ACCELERATORS
from lorank.accounting.twin import example, twin_of, without_data
from lorank.layers import PartTime
from lorank.loss import cross_entropy, next_token_loss


class Flops(NamedTuple):
    """FLOPs of one training call: matrix products and attention. Causal attention counts in full."""

    forward: int
    backward: int
    recompute: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recompute


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """As in the closed forms; that flash attention computes the scores again is not counted."""
    return 2 * sdpa_flop_count(q, k, v)


def _grouped_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Each token is multiplied by the matrix of its expert only."""
    return 2 * math.prod(a) * b[-1]


MORE_FLOPS = {
    torch.ops.aten._grouped_mm: _grouped_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Operations that torch's own table lacks."""


def measure_flops(model: nn.Module, *, batch: int = 1, sequence_length: int = 256) -> Flops:
    """Count the FLOPs of a causal language model's training call on [batch, sequence_length] tokens, head and loss
    included.

    Runs a data-free twin under PyTorch's counter; recomputation is what checkpointing adds to the backward pass. Parts of layers
    that run in some steps only (`lorank.layers.PartTime`) count by their share.

    Raises:
        ValueError: modelling code that reads the data, or a shape it cannot run.
    """
    found = _counted(model, batch, sequence_length, parts=True)
    share = max(
        (m.passes for m in model.modules() if isinstance(m, PartTime)), default=1.0
    )  # one method's, so all equal
    if share in (0.0, 1.0):
        return found
    without = _counted(model, batch, sequence_length, parts=False)
    return Flops(*(round(w + share * (f - w)) for f, w in zip(found, without, strict=True)))


def _counted(model: nn.Module, batch: int, sequence_length: int, *, parts: bool) -> Flops:
    """Of a step with the parts that run in some steps only, or without."""

    def count(model: nn.Module) -> tuple[int, int]:
        with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
            # with logits: a head that gives the loss makes its gradients in the forward pass
            loss = next_token_loss(model, example(batch, sequence_length), nats=cross_entropy).total
            forward = counter.get_total_flops()
            loss.backward()
        return forward, counter.get_total_flops() - forward

    with without_data("counted"):
        twin = twin_of(model)
        for module in twin.modules():
            if isinstance(module, PartTime):
                module.runs = parts
        forward, backward = count(twin)
        recompute = 0
        if getattr(twin, "is_activation_checkpointing", False):
            twin.activation_checkpointing_disable()  # type: ignore[operator]
            plain = count(twin)[1]
            backward, recompute = plain, backward - plain
    return Flops(forward, backward, recompute)


def flops_per_token(model: nn.Module, sequence_length: int, *, batch: int = 1) -> float:
    """Training FLOPs per token, forward and backward, without recomputation: the numerator of MFU (arXiv 2204.02311).
    The batch matters where a method works on its weights once per call, as SLTrain does."""
    found = measure_flops(model, batch=batch, sequence_length=sequence_length)
    return (found.forward + found.backward) / (batch * sequence_length)


@functools.cache
def achievable_flops() -> tuple[float, str]:
    """(FLOP/s of one device, source of the number): from a data sheet, or else measured once per process on a matrix
    product in 0.3 s."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for accelerator in ACCELERATORS.values():
            if accelerator.device in name:
                return accelerator.flops, f"data sheet of {accelerator.name}, bf16"
    device, size, best = ("cuda" if torch.cuda.is_available() else "cpu"), 1024, 0.0
    a = torch.ones(size, size, device=device)
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best, f"fastest {size} x {size} fp32 matrix product measured on this {device}"
