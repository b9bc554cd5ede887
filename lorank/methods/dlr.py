"""DLR: each output of a CoLA layer also gets one of the bottleneck's numbers as it is.

    y = B σ(A x) + (α/√K) E σ(A x) = B* σ(A x),   B* = B + (α/√K) E         K = ⌈d_out / r⌉,  E fixed

    row o of E has a single 1, in column min(⌊o/K⌋, r - 1)                  "uniform": each number K times, in order
                                  or in a column that is drawn once        "random", the paper's ablation

    B, B*, E [d_out, r]   A [r, d_in]   ‖(α/√K) E‖₂ = α

Trained by its gradient alone, B* moves as B does. So there is no second branch: DLR is an initial value of B*, and with weight
decay a place to decay to,

    B* ← B* - lr λ (B* - (α/√K) E) - the step          instead of  B* ← B* - lr λ B* - the step

Cost: none in parameters or operations; decaying to the reuse adds lr λ α/√K to d_out numbers after each step.

Source: Wang, Tang, Cheng and Saukh, "DLR", arXiv 2606.28932, and the authors' layer, nanguoyu/DLR. The training settings are not
published; CoLA's hold.

Departures. α is not trained. Optimizers whose step goes by the size of the weights (Spectron, Adafactor) see B*, not B.
"""

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.hooks import StepHook
from lorank.layers import factor, loaded
from lorank.method import seeded_generator
from lorank.optim.groups import rate
from lorank.optim.shards import like, local


def reused(d_out: int, rank: int, drawn_for: str | None = None) -> Tensor:
    """The column of the 1 in each row of E [d_out]; at random, the same for each name, if a name is given.

    >>> reused(7, 3)
    tensor([0, 0, 0, 1, 1, 1, 2])
    """
    if drawn_for is not None:
        return torch.randint(rank, (d_out,), generator=seeded_generator("dlr", drawn_for))
    return (torch.arange(d_out) // -(-d_out // rank)).clamp(max=rank - 1)


def reuse(d_out: int, rank: int, alpha: float = 1.0, drawn_for: str | None = None, **options: Any) -> Tensor:
    """(α/√K) E [d_out, r], with these options of a new tensor."""
    columns = reused(d_out, rank, drawn_for)[:, None].to(options.get("device"))
    return torch.zeros(d_out, rank, **options).scatter_(1, columns, alpha * (-(-d_out // rank)) ** -0.5)


class Reusing(nn.Module):
    """Mixed into a `LowRankLinear` or `LowRankExperts`: its B starts at CoLA's plus `reuse`, and is B*."""

    alpha, drawn_for = 1.0, None
    silent: tuple[str, ...] = ()

    def start(self, alpha: float, drawn_for: str | None) -> Self:
        """Add the reuse to B as it was drawn."""
        self.alpha, self.drawn_for = alpha, drawn_for
        self.B_star().data.add_(self.reuse())
        return self

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if not loaded(B := self.B_star()):
            B.data.add_(self.reuse())

    def B_star(self) -> nn.Parameter:
        """B* [..., d_out, r]."""
        B = factor(self, "B")
        assert B is not None
        return B

    def reuse(self) -> Tensor:
        """(α/√K) E, in B's type and where it is."""
        d_out, rank = (B := self.B_star()).shape[-2:]
        return reuse(d_out, rank, self.alpha, self.drawn_for, dtype=B.dtype, device=B.device)


class DecayToReuse(StepHook):
    """After each step, gives B* back what weight decay took of (α/√K) E."""

    def __init__(self, optimizer: Optimizer, layers: Iterable[Reusing]):
        super().__init__(optimizer)
        self.layers = list(layers)

    @torch.no_grad()
    def after_step(self) -> None:
        rates = {p: rate(g) * g["weight_decay"] for g in self.optimizer.param_groups for p in g["params"]}  # lr λ
        for layer in self.layers:
            B = layer.B_star()
            if B.grad is not None and rates.get(B):
                local(B).add_(local(like(layer.reuse().expand(B.shape), B)), alpha=rates[B])
