"""SMoRA: an adapter whose ranks are experts, of which a learned router picks a few for each token.

    y = W x + (α/k) B (g ⊙ A x) (+ b)      x [..., d_in]   A [r, d_in]   B [d_out, r]   W [d_out, d_in] frozen
    p = sigmoid(W_r x) + u n,  W_r [r/ρ, d_in],    g = k p / Σ p over the k largest p, else 0                    (1)
    after each step:  n_i <- n_i + sign(mean count - count_i)                                                   (2)

Saves: gradients, optimizer state.

An expert has ρ ranks, one by default; each value of g then stands for ρ ranks. (2) balances the load without a loss: n counts, for
each expert, how much more often than not it was chosen less than the mean, and u is small. n is not trained, and saved. The gate
depends on the input, so the adapter cannot be merged.

Cost of a layer: r (d_in + d_out) trained parameters and r d_in / ρ of the router: with d_in = d_out and ρ = 1, half of the adapter
once more. For n tokens 2 n (d_in d_out + r (d_in + d_out) + r d_in / ρ) operations forward, as all ranks are multiplied
(`lorank.adapters.gated.gathered` multiplies those that are chosen); backward the first term once more, and the others twice.

Source: Zhao et al., "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning", arXiv 2501.15103,
and the authors' code.

Confirmed in the authors' code: (1), (2), k = 8, r = 64, α = 16, u = 1e-5, LoRA's start, and that n is part of the gate's values, not
only of the choice. Departures. n is a count, not a sum of steps of u, so that 16 bits do not lose it. Counts are of a whole step, with
all its micro-batches, and n moves after it. The router has no bias and is drawn as A is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.adapters.gated import Adapted, Adapter, GatedAdapter, blockwise, kept, spread
from lorank.checkpointing import first_run
from lorank.fields import Count, NonNegative, Positive, Rank
from lorank.layers import Gate, like, wide
from lorank.method import Site, StepHook, rank_at

# ---- the mathematics


def choose(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(1): the values [..., k] of the gate, whose sum is k, and the experts [..., k] that have them; p [..., experts] > 0."""
    values, chosen = kept(p, k)
    return values.shape[-1] * values / values.sum(-1, keepdim=True), chosen


def balanced(steps: Tensor, counts: Tensor) -> Tensor:
    """(2): n and the counts of a step, both [experts]; an expert that got the mean does not move."""
    return steps + torch.sign(counts.sum() - counts * len(counts)).to(steps.dtype)


# ---- the layer


class Router(Gate):
    """p = sigmoid(W_r x) + u n, in single precision or better."""

    steps: Tensor
    counts: Tensor | None = None
    """Of this process since the last step; no buffer, since DDP would overwrite it with the first process's before a micro-batch."""

    def __init__(self, d_in: int, experts: int, speed: float, **options: Any):
        super().__init__()
        self.speed = speed
        self.weight = nn.Parameter(torch.empty(experts, d_in, **options))
        self.register_buffer("steps", torch.zeros(experts, dtype=torch.int32, device=options["device"]))

    def draw(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        nn.init.zeros_(self.steps)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(wide(F.linear(x, self.weight))) + self.speed * self.steps

    @torch.no_grad()
    def count(self, chosen: Tensor) -> None:
        """Once, also in blocks that are computed again for the backward pass."""
        if first_run() is not None:
            return
        found = torch.zeros_like(self.steps, dtype=torch.int64)
        found.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        self.counts = found if self.counts is None else self.counts + found

    @torch.no_grad()
    def balance(self) -> None:
        counts = torch.zeros_like(self.steps, dtype=torch.int64) if self.counts is None else self.counts
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        self.steps.copy_(balanced(self.steps, counts))
        self.counts = None


class SMoRALinear(GatedAdapter):
    follows_input = True

    def __init__(self, dense: nn.Linear, rank: int, *, scale: float, top_k: int, expert_rank: int, speed: float):
        super().__init__(dense, rank, scale=scale)
        self.top_k, self.expert_rank = top_k, expert_rank
        self.router = Router(dense.in_features, rank // expert_rank, speed, **like(dense.weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.router.draw()

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and experts [..., k] for inputs x [..., d_in]."""
        values, chosen = choose(self.router(x), self.top_k)
        if self.training:
            self.router.count(chosen)
        return values, chosen

    def gate(self, x: Tensor, z: Tensor) -> Tensor:
        experts = self.rank // self.expert_rank
        gate = spread(*self.choose(x), experts)
        return gate if self.expert_rank == 1 else blockwise(gate, [self.expert_rank] * experts)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, top_k={self.top_k} of {self.rank // self.expert_rank}"


# ---- the method


@dataclass(frozen=True, kw_only=True)
class SMoRA(Adapter):
    """A mixture of ranks with a router; ``lorank.convert(model, SMoRA(rank=64))``."""

    name: ClassVar[str] = "smora"
    layer: ClassVar[type[Adapted]] = SMoRALinear
    soon: ClassVar[Mapping[str, Any]] = {"top_k": 2}

    rank: Rank = 64
    """Width of the factors: an integer, a fraction of the width, or {pattern: either}."""
    top_k: Count = 8
    """k: experts for each token, at most as many as there are."""
    expert_rank: Count = 1
    """ρ: ranks of an expert, a divisor of every rank."""
    alpha: Positive = 16.0
    """The low-rank term is multiplied by α/k."""
    balance: NonNegative = 1e-5
    """u: what one step of balancing adds to an expert's chance or takes from it; 0: none."""

    def build(self, site: Site) -> nn.Module:
        if (rank := rank_at(self.rank, site)) % self.expert_rank:
            raise ValueError(f"expert_rank must divide the rank {rank} of {site.name}, got {self.expert_rank}")
        return super().build(site)

    def options(self, site: Site) -> dict[str, Any]:
        scale, rho = self.alpha / self.top_k, self.expert_rank
        return {"scale": scale, "top_k": self.top_k, "expert_rank": rho, "speed": self.balance}

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook:
        return Balance(model, optimizer)


# ---- between steps


class Balance(StepHook):
    """Moves every router's n after each step (2)."""

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        super().__init__(optimizer)
        self.routers = [module for module in model.modules() if isinstance(module, Router)]

    def after_step(self) -> None:
        for router in self.routers:
            router.balance()
