"""The rules besides AdamW: torch's and bitsandbytes' optimizers as functions on lists of tensors.

adamw-8bit   AdamW, moments of tensors from 4,096 numbers on           Dettmers et al., arXiv 2110.02861
             in a byte each, with a scale per 256
adafactor    the second moment as a column times a row                 Shazeer and Stern, arXiv 1804.04235
muon         orthonormalised momentum, times one of `SCALES`; "kimi"   Jordan et al.; Liu et al., arXiv 2502.16982
             has AdamW's root mean square, so that one lr serves both
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim._adafactor import adafactor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, muon

from lorank.fields import Bounds, NonNegative, Positive
from lorank.optim.rule import AdamW, Group, Rule, State
from lorank.optim.shards import whole

Scale = Literal["dion", "kj", "kimi", "none"]
SCALES: dict[str, Callable[[int, int], float]] = {
    "dion": lambda m, n: (m / n) ** 0.5,
    "kj": lambda m, n: max(1.0, m / n) ** 0.5,
    "kimi": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "none": lambda m, n: 1.0,
}
"""Length of an orthonormal update by m = d_out and n = d_in."""


class Forgetful(AdamW):
    """AdamW with ε after the root, whose moments begin anew every so many steps."""

    def __init__(self, every: int | None):
        super().__init__(eps_after_root=True)
        self.every = every

    def make(self, like: Tensor) -> State:
        return {**super().make(like), "steps": torch.zeros((), dtype=torch.int64, device="cpu")}

    def step(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        super().step(weights, gradients, states, group)
        for state in states:
            state["steps"] += 1
            if self.every and int(state["steps"]) % self.every == 0:
                forget(state)


def forget(state: State) -> None:
    """Let Adam's moments and their counter begin anew."""
    for name in ("exp_avg", "exp_avg_sq", "step"):
        if name in state:
            state[name].zero_()


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


@functools.cache
def _levels(signed: bool, device: torch.device) -> Tensor:
    return _bitsandbytes().create_dynamic_map(signed=signed).to(device)


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise ImportError("adamw-8bit needs bitsandbytes; install it with: pip install 'lorank[8bit]'") from None


class Adafactor(Rule):
    """torch's Adafactor, which has neither betas nor Adam's ε; its `eps` are two. A step goes by the size of the weights, of
    experts [E, m, n] by that of all."""

    kept = typed = ("row_var", "col_var", "variance")
    defaults: ClassVar[Mapping[str, Any]] = {"eps": (None, 1e-3), "d": 1.0, "beta2_decay": -0.8}
    types: ClassVar[Mapping[str, Any]] = {
        "eps": tuple[NonNegative | None, NonNegative],
        "d": Positive,
        "beta2_decay": float,
    }

    def make(self, like: Tensor) -> State:
        step = torch.zeros((), dtype=torch.float32, device="cpu")
        if like.ndim < 2:
            return {"step": step, "variance": like.new_zeros(like.shape)}
        column, row = (*like.shape[:-1], 1), (*like.shape[:-2], 1, like.shape[-1])
        return {"step": step, "row_var": like.new_zeros(column), "col_var": like.new_zeros(row)}

    def step(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        eps1, eps2 = group["eps"]
        lists = [[state.get(name) for state in states] for name in ("row_var", "col_var", "variance", "step")]
        adafactor(
            weights,
            gradients,
            *lists,  # type: ignore[arg-type]
            d=group["d"],
            lr=group["lr"],
            beta2_decay=group["beta2_decay"],
            weight_decay=group["weight_decay"],
            eps1=eps1,
            eps2=eps2,
            maximize=False,
        )

    def inside(
        self, zeros: list[Tensor], R: list[Tensor], states: list[State], group: Group, weights: Sequence[Tensor]
    ) -> None:
        """Zeros have no size, so they move as weights of the least size do; the change is scaled to that of the weights."""
        self.step(zeros, R, states, group)
        for change, W in zip(zeros, weights, strict=True):
            wide = torch.promote_types(W.dtype, torch.float32)
            size = whole(torch.linalg.vector_norm(W.detach(), dtype=wide)) / W.numel() ** 0.5
            change.mul_((size / group["eps"][1]).clamp(min=1))

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        if len(shape) < 2:
            return itemsize * math.prod(shape)
        return itemsize * (math.prod(shape[:-1]) + math.prod([*shape[:-2], shape[-1]]))

    def flops(self, shape: Sequence[int]) -> int:
        return 2 * math.prod(shape) if len(shape) > 1 else 0  # the second moment, a column times a row


class Muon(Rule):
    """torch's Muon with Nesterov momentum and five steps of Newton-Schulz in bfloat16."""

    kept = typed = ("momentum_buffer",)
    defaults: ClassVar[Mapping[str, Any]] = {"momentum": 0.95, "eps": 1e-7, "scaling": "kimi"}
    types: ClassVar[Mapping[str, Any]] = {
        "eps": NonNegative,
        "momentum": Annotated[float, Bounds(least=0, below=1)],
        "scaling": Scale,
    }
    matrices_only = True

    def make(self, like: Tensor) -> State:
        return {"momentum_buffer": like.new_zeros(like.shape)}

    def step(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        buffers = [state["momentum_buffer"] for state in states]
        weights, gradients, buffers = map(_matrices, (weights, gradients, buffers))
        alike: dict[torch.Size, list[int]] = {}
        for i, W in enumerate(weights):
            alike.setdefault(W.shape if group["scaling"] != "kimi" else torch.Size(), []).append(i)
        for shape, some in alike.items():
            longer = SCALES[group["scaling"]](*shape) / SCALES["kimi"](*shape) if shape else 1.0  # torch's has kimi's
            muon(
                [weights[i] for i in some],
                [gradients[i] for i in some],
                [buffers[i] for i in some],
                lr=group["lr"] * longer,
                weight_decay=group["weight_decay"] / longer,
                momentum=group["momentum"],
                nesterov=True,
                ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
                ns_steps=5,
                eps=group["eps"],
                adjust_lr_fn="match_rms_adamw",
                has_complex=False,
            )

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        return math.prod(shape) * itemsize

    def flops(self, shape: Sequence[int]) -> int:
        *k, m, n = shape
        return math.prod(k) * newton_schulz_flops(m, n)


def _matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix, and the matrices of each stack [k, m, n]."""
    return [matrix for tensor in tensors for matrix in (tensor.unbind() if tensor.ndim == 3 else (tensor,))]


def newton_schulz_flops(m: int, n: int, steps: int = 5) -> int:
    """Of Newton-Schulz on [m, n] with the shorter side s and the longer l: steps (4 s² l + 2 s³).

    >>> newton_schulz_flops(20, 3)
    3870
    """
    short, long = min(m, n), max(m, n)
    return steps * (4 * short * short * long + 2 * short**3)


RULES: dict[str, Rule] = {"adamw": AdamW(), "adamw-8bit": AdamW8bit(), "adafactor": Adafactor(), "muon": Muon()}
