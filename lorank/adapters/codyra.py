"""CoDyRA: a number for each rank, which a proximal step shrinks to zero where the task does not need the rank.

    y = W x + B (γ ⊙ A x) (+ b)      x [..., d_in]   A [r, d_in]   B [d_out, r]   γ [r]   W [d_out, d_in] frozen
    after each step of the second half:  γ <- sign(γ) max(|γ| - κ_t, 0),  κ_t rising linearly to κ            (1)
    next task:  W <- W + B diag(γ) A,  A <- Kaiming-uniform,  B <- 0,  γ <- normal                             (2)

Saves: gradients, optimizer state.

(1) is the proximal operator of κ |γ|_1: a rank whose γ has become zero takes no further part. What is left at the end of a task is
merged, so a model of many tasks costs what the dense one does, and needs no name of a task to answer.

Cost of a layer: r (d_in + d_out + 1) trained parameters; for n tokens 2 n (d_in d_out + r (d_in + d_out)) operations forward; backward
the first term once more and the second twice. Merged, it is a dense layer.

Source: Lu et al., "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models with Dynamic
Rank-Selective LoRA", arXiv 2412.01004, and the authors' repository jeff024/codyra.

Confirmed in the authors' code: r = 16, scale 1, κ = 0.005, the dense first half, the linear rise, LoRA's start of A and B, all
projections. Departures. (1) is the closed form; the authors' three lines compare a value that they have shrunk already once more with
κ, so that all below 2 κ becomes zero. A γ that is zero may grow again by a larger step than κ, as in theirs. What rounding to 16 bits
takes from (1), of which κ is often less than one unit, is kept for the next step (`lorank.rounding`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.adapters.gated import Adapted, Adapter, GatedAdapter, count_task, tasks_of
from lorank.fields import Count, Fraction, NonNegative
from lorank.layers import like
from lorank.method import StepHook
from lorank.optim import shards
from lorank.rounding import Rests, rest_bytes

# ---- the mathematics


def shrunk(gamma: Tensor, kappa: float) -> Tensor:
    """(1): the u with the least ½ |u - γ|² + κ |u|_1.

    >>> shrunk(torch.tensor([-2.0, 0.75, 0.25]), 0.5)
    tensor([-1.5000,  0.2500,  0.0000])
    """
    return gamma - gamma.clamp(-kappa, kappa)


def threshold(step: int, steps: int, dense: float, kappa: float) -> float:
    """κ_t after `step` of `steps`: 0 in the first, dense part, then a line up to κ.

    >>> [threshold(step, 100, 0.5, 0.005) for step in (50, 75, 100)]
    [0.0, 0.0025, 0.005]
    """
    first = round(dense * steps)
    return kappa * max(0, step - first) / max(1, steps - first)


# ---- the layer


class CoDyRALinear(GatedAdapter):
    def __init__(self, dense: nn.Linear, rank: int):
        super().__init__(dense, rank)
        self.gamma = nn.Parameter(torch.empty(rank, **like(dense.weight)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.gamma)

    def static_gate(self) -> Tensor:
        return self.gamma

    @property
    def rest_bytes(self) -> int:
        """What `Shrink` keeps of γ."""
        return rest_bytes(self.rank, self.gamma.dtype)

    @torch.no_grad()
    def next_task(self) -> bool:
        """(2)."""
        self.W.weight.copy_(self.merged()[0])
        self.reset_parameters()
        return True

    def extra_repr(self) -> str:
        left = "" if self.gamma.is_meta else f", {int(self.gamma.count_nonzero())} ranks left"
        return super().extra_repr() + left


# ---- the method


@dataclass(frozen=True, kw_only=True)
class CoDyRA(Adapter):
    """Ranks that a sparse gate chooses; ``lorank.convert(model, CoDyRA(rank=16))``, then `lorank.next_task`."""

    name: ClassVar[str] = "codyra"
    layer: ClassVar[type[Adapted]] = CoDyRALinear
    soon: ClassVar[Mapping[str, Any]] = {"dense": 0.25}
    progress: ClassVar[tuple[str, ...]] = ("tasks",)

    kappa: NonNegative = 0.005
    """κ: what the last step of a task takes from each |γ|; 0 prunes nothing."""
    dense: Fraction = 0.5
    """Part of a task's steps in which no γ is shrunk."""
    tasks: Count = 1
    """Tasks begun; `lorank.next_task` counts them."""

    def next_task(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        super().next_task(model, optimizer)
        count_task(model)

    def inseparable(self, model: nn.Module) -> str | None:
        return None if tasks_of(model) == 1 else "what earlier tasks left is in W"

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook:
        return Shrink(self, model, optimizer, steps)


# ---- between steps


class Shrink(StepHook):
    """(1) after each step; `steps` are those of one task."""

    def __init__(self, method: CoDyRA, model: nn.Module, optimizer: Optimizer, steps: int):
        super().__init__(optimizer)
        self.method, self.steps = method, steps
        self.gammas = {name: module.gamma for name, module in model.named_modules() if isinstance(module, CoDyRALinear)}

    @torch.no_grad()
    def after_step(self) -> None:
        kappa = threshold(self.step, self.steps, self.method.dense, self.method.kappa)
        for name, gamma in self.gammas.items() if kappa else ():
            exact = shrunk(self.rests.exact(name, shards.whole(gamma)), kappa)
            stored = exact.to(gamma.dtype)
            gamma.copy_(shards.like(stored, gamma))
            self.rests.settle(name, exact, stored, gamma.dtype)

    def next_task(self) -> None:
        """Each γ is drawn anew, and lacks nothing."""
        super().next_task()
        self.rests = Rests()
