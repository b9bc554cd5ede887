"""Fira: GaLore, and outside its subspace plain gradient descent at the step length that Adam takes inside.

    W ← W - lr α (P Adam(Pᵀ G) + k E)        E = G - P Pᵀ G,  in detail:

    R, N as in GaLore (N with Adam's bias correction)
    E = G - P R                                     the part of the gradient that GaLore throws away
    kᵢ = ‖N[:, i]‖ / (‖R[:, i]‖ + ε)                 one factor per column (per row, if projected from the right)
    S = kᵢ E[:, i],    S ← S γ / max(‖S‖ / (‖S'‖ + ε), γ),   γ = 1.01      S' the S of the step before
    W ← W - lr α (P N + S)

    G, W, E, S [m, n]     P [m, r]     R, N [r, n]     k [n]          (m < n; transposed for m >= n)

Saves: optimizer state.

State: GaLore's, and the norm of S, one number per matrix.

Source: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv 2410.01623.

Departures. The authors' code is not the paper's algorithm: it takes E = G - α P R and S at the full learning rate. Both are
here, the paper's by default (`residual="paper"`), the code's as ``residual="repo"``; the published figures were
presumably made with the latter, whose limiter compares norms without Adam's bias correction. A residual of norm 0 limits
nothing; in the authors' code one gradient of zero keeps it near 0 for hundreds of steps.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lorank.method import Published
from lorank.optim import galore
from lorank.optim.bases import sides
from lorank.optim.galore import GaLore
from lorank.optim.stacks import Product, Stack

GAMMA = 1.01
"""Largest growth of the residual's norm from one step to the next."""
EPS = 1e-8


def column_factors(inside: Tensor, projected: Tensor, columns: bool) -> Tensor:
    """k: the length that Adam gives each column (or row) of R, over the length it had; broadcasts against G."""
    along = -2 if columns else -1
    return norm(inside, along) / (norm(projected, along) + EPS)


def norm(matrices: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """In single precision at least, where `EPS` is a number and k may be large."""
    wide = torch.promote_types(matrices.dtype, torch.float32)
    return torch.linalg.vector_norm(matrices, dim=dim, keepdim=True, dtype=wide)


def limited(residual: Tensor, before: Tensor) -> Tensor:
    """S [k, m, n], shortened where its norm exceeds GAMMA times the norm `before` [k] (0 or less: there was none, or nothing to
    compare with)."""
    growth = residual.norm(dim=(-2, -1)) / (before + EPS)
    factor = torch.where(before <= 0, torch.ones_like(growth), GAMMA / growth.clamp(min=GAMMA))
    return residual * factor[:, None, None]


def state_elements(m: int, n: int, r: int) -> int:
    """Numbers kept for a matrix [m, n]: GaLore's and the norm of S.

    >>> state_elements(1376, 512, 128)
    417793
    """
    return galore.state_elements(m, n, r) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fira(GaLore):
    """GaLore with the residual; not for projection="full", which has no columns to scale, nor for another rule or in_backward.

    Args:
        residual: "paper" or "repo", see above.
        scaling: "column", or "matrix" for one factor per matrix.
    """

    name: ClassVar[str] = "fira"
    # the authors' scripts; the paper's text has an eighth of GaLore's rank at 7b, 128
    published: ClassVar[Published] = {
        "60m": {"rank": 128},
        "130m": {"rank": 256},
        "350m": {"rank": 256},
        "1b": {"rank": 512, "scale": 0.0625},
        "7b": {"rank": 64, "scale": 0.0625, "update_gap": 500},
    }

    projection: Literal["std", "reverse_std", "left", "right"] = "std"
    rule: Literal["adamw"] = "adamw"
    residual: Literal["paper", "repo"] = "paper"
    scaling: Literal["column", "matrix"] = "column"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_backward:
            raise ValueError("in_backward must be False with fira, whose residual needs the full gradient, got True")

    def move(self, stack: Stack, G: Tensor, group: dict[str, Any]) -> Tensor | Product:
        lr, alpha, repo = group["lr"], group["scale"], self.residual == "repo"
        R = stack.project(G)
        N = -stack.ruled(R, lr=1.0)  # also where a warm-up begins at 0
        E = G - stack.lift(R, alpha if repo else 1.0).value
        if self.scaling == "matrix":
            k = norm(N, (-2, -1)) / (norm(R, (-2, -1)) + EPS)
        else:
            k = column_factors(N, R, columns=sides(group["projection"], *G.shape[1:])[0])
        before = torch.stack([state.get("norm", k.new_tensor(-1.0)).to(k) for state in stack.states])
        (b1, b2), t = group["betas"], stack.steps + 1
        correction = (1 - b2**t) ** 0.5 / (1 - b1**t) if repo else 1.0  # which the authors apply after the limiter
        S = limited(k * E / correction, before)
        stack.put("norm", S.norm(dim=(-2, -1)))
        return -lr * (stack.lift(N, alpha).value + (correction if repo else alpha) * S)

    def state_shapes(self, shape: Sequence[int], group: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
        shapes = super().state_shapes(shape, group)
        return shapes if shapes is None or group["rank"] is None else {**shapes, "norm": ()}

    def state_bytes(self, p: Tensor, group: Mapping[str, Any]) -> int:
        """GaLore's, and one number of at least single precision."""
        return super().state_bytes(p, group) + (0 if group.get("rank") is None else max(p.element_size(), 4))

    def step_flops(self, p: Tensor, group: Mapping[str, Any], *, micro_batches: int = 1) -> float:
        """GaLore's, and P R for the residual."""
        found = super().step_flops(p, group, micro_batches=micro_batches)
        return found if group.get("rank") is None else found + 2 * p.numel() * min(group["rank"], *p.shape)
