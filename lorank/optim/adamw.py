"""AdamW that may count steps vector by vector: a row whose moments start anew gets the bias correction of a first step.

    m <- β1 m + (1 - β1) G                 v <- β2 v + (1 - β2) G²                t <- t + 1
    P <- (1 - lr λ) P - lr / (1 - β1^t) · m / (sqrt(v / (1 - β2^t)) + eps)

P, G, m, v have one shape. t has any shape that broadcasts against it: () counts for the whole tensor, and the rule is
``torch.optim.AdamW``; [r, 1] counts for each row of P [r, n], [1, r] for each column of P [m, r].

State: m, v and t, so 2 P.numel() + t.numel() elements. Source: Loshchilov and Hutter, "Decoupled Weight Decay
Regularization", arXiv 1711.05101; counters of single vectors as in SwitchLoRA, arXiv 2406.06564.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class VectorAdamW(Optimizer):
    """``torch.optim.AdamW`` with a counter ``state[parameter]["step"]`` of any shape that broadcasts; see `reset_vectors`.

    Raises ValueError for a negative lr, eps or weight_decay and for betas outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be a number of at least 0, got {value}")
        check_betas(betas)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [_state(self, parameter) for parameter in parameters]
        t, m, v = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        gradients: Any = [parameter.grad for parameter in parameters]
        beta1, beta2 = group["betas"]

        torch._foreach_add_(t, 1)
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)

        precise = [
            count.double() if p.dtype == torch.float64 else count for count, p in zip(t, parameters, strict=True)
        ]
        denominators = torch._foreach_sqrt(v)
        torch._foreach_div_(denominators, torch._foreach_sqrt(_correction(precise, beta2)))
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(denominators, _correction(precise, beta1))
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, m, denominators, -group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():  # torch leaves counters on the device they were saved from
            if "step" in state:
                state["step"] = state["step"].to(parameter.device, torch.float32)


def check_betas(betas: Iterable[float]) -> None:
    """Raises ValueError if one is not in [0, 1)."""
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), for example (0.9, 0.999), got {betas}")


def reset_vectors(optimizer: Optimizer, parameter: Tensor, dim: int, rows: Tensor) -> None:
    """Start some vectors of a matrix anew: moments and counters, one for each vector from now on, become zero.

    `dim` is the dimension that counts the vectors, 0 for rows and 1 for columns; `rows` are their numbers.
    """
    state = _state(optimizer, parameter)
    shape = [size if d == dim else 1 for d, size in enumerate(parameter.shape)]
    state["step"] = state["step"].expand(shape).clone()
    for value in state.values():
        value.index_fill_(dim, rows, 0)


def check_factors(optimizer: Optimizer, factors: Mapping[str, Sequence[Tensor]]) -> None:
    """Raises ValueError unless it is a `VectorAdamW` that moves these factors, by the names of their layers, whole."""
    if not isinstance(optimizer, VectorAdamW):
        raise ValueError(f"optimizer must come from lorank.optimizer with switchlora, got {type(optimizer).__name__}")
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, pair in factors.items():
        if not moved.issuperset(map(id, pair)):
            raise ValueError(f"the optimizer must have all trained parameters, but it lacks the factors of {name}")
        if any(hasattr(factor, "device_mesh") for factor in pair):
            raise ValueError(f"switchlora moves whole vectors, but the factors of {name} are sharded; use DDP instead")


def _state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """State of a parameter, made where there is none."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def _correction(steps: list[Tensor], beta: float) -> tuple[Tensor, ...]:
    """1 - β^t for each t, without the cancellation that a small 1 - β would suffer in single precision."""
    exponents = torch._foreach_mul(steps, math.log(beta) if beta else -math.inf)
    return torch._foreach_neg(torch._foreach_expm1(exponents))
