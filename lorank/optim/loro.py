"""LORO: Riemannian steps of W = B A on the manifold of matrices of rank r, every K steps; cheap steps of the factors between.

    W ← best rank-r approximation of W - lr P(G)         P the projection on the tangent space at W,  in detail:

    K - 1 of K steps:    A ← A - lr c D_A,   B ← B - lr c D_B,   c = r / width,   D = M / (√V + ε), Adam's direction
    each K-th step:      B = U R_B,   Aᵀ = V R_A                        (QR)
                         Y = D_B R_A⁻¹ = G V,   X = R_B⁻ᵀ D_A = Uᵀ G
                         W' = W - lr (U X + (I - U Uᵀ) Y Vᵀ)            of rank 2 r at most, never formed
                         B ← L √S,   A ← √S Rᵀ                          L S Rᵀ the first r singular triples of W'
                         all of Adam's moments, also of embeddings and head, begin anew

    A, D_A [r, d_in]     B, D_B [d_out, r]     U, Y [d_out, r]     V [d_in, r]     X [r, d_in]     R_A, R_B [r, r]

Saves: nothing beyond `low-rank`.

State: Adam's. An exact step costs two QR decompositions of 2 r columns and an SVD of 2 r x 2 r for each pair. lr has Adam's bias
correction. The schedule begins again, with a few steps of warm-up, after each exact step.

With gradients in place of D (``direction="gradient"``) the exact step is the projected gradient step, and it is the same for
(C A, B C⁻¹). With Adam's directions, which is the paper's, it is not: the r x r core of the step differs between the two
sides, and A's is taken. Then the factors between exact steps use gradients too, each by the inverse Gram matrix of the other.

Source: "Low-rank Riemannian optimizer", ICLR 2025, openreview i0zzO7Hslk; facts from the authors' code, mzf666/LORO-main.

Departures. Where B or A is nearly of a lower rank than r, so that R⁻¹ is not to be had, the pair takes the other step, and a
warning counts such pairs. Bases come from one QR of [U, Y], which also holds for r above half of d_out. Weight decay, 0 in
the paper, comes before each step.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lorank.experts import LowRankExperts
from lorank.fields import Count, Positive, Whole
from lorank.layers import LowRankLinear
from lorank.method import Patterns, Published
from lorank.optim.driver import ByGroups
from lorank.optim.pairs import PairRule, draw, pair_groups, pairs
from lorank.optim.rule import AdamW, Forgetful, Group, Rule, State, forget
from lorank.optim.rules import RULES
from lorank.optim.schedules import restarted_cosine
from lorank.optim.stacks import as_stack

Direction = Literal["adam", "gradient"]
Refresh = Literal["all", "factors", "none"]
logger = logging.getLogger(__name__)


# ---- mathematics


def retracted(A: Tensor, B: Tensor, D_A: Tensor, D_B: Tensor, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """A and B [k, ...] after an exact step, and which of the k could take one; the others are as they were."""
    k, r = A.shape[:2]
    if r > min(A.shape[2], B.shape[1]):
        return A, B, torch.zeros(k, dtype=torch.bool, device=A.device)
    (U, R_B), (V, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    there = _regular(R_B) & _regular(R_A)
    one = torch.eye(r, dtype=A.dtype, device=A.device).expand(k, r, r)
    R_B, R_A = (torch.where(there[:, None, None], R, one) for R in (R_B, R_A))
    Y = torch.linalg.solve_triangular(R_A, D_B, upper=True, left=False)  # D_B R_A⁻¹ [k, d_out, r]
    X = torch.linalg.solve_triangular(R_B.mT, D_A, upper=False)  # R_B⁻ᵀ D_A [k, r, d_in]
    C = X @ V
    X, Y = X - C @ V.mT, Y - U @ (U.mT @ Y)
    (L, T_L), (R, T_R) = torch.linalg.qr(torch.cat([U, Y], -1)), torch.linalg.qr(torch.cat([V, X.mT], -1))
    core = torch.cat([torch.cat([R_B @ R_A.mT - lr * C, -lr * one], -1), torch.cat([-lr * one, 0 * one], -1)], -2)
    left, values, right = torch.linalg.svd(T_L @ core @ T_R.mT)  # of W' = L (T_L core T_Rᵀ) Rᵀ
    root = values[..., None, :r].sqrt()
    new = (right[..., :r, :] * root.mT) @ R.mT, L @ (left[..., :r] * root)
    kept = (torch.where(there[:, None, None], after, before) for after, before in zip(new, (A, B), strict=True))
    return (*kept, there)  # type: ignore[return-value]


def _regular(R: Tensor) -> Tensor:
    """Which triangles [k, r, r] can be solved with."""
    diagonal = R.diagonal(dim1=-2, dim2=-1).abs()
    return diagonal.amin(-1) > diagonal.amax(-1) * R.shape[-1] * torch.finfo(R.dtype).eps


def preconditioned(A: Tensor, B: Tensor, G_A: Tensor, G_B: Tensor) -> tuple[Tensor, Tensor]:
    """(Bᵀ B)⁻¹ ∂A and ∂B (A Aᵀ)⁻¹, whose steps of the factors move B A alike for (C A, B C⁻¹)."""
    return torch.linalg.pinv(B.mT @ B, hermitian=True) @ G_A, G_B @ torch.linalg.pinv(A @ A.mT, hermitian=True)


def xavier_stds(d_in: int, d_out: int, rank: int) -> tuple[float, float]:
    """Standard deviations of A and B at the start of the authors' runs.

    >>> [round(std, 4) for std in xavier_stds(512, 1376, 128)]
    [0.0559, 0.0365]
    """
    return (2 / (d_in + rank)) ** 0.5, (2 / (d_out + rank)) ** 0.5


def initialise(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw all factors of a model anew with the standard deviations of `xavier_stds`, in place, before training."""
    draw(model, xavier_stds, generator)


# ---- rules


class LORORule(PairRule):
    """The steps of stacks of pairs of equal shapes."""

    kept: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    defaults: ClassVar[Mapping[str, Any]] = {"scaler": 1.0}
    types: ClassVar[Mapping[str, Any]] = {"eps": float, "scaler": Positive}

    def __init__(self, every: int | None, direction: Direction, refresh: Refresh):
        self.every, self.direction, self.refresh = every, direction, refresh

    def owns(self, state: Mapping[str, Any]) -> bool:
        return "steps" in state

    def make(self, like: Tensor) -> State:
        steps = torch.zeros((), dtype=torch.int64, device="cpu")
        return {**(AdamW().make(like) if self.direction == "adam" else {}), "steps": steps}

    def move(self, W: list[Tensor], G: list[Tensor], states: list[State], group: Group) -> None:
        (A, B), lr, c = W, group["lr"], group["scaler"]
        for V in W:
            V.mul_(1 - lr * group["weight_decay"])
        if self.direction == "adam":
            D, correction = zip(*(adam(g, of, group) for g, of in zip(G, states, strict=True)), strict=True)
            cheap, lr = [c * d for d in D], lr * correction[0]
        else:
            D, cheap = tuple(G), list(preconditioned(A, B, *G))
        done = int(states[0]["steps"]) + 1
        exact = self.every is not None and done % self.every == 0
        if exact:
            new_A, new_B, there = retracted(A, B, D[0], D[1], lr)
            if not there.all():
                logger.warning("%d of %d pairs of A %s took no exact step", (~there).sum(), len(there), [*A.shape[1:]])
            new = [
                torch.where(there[:, None, None], after, before - lr * step)
                for after, before, step in zip((new_A, new_B), W, cheap, strict=True)
            ]
        else:
            new = [before - lr * step for before, step in zip(W, cheap, strict=True)]
        for V, after in zip(W, new, strict=True):
            V.copy_(after)
        for state in states:
            state["steps"] += 1
            if exact and self.refresh != "none":
                forget(state)

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        return 2 * math.prod(shape) * itemsize if self.direction == "adam" else 0

    def flops(self, shape: Sequence[int]) -> int:
        """One factor's half of the products of an exact step, where d_in and d_out are at least 2 r; averaged over K steps. Of the
        other steps, and only with gradients: the Gram matrix, and the product with an inverse."""
        k, *sides = as_stack(shape)
        r, n = min(sides), max(sides)
        every = 0 if self.every is None else self.every
        exact = (8 * r * r * n + 17 * r**3) // every if every and self.direction == "adam" else 0
        return k * (exact + (4 * r * r * n if self.direction == "gradient" else 0))


def adam(G: Tensor, state: State, group: Group) -> tuple[Tensor, float]:
    """D of gradients [k, m, n], whose moments are brought up to date; and the bias correction of lr."""
    (b1, b2), t = group["betas"], int(state["step"]) + 1
    M, V = state["exp_avg"].lerp(G, 1 - b1), state["exp_avg_sq"].lerp(G * G, 1 - b2)
    state.update(step=state["step"] + 1, exp_avg=M, exp_avg_sq=V)
    return M / (V.sqrt() + group["eps"]), (1 - b2**t) ** 0.5 / (1 - b1**t)


@functools.lru_cache(maxsize=16)
def rules_of(every: int | None, direction: Direction, refresh: Refresh) -> Mapping[str, Rule]:
    rest = every if refresh == "all" and direction == "adam" else None
    return {**RULES, "adamw": Forgetful(rest), "loro": LORORule(every, direction, refresh)}


@dataclass(frozen=True, kw_only=True)
class LORO(ByGroups):
    """LORO for the factors of a low-rank model, AdamW for the rest; ``lorank.optimizer(model, LORO(), lr=0.01)``.

    In groups of your own, ``{"params": [A, B, A, B, ...], "rule": "loro", "scaler": c}`` has the weights of pairs in order.
    """

    name: ClassVar[str] = "loro"
    structure: ClassVar[str | None] = "low-rank"
    rule: ClassVar[str] = "adamw"  # of a dense twin
    soon: ClassVar[Mapping[str, Any]] = {"update_gap": 2, "restart_warmup_steps": 1}
    published: ClassVar[Published] = {
        "60m": {"update_gap": 500},
        "130m": {"update_gap": 500},
        "350m": {"update_gap": 500, "late_steps": 6_000},
        "1b": {"update_gap": 200},
    }

    update_gap: Count | None = 500
    """K, steps from one exact step to the next; None: there is none."""
    direction: Direction = "adam"
    """D: Adam's direction, or the gradient, with which the exact step does not depend on how W is factorised."""
    scaler: Positive | None = None
    """c of the steps between; None: r over the model's width."""
    refresh: Refresh = "all"
    """Whose moments begin anew after an exact step: "all", also of embeddings and head, only those of "factors", or "none"."""
    restart_warmup_steps: Count = 5
    """Steps of warm-up after an exact step."""
    late_steps: Whole | None = None
    """By how many steps the cosine is late; None: as long as the warm-up."""

    @property
    def rules(self) -> Mapping[str, Rule]:
        return rules_of(self.update_gap, self.direction, self.refresh)

    def parameter_groups(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], targets: Patterns, exclude: Patterns
    ) -> list[dict[str, Any]]:
        """One group for each c."""
        for pair in pairs(model):
            if type(pair.module) not in (LowRankLinear, LowRankExperts) or pair.module.activation is not None:
                raise ValueError(
                    "loro needs layers W = B A, as low-rank makes them without carry; use another optimizer for "
                    f"{pair.name}, a {type(pair.module).__name__}"
                )
        width, found = getattr(getattr(model, "config", None), "hidden_size", None), []
        for group in pair_groups(model, groups, self.name, refuse=False):
            if group["rule"] != self.name:
                found.append(group)
                continue
            by_scaler: dict[float, list[nn.Parameter]] = {}
            for A, B in zip(group["params"][::2], group["params"][1::2], strict=True):
                c = self.scaler or (A.shape[-2] / width if width else 1.0)
                by_scaler.setdefault(c, []).extend((A, B))
            found += [{**group, "params": some, "scaler": c} for c, some in by_scaler.items()]
        return found

    def schedule(self, steps: int, warmup_steps: int, min_lr_ratio: float) -> Callable[[int], float] | None:
        """The restarted cosine; None with Adam's directions left out or without exact steps, where nothing restarts."""
        if self.update_gap is None or self.direction == "gradient":
            return None
        late = warmup_steps if self.late_steps is None else self.late_steps
        given = {"steps": steps, "warmup": warmup_steps, "min_lr_ratio": min_lr_ratio, "every": self.update_gap}
        return lambda step: restarted_cosine(step, **given, restart=self.restart_warmup_steps, late=late)  # type: ignore[arg-type]
