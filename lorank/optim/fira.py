"""Fira: GaLore, and outside its subspace plain gradient descent at the step length that Adam takes inside.

    W ← W - lr (α P Adam(Pᵀ G) + k E)        E = G - α P Pᵀ G,  in detail:

    R, N as in GaLore (N with Adam's bias correction c)
    E = G - α P R                                   what the scaled step inside leaves of the gradient
    kᵢ = ‖N[:, i]‖ / (‖R[:, i]‖ + ε)                 one factor per column (per row, if projected from the right)
    S = kᵢ E[:, i],    S ← S γ / max(‖S / c‖ / (‖S' / c'‖ + ε), γ),   γ = 1.01      S', c' of the step before
    W ← W - lr (α P N + S)

    G, W, E, S [m, n]     P [m, r]     R, N [r, n]     k [n]          (m < n; transposed for m >= n)

Saves: optimizer state.

State: GaLore's, and the norm of S, one number per matrix. E is never formed: P N and P R are one product, and with orthonormal
P the norm of a column is ‖G[:, i]‖² - (2α - α²) ‖R[:, i]‖², but where that cancels.

Source: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv 2410.01623.

The above is the authors' code, with which their settings belong: ``residual="repo"``, the default. Algorithm 1 of the paper is
``residual="paper"``: E = G - P R, W ← W - lr α (P N + S), c = 1. Both at α = 0.25 are not two forms of one run: the paper's moves four
times less outside of the subspace, and its limiter, which sees Adam's bias correction shrink, passes half as much.

Departures. A residual that is zero up to rounding limits nothing. In the authors' code it does: one gradient of zero, or under the
paper's form one of rank r, would keep S near 0 for hundreds of steps.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lorank import renamed
from lorank.method import Published
from lorank.optim import galore
from lorank.optim.bases import basis_shapes, sides
from lorank.optim.galore import GaLore
from lorank.optim.stacks import Product, Stack, as_stack

GAMMA = 1.01
"""Largest growth of the residual's norm from one step to the next."""
EPS = 1e-8
LEAST_SHARE = 1e-2
"""Of ‖G‖² in ‖E‖², below which the difference of squares is not used."""


def column_factors(inside: Tensor, projected: Tensor, columns: bool) -> Tensor:
    """k: the length that Adam gives each column (or row) of R, over the length it had; broadcasts against G."""
    along = -2 if columns else -1
    return norm(inside, along) / (norm(projected, along) + EPS)


def norm(matrices: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """In single precision at least, where `EPS` is a number and k may be large."""
    wide = torch.promote_types(matrices.dtype, torch.float32)
    return torch.linalg.vector_norm(matrices, dim=dim, keepdim=True, dtype=wide)


def limited(residual: Tensor, before: Tensor) -> Tensor:
    """S [k, m, n], or its column norms [k, 1, n], shortened where the norm exceeds GAMMA times the norm `before` [k] (0 or less:
    there was none, or nothing to compare with)."""
    growth = residual.norm(dim=(-2, -1)) / (before + EPS)
    factor = torch.where(before <= 0, torch.ones_like(growth), GAMMA / growth.clamp(min=GAMMA))
    return residual * factor[:, None, None]


def column_norms(G: Tensor, R: Tensor, part: float, along: int) -> tuple[Tensor, Tensor]:
    """‖E[:, i]‖² of E = G - part · P R with orthonormal P and R = Pᵀ G, without E; and ‖G[:, i]‖²."""
    g, r = norm(G, along).square(), norm(R, along).square()
    return (g - (2 * part - part**2) * r).clamp(min=0), g


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

    once: ClassVar[Mapping[str, Any]] = {**GaLore.once, "residual": "paper"}
    per_group: ClassVar[tuple[str, ...]] = (*GaLore.per_group, "residual")

    projection: Literal["std", "reverse_std", "left", "right"] = "std"
    rule: Literal["adamw"] = "adamw"
    residual: Literal["paper", "repo"] = "repo"
    scaling: Literal["column", "matrix"] = "column"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_backward:
            raise ValueError("in_backward must be False with fira, whose residual needs the full gradient, got True")

    def move(self, stack: Stack, G: Tensor, group: dict[str, Any]) -> Tensor | Product:
        alpha, repo = group["scale"], group["residual"] == "repo"
        part, along = (alpha if repo else 1.0), -2 if sides(group["projection"], *G.shape[1:])[0] else -1
        R = stack.project(G)
        N = -stack.ruled(R, lr=1.0)  # also where a warm-up begins at 0
        if self.scaling == "matrix":
            k = norm(N, (-2, -1)) / (norm(R, (-2, -1)) + EPS)
        else:
            k = column_factors(N, R, columns=along == -2)
        (b1, b2), t = group["betas"], stack.steps + 1
        c = (1 - b2**t) ** 0.5 / (1 - b1**t) if repo else 1.0
        lengths, whole = self._lengths(stack, G, R, k / c, part, along)
        before = stack.get("norm", or_else=-1.0).to(k)
        S = limited(lengths, before)
        after, unlimited = S.norm(dim=(-2, -1)), lengths.norm(dim=(-2, -1))
        nothing = unlimited <= 10 * torch.finfo(stack.parameters[0].dtype).eps * whole.norm(dim=(-2, -1))
        stack.put("norm", after.masked_fill(nothing, 0.0))
        k = k * (after / unlimited.clamp(min=torch.finfo(k.dtype).tiny))[:, None, None] * (1.0 if repo else alpha)
        product = stack.lift(alpha * N - part * k * R)  # P (α N - α k R), and k G added to it
        return torch.baddbmm(k * G, product.a, product.b, alpha=product.scale).mul_(-group["lr"])

    def _lengths(self, stack: Stack, G: Tensor, R: Tensor, k: Tensor, part: float, along: int) -> tuple[Tensor, Tensor]:
        """Norms of the columns of k E and of k G. E is formed where a difference of squares would be inexact: little of G is left,
        or P is rounded."""
        e, g = column_norms(G, R, part, along)
        if (1 - part) ** 2 < LEAST_SHARE:
            rounded = stack.parameters[0].dtype.itemsize < 4
            left = (k.square() * e).sum(dim=(-2, -1)) < LEAST_SHARE * (k.square() * g).sum(dim=(-2, -1))
            if rounded or left.any():
                e = norm(G - stack.lift(R, part).value, along).square()
        return k * e.sqrt(), k * g.sqrt()

    def state_shapes(self, shape: Sequence[int], group: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
        shapes = super().state_shapes(shape, group)
        return shapes if shapes is None or group["rank"] is None else {**shapes, "norm": (*shape[:-2],)}

    def state_bytes(self, p: Tensor, group: Mapping[str, Any]) -> int:
        """GaLore's, and one number of at least single precision."""
        return super().state_bytes(p, group) + (
            0 if group.get("rank") is None else as_stack(p.shape)[0] * max(p.element_size(), 4)
        )

    def gathered_bytes(self, p: Tensor, group: Mapping[str, Any]) -> float:
        """GaLore's; the basis once more where E is formed because P is rounded. Where little of G is left it is too, which is left out."""
        found = super().gathered_bytes(p, group)
        if group.get("rank") is None or p.element_size() >= 4:
            return found
        (k, m, n), group = as_stack(p.shape), self.settings(group)
        part = group["scale"] if group["residual"] == "repo" else 1.0
        bases = basis_shapes(group["projection"], m, n, min(group["rank"], m, n)).values()
        formed = (1 - part) ** 2 < LEAST_SHARE
        return found + (k * sum(map(math.prod, bases)) * p.element_size() if formed else 0)


renamed.hint(__name__)
