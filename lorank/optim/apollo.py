"""APOLLO: the plain gradient, its columns scaled as Adam scales those of a random sketch of it.

    W ← W - lr α G diag(s)         sⱼ = ‖R̃[:, j]‖ / ‖R[:, j]‖,   R = P G,   R̃ = Adam(R),  in detail:

    P ~ N(0, 1/r)                                   drawn anew from a seed every T steps, never stored
    R = P G,    R̃ = M̂ / (√V̂ + ε)                    Adam's moments of the sketch, with bias correction
    s = ‖R̃[:, j]‖ / ‖R[:, j]‖  for each j           APOLLO; a column of zeros has s = 0
    s = ‖R̃‖ / ‖R‖,   r = 1,   α = √128              APOLLO-Mini
    D = α G diag(s),    D ← D γ ‖D'‖ / ‖D‖  if ‖D‖ > γ ‖D'‖,   γ = 1.01      D' the D of the step before
    W ← W - lr D - lr λ W

    G, W, D [m, n]     P [r, m]     R, R̃, M, V [r, n]     s [n]          (m <= n; transposed for m > n)

Saves: optimizer state.

State of a matrix: two moments of 2 r n numbers, a seed and a norm (Mini: 2 n + 2). Drawing P costs r m normal numbers a step
on the host; the experts of a mixture share one P.

The sketch has a fraction r/m of each column's squared length, so s is about √(r/m) of what full moments give. The paper
leaves this factor to the learning rate, and so do we. D does not change if all gradients are multiplied by a constant, but
it does under clipping, which comes first and acts on single steps.

Source: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270. Written from the paper's text alone:
its code is not free software, and we have not read it.

Departures. If a gradient of zero came before, nothing is limited (by the paper's rule all steps after it would be zero).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from lorank.fields import Bounds, Count, Positive, Rank, Whole
from lorank.method import Published, seeded_generator
from lorank.optim.driver import Projected
from lorank.optim.stacks import Stack, as_stack


def state_elements(m: int, n: int, r: int) -> int:
    """Numbers kept for a matrix [m, n]: moments of the sketch, a seed and a norm.

    >>> state_elements(1376, 512, 128), state_elements(1376, 512, 1)
    (352258, 2754)
    """
    return 2 * min(r, m, n) * max(m, n) + 2


def sketch(seed: int, refresh: int, r: int, m: int) -> Tensor:
    """P [r, m] with entries N(0, 1/r), the same in every process."""
    return torch.randn(r, m, generator=seeded_generator("apollo", seed, refresh)) * r**-0.5


def scaled(G: Tensor, R: Tensor, R_adam: Tensor, columns: bool) -> Tensor:
    """G diag(s) [k, m, n] by R and R̃ [k, r, n]; one s per matrix unless `columns`."""
    along = -2 if columns else (-2, -1)
    before, after = (torch.linalg.vector_norm(X, dim=along, keepdim=True) for X in (R, R_adam))
    return torch.where(before > 0, G / before * after, torch.zeros_like(G))


def limited(D: Tensor, before: Tensor, growth: float) -> Tensor:
    """D [k, m, n], shortened to `growth` times the norm `before` [k] where it is longer; 0 or less limits nothing."""
    norms = D.norm(dim=(-2, -1))
    factor = torch.where((before > 0) & (norms > growth * before), growth * before / norms, torch.ones_like(norms))
    return D * factor[:, None, None]


@dataclass(frozen=True, kw_only=True)
class APOLLO(Projected):
    """Adam's scaling from a sketch; ``lorank.optimizer(model, APOLLO(rank=128), lr=1e-2)``. Embeddings, head, norms and biases
    use AdamW."""

    name: ClassVar[str] = "apollo"
    soon: ClassVar[Mapping[str, Any]] = {"update_gap": 2}
    per_group: ClassVar[tuple[str, ...]] = ("update_gap", "scale")
    # a quarter of the width, but an eighth of GaLore's quarter at 7b
    published: ClassVar[Published] = {
        "60m": {"rank": 128},
        "130m": {"rank": 192},
        "350m": {"rank": 256},
        "1b": {"rank": 512},
        "7b": {"rank": 256},
    }

    rank: Rank = 0.25
    """r, rows of the sketch."""
    update_gap: Count = 200
    """T, steps between two draws of P."""
    scale: Positive = 1.0
    """α."""
    scaling: Literal["column", "matrix"] = "column"
    """One s per column, or one per matrix."""
    growth: Annotated[float, Bounds(least=1)] | None = 1.01
    """γ, the largest growth of ‖D‖ from one step to the next; None limits nothing."""
    seed: Whole = 0
    """Of all draws."""

    def prepare(self, stack: Stack) -> None:
        """Give each matrix the seed of its place in its group; it stays with the state."""
        for p, state in zip(stack.parameters, stack.states, strict=True):
            if "seed" not in state:
                place = next(i for i, q in enumerate(stack.group["params"]) if q is p)
                state["seed"] = torch.tensor(seeded_generator(self.seed, place).initial_seed())

    def move(self, stack: Stack, G: Tensor, group: dict[str, Any]) -> Tensor:
        tall = G.shape[-2] > G.shape[-1]
        G = G.mT.contiguous() if tall else G
        m, refresh = G.shape[-2], stack.steps // group["update_gap"]
        r = min(group["rank"], m)
        P = torch.stack([sketch(int(state["seed"]), refresh, r, m) for state in stack.states]).to(G)
        R = P @ G
        R_adam = -stack.ruled(R, lr=1.0).nan_to_num(nan=0.0)  # 0/0 where ε and all gradients were 0
        D = group["scale"] * scaled(G, R, R_adam, self.scaling == "column")
        if self.growth is not None:
            D = limited(D, stack.get("norm", or_else=-1.0).to(D), self.growth)
            stack.put("norm", D.norm(dim=(-2, -1)))
        return -group["lr"] * (D.mT if tall else D)

    def state_shapes(self, shape: Sequence[int], group: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
        if group["rank"] is None:
            return super().state_shapes(shape, group)
        *experts, m, n = shape
        moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), (*experts, min(group["rank"], m, n), max(m, n)))
        return {**moments, **({} if self.growth is None else {"norm": (*experts,)})}

    def state_bytes(self, p: Tensor, group: Mapping[str, Any]) -> int:
        """Moments in the weights' type, a seed of 8 bytes, and a norm of at least single precision."""
        if group.get("rank") is None:
            return super().state_bytes(p, group)
        (k, m, n), norm = as_stack(p.shape), 0 if self.growth is None else max(p.element_size(), 4)
        return k * ((state_elements(m, n, group["rank"]) - 2) * p.element_size() + norm) + 8

    def gathered_bytes(self, p: Tensor, group: Mapping[str, Any]) -> float:
        """G and R̃."""
        if group.get("rank") is None:
            return super().gathered_bytes(p, group)
        (k, m, n), itemsize = as_stack(p.shape), p.element_size()
        sketched = (k, min(group["rank"], m, n), max(m, n))
        rule = self.rules[self.settings(group)["rule"]]
        return p.numel() * itemsize + rule.gathered_inside(sketched, itemsize)

    def step_flops(self, p: Tensor, group: Mapping[str, Any], *, micro_batches: int = 1) -> float:
        """P G."""
        if group.get("rank") is None:
            return super().step_flops(p, group)
        return 2 * min(group["rank"], *p.shape[-2:]) * p.numel()


@dataclass(frozen=True, kw_only=True)
class APOLLOMini(APOLLO):
    """APOLLO with a sketch of one row and one s per matrix."""

    name: ClassVar[str] = "apollo-mini"
    published: ClassVar[Published] = {}

    rank: Rank = 1
    scale: Positive = 128**0.5
    """α for one row; with r rows s is √r times as large."""
    scaling: Literal["column", "matrix"] = "matrix"
