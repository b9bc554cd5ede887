"""Spectron: both factors of a low-rank map take orthonormal steps, short enough that their product moves by at most lr.

    A ← A - ρ O_A, B ← B - ρ O_B        of W = B A,  ρ = lr / (σ_A + σ_B + 1),  in detail:

    M_A ← β M_A + (1 - β) ∂A         O_A = orth(M_A)         and for B alike
    σ_A = ‖A‖₂, σ_B = ‖B‖₂           spectral norms before the step, by one power iteration from a vector u that is kept
    A ← (1 - lr λ) A - ρ O_A         B ← (1 - lr λ) B - ρ O_B

    A, M_A, O_A [r, d_in]     B, M_B, O_B [d_out, r]     u_A [min(r, d_in)], u_B [min(r, d_out)]     ρ one number per pair

Saves: optimizer state.

ΔW = -ρ (O_B A + B O_A) + ρ² O_B O_A, so ‖ΔW‖₂ ≤ ρ (σ_A + σ_B) + ρ² ≤ lr wherever ρ ≤ 1 and ‖O‖₂ ≤ 1. The exact polar factor
has the norm 1. Newton-Schulz, which is faster, may give up to 1.2024; `bounded` divides by that. Small factors take a step
much shorter than lr, and the step is not the same if A is multiplied by a constant and B divided by it. Weight decay makes σ
smaller and so ρ larger. All else (embeddings, head, norms, biases) uses AdamW at the rate `adamw_lr`.

State of a pair: r (d_in + d_out) numbers of momentum, half of Adam's, and the two vectors.

Source: Janson, Oyallon and Belilovsky, arXiv 2602.12429. There is no code of the authors; this is from the paper's text.

Departures. The first σ is exact, because a power iteration from a random vector makes it too small: the first step was up to
1.55 times lr in 200 random pairs. Nothing is published for a non-linearity between the factors (CoLA); there the bound holds
for the product B A, and for what the layer computes up to the largest slope of the activation (1.1 for SiLU).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lorank.fields import Fraction, NonNegative
from lorank.method import Patterns
from lorank.optim.driver import ByGroups
from lorank.optim.newton_schulz import newton_schulz, newton_schulz_flops
from lorank.optim.pairs import PairRule, pair_groups
from lorank.optim.rule import Group, Rule, State
from lorank.optim.stacks import as_stack

LARGEST = 1.2024
"""Of the singular values that five steps of Newton-Schulz make of those in (0, 1]."""
Orthonormalise = Literal["newton-schulz", "polar"]


def polar(M: Tensor) -> Tensor:
    """U Vᵀ of M = U S Vᵀ [k, m, n], without the directions in which M is 0."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    there = S[..., :1] * torch.finfo(S.dtype).eps * max(M.shape) < S
    return (U * there[..., None, :]) @ Vh


def leading(W: Tensor) -> Tensor:
    """u [k, min(m, n)]: the first singular vector of the shorter side of W [k, m, n]."""
    return torch.linalg.svd(_wide(W), full_matrices=False).U[..., 0]


def iterated_norm(W: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """σ [k] of W [k, m, n] by one power iteration from u, never too large, and the next u. Where W u = 0, u stays."""
    X, tiny = _wide(W), torch.finfo(W.dtype).tiny
    v = X.mT @ u[..., None]
    w = (X @ (v / v.norm(dim=-2, keepdim=True).clamp(min=tiny)))[..., 0]
    sigma = w.norm(dim=-1)
    return sigma, torch.where(sigma[..., None] > 0, w / sigma[..., None].clamp(min=tiny), u)


def _wide(W: Tensor) -> Tensor:
    return W if W.shape[-2] <= W.shape[-1] else W.mT


def radius(lr: float, sigma_A: Tensor, sigma_B: Tensor) -> Tensor:
    """ρ."""
    return lr / (sigma_A + sigma_B + 1)


@dataclass(frozen=True)
class SpectronRule(PairRule):
    """The step of stacks of pairs of equal shapes."""

    orthonormalise: Orthonormalise = "newton-schulz"
    bounded: bool = False

    kept: ClassVar[tuple[str, ...]] = ("momentum_buffer", "u")
    defaults: ClassVar[Mapping[str, Any]] = {"momentum": 0.95}
    types: ClassVar[Mapping[str, Any]] = {"momentum": Fraction}

    def make(self, like: Tensor) -> State:
        u = like.new_zeros(
            (*like.shape[:-2], min(like.shape[-2:])), dtype=torch.promote_types(like.dtype, torch.float32)
        )
        step = torch.zeros((), dtype=torch.float32, device="cpu")
        return {"step": step, "momentum_buffer": like.new_zeros(like.shape), "u": u}

    def move(self, W: list[Tensor], G: list[Tensor], states: list[State], group: Group) -> None:
        sigmas, steps = [], []
        for V, gradient, state in zip(W, G, states, strict=True):
            M = state["momentum_buffer"].lerp(gradient, 1 - group["momentum"])
            u = state["u"] if int(state["step"]) else leading(V)
            sigma, u = iterated_norm(V, u)
            sigmas.append(sigma)
            steps.append(self.orth(M))
            state.update(step=state["step"] + 1, momentum_buffer=M, u=u)
        rho = radius(group["lr"], *sigmas)[:, None, None]
        for V, step in zip(W, steps, strict=True):
            V.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rho * step)

    def orth(self, M: Tensor) -> Tensor:
        """O of M [k, m, n]; 0 where M is."""
        if self.orthonormalise == "polar":
            return polar(M)
        return newton_schulz(M) / (LARGEST if self.bounded else 1.0)

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        k, m, n = as_stack(shape)
        return k * (m * n * itemsize + min(m, n) * max(itemsize, 4))

    def flops(self, shape: Sequence[int]) -> int:
        """Newton-Schulz and two products with a vector; decompositions are not included."""
        k, m, n = as_stack(shape)
        return k * (4 * m * n + (0 if self.orthonormalise == "polar" else newton_schulz_flops(m, n)))


@dataclass(frozen=True, kw_only=True)
class Spectron(ByGroups):
    """Spectron for the pairs of a low-rank model, AdamW for the rest; ``lorank.optimizer(model, Spectron(), lr=0.05)``.

    In groups of your own, ``{"params": [A, B, A, B, ...], "rule": "spectron"}`` has the weights of pairs in order.
    """

    name: ClassVar[str] = "spectron"
    structure: ClassVar[str | None] = "low-rank"
    rule: ClassVar[str] = "muon"  # of a dense twin, which has no pairs

    momentum: Fraction = 0.95
    """β."""
    adamw_lr: NonNegative = 3e-3
    """Learning rate of all other parameters; a schedule multiplies it as it does `lr`."""
    orthonormalise: Orthonormalise = "newton-schulz"
    """Five steps of Newton-Schulz, or the exact polar factor."""
    bounded: bool = False
    """Divide what Newton-Schulz gives by 1.2024, so that ‖ΔW‖₂ ≤ lr holds for certain."""
    unpaired: Literal["refuse", "adamw"] = "refuse"
    """What becomes of projections in the blocks that have no factors; routers and the like are AdamW's anyway."""

    @property
    def rules(self) -> Mapping[str, Rule]:
        return {**super().rules, "spectron": SpectronRule(self.orthonormalise, self.bounded)}

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        own = {"momentum": self.momentum} if group.get("rule") == "spectron" else {"lr": self.adamw_lr}
        return super().settings({**own, **group})

    def parameter_groups(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], targets: Patterns, exclude: Patterns
    ) -> list[dict[str, Any]]:
        return pair_groups(model, groups, self.name, refuse=self.unpaired == "refuse")
