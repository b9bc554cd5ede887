"""AdamW that may count steps vector by vector: a row whose moments start anew gets the bias correction of a first step.

    m <- β1 m + (1 - β1) G                 v <- β2 v + (1 - β2) G²                t <- t + 1
    P <- (1 - lr λ) P - lr / (1 - β1^t) · m / (sqrt(v / (1 - β2^t)) + eps)

P, G, m, v have one shape. t has any shape that broadcasts against it: () counts for the whole tensor, and the rule is
``torch.optim.AdamW``; [r, 1] counts for each row of P [r, n], [1, r] for each column of P [m, r].

State: m, v and t, so 2 P.numel() + t.numel() elements.

Source: Loshchilov and Hutter, "Decoupled Weight Decay
Regularization", arXiv 1711.05101; counters of single vectors as in SwitchLoRA, arXiv 2406.06564.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorank.optim.driver import ByGroups
from lorank.optim.rule import Group, Rule, State
from lorank.optim.step import LowRankOptimizer


class VectorRule(Rule):
    """The step, with the counter ``state["step"]`` of a parameter on its device."""

    kept = typed = ("exp_avg", "exp_avg_sq")
    elementwise = True

    def make(self, like: Tensor) -> State:
        moments = {name: torch.zeros_like(like, memory_format=torch.preserve_format) for name in self.kept}
        return {"step": torch.zeros((), dtype=torch.float32, device=like.device), **moments}

    def step(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        for W, state in zip(weights, states, strict=True):
            state["step"] = state["step"].to(W.device)
        t, m, v = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]

        torch._foreach_add_(t, 1)
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)

        precise = [count.double() if W.dtype == torch.float64 else count for count, W in zip(t, weights, strict=True)]
        denominators = torch._foreach_sqrt(v)
        torch._foreach_div_(denominators, torch._foreach_sqrt(_correction(precise, beta2)))
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(denominators, _correction(precise, beta1))
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(weights, m, denominators, -group["lr"])

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        return 2 * math.prod(shape) * itemsize


def _correction(steps: list[Tensor], beta: float) -> tuple[Tensor, ...]:
    """1 - β^t for each t, without the cancellation that a small 1 - β would suffer in single precision."""
    exponents = torch._foreach_mul(steps, math.log(beta) if beta else -math.inf)
    return torch._foreach_neg(torch._foreach_expm1(exponents))


@dataclass(frozen=True, kw_only=True)
class ByVectors(ByGroups):
    """AdamW whose only rule is `VectorRule`."""

    name: ClassVar[str] = "vector-adamw"

    @property
    def rules(self) -> Mapping[str, Rule]:
        return {"adamw": VectorRule()}


class VectorAdamW(LowRankOptimizer):
    """``torch.optim.AdamW`` with a counter ``state[parameter]["step"]`` of any shape that broadcasts; see `reset_vectors`.

    Raises:
        ValueError: a negative lr, eps or weight_decay, betas outside [0, 1), or weights in float16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, ByVectors(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def reset_vectors(optimizer: Optimizer, parameter: Tensor, dim: int, rows: Tensor) -> None:
    """Start some vectors of a matrix anew: moments and counters, one for each vector from now on, become zero.

    `dim` is the dimension that counts the vectors, 0 for rows and 1 for columns; `rows` are their numbers.
    """
    state = optimizer.state[parameter]
    if not state:
        state.update(VectorRule().make(parameter))
    shape = [size if d == dim else 1 for d, size in enumerate(parameter.shape)]
    state["step"] = state["step"].to(parameter.device).expand(shape).clone()
    for value in state.values():
        value.index_fill_(dim, rows, 0)


def check_factors(optimizer: Optimizer, factors: Mapping[str, Sequence[Tensor]]) -> None:
    """Raises ValueError unless it is a `VectorAdamW` that moves these factors, by the names of their layers."""
    if not isinstance(optimizer, VectorAdamW):
        raise ValueError(f"optimizer must come from lorank.optimizer with switchlora, got {type(optimizer).__name__}")
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, pair in factors.items():
        if not moved.issuperset(map(id, pair)):
            raise ValueError(f"the optimizer must have all trained parameters, but it lacks the factors of {name}")
