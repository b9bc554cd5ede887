"""AdamW with both moments in a byte per number.

    M[i] = a[⌊i / 256⌋] code[q[i]]        a the largest size in a block of 256,  and so V;  the step is AdamW's

    q [m n] bytes, one list for each moment     a [m n / 256] in single precision     code [256], dense near 0; W, G, M, V as lists [m n]

Each step reads the moments, moves W as AdamW does, and stores the moments with new a, rounded to the nearest code. Tensors with fewer than
4,096 numbers keep moments of 32 bits.

Saves: optimizer state.

State: 2 (1 + 4 / 256) bytes per number instead of 8, and 2 KB of codes per tensor.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861. A function of bitsandbytes does the step.
"""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorank.optim.rule import Group, Rule, State


class AdamW8bit(Rule):
    """AdamW of bitsandbytes."""

    kept = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
    least = 4096
    """Tensors with fewer numbers keep moments of 32 bits."""

    def make(self, like: Tensor) -> State:
        _bitsandbytes()
        if like.numel() < self.least:
            moments = {name: like.new_zeros(like.shape, dtype=torch.float32) for name in ("state1", "state2")}
            return {"step": 0, **moments}
        blocks = math.ceil(like.numel() / 256)
        return {
            "step": 0,
            **{name: like.new_zeros(like.shape, dtype=torch.uint8) for name in ("state1", "state2")},
            "qmap1": _levels(True, like.device),
            "qmap2": _levels(False, like.device),
            **{name: like.new_zeros(blocks, dtype=torch.float32) for name in ("absmax1", "absmax2")},
        }

    def step(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        F, (beta1, beta2) = _bitsandbytes(), group["betas"]
        for W, G, state in zip(weights, gradients, states, strict=True):
            state["step"] += 1
            lr, eps, t, decay = float(group["lr"]), group["eps"], state["step"], group["weight_decay"]
            one, two, G = state["state1"], state["state2"], G.contiguous()
            if one.dtype == torch.uint8:
                scales = (state[name] for name in ("qmap1", "qmap2", "absmax1", "absmax2"))
                F.optimizer_update_8bit_blockwise(
                    "adam", G, W, one, two, beta1, beta2, 0.0, 0.0, eps, t, lr, *scales, decay, gnorm_scale=1.0
                )
            else:
                F.optimizer_update_32bit("adam", G, W, one, beta1, eps, t, lr, two, beta2, 0.0, 0.0, decay, 1.0, None)

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        numel = math.prod(shape)
        return 2 * numel * 4 if numel < self.least else 2 * (numel + 4 * math.ceil(numel / 256)) + 2 * 256 * 4

    def gathered(self, shape: Sequence[int], itemsize: int) -> int:
        return 2 * math.prod(shape) * itemsize + self.gathered_inside(shape, itemsize)

    def gathered_inside(self, shape: Sequence[int], itemsize: int) -> int:
        """Moments; scales and codes are whole in all processes."""
        numel = math.prod(shape)
        return 2 * numel * (4 if numel < self.least else 1)


@functools.cache
def _levels(signed: bool, device: torch.device) -> Tensor:
    return _bitsandbytes().create_dynamic_map(signed=signed).to(device)


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise ImportError("adamw-8bit needs bitsandbytes; install it with: pip install bitsandbytes") from None
