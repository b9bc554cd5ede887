"""Fira: GaLore, and outside its subspace plain gradient descent at the step length that Adam takes inside.

    R, N as in GaLore (N with Adam's bias correction)
    E = G - P R                                     the part of the gradient that GaLore throws away
    kᵢ = ‖N[:, i]‖ / (‖R[:, i]‖ + ε)                 one factor per column (per row, if projected from the right)
    S = kᵢ E[:, i],    S ← S γ / max(‖S‖ / (‖S'‖ + ε), γ),   γ = 1.01      S' the S of the step before
    W ← W - lr α (P N + S)

    G, W, E, S [m, n]     P [m, r]     R, N [r, n]     k [n]          (m < n; transposed for m >= n)

State: GaLore's, and the norm of S, one number per matrix.

Source: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv 2410.01623.

Departures. The authors' code is not the paper's algorithm: it takes E = G - α P R and S at the full learning rate. Both are
here, the paper's by default (`residual="paper"`), the code's as ``residual="repo"``; the published figures were
presumably made with the latter. In both, norms for the limiter are taken with bias-corrected N.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lorank.optim import galore
from lorank.optim.galore import GaLoreAdamW
from lorank.optim.matrices import Stack
from lorank.optim.subspace import lift, project
from lorank.parametrization import Published

GAMMA = 1.01
"""Largest growth of the residual's norm from one step to the next."""
EPS = 1e-8


def column_factors(inside: Tensor, projected: Tensor, columns: bool) -> Tensor:
    """k: the length that Adam gives each column (or row) of R, over the length it had; broadcasts against G."""
    along = -2 if columns else -1
    return inside.norm(dim=along, keepdim=True) / (projected.norm(dim=along, keepdim=True) + EPS)


def limited(residual: Tensor, before: Tensor) -> Tensor:
    """S [k, m, n], shortened where its norm exceeds GAMMA times the norm `before` [k] (negative: there was none)."""
    growth = residual.norm(dim=(-2, -1)) / (before + EPS)
    factor = torch.where(before < 0, torch.ones_like(growth), GAMMA / growth.clamp(min=GAMMA))
    return residual * factor[:, None, None]


def state_elements(m: int, n: int, r: int) -> int:
    """Numbers kept for a matrix [m, n]: GaLore's and the norm of S.

    >>> state_elements(1376, 512, 128)
    417793
    """
    return galore.state_elements(m, n, r) + 1


class FiraAdamW(GaLoreAdamW):
    """GaLoreAdamW with the residual; not for projection="full", which has no columns to scale, nor for in_backward.

    Args:
        residual: "paper" or "repo", see above.
        scaling: "column", or "matrix" for one factor per matrix.
    """

    # the authors' scripts; the paper's text has an eighth of GaLore's rank at 7b, 128
    published: ClassVar[Published] = {
        "60m": {"rank": 128},
        "130m": {"rank": 256},
        "350m": {"rank": 256},
        "1b": {"rank": 512, "scale": 0.0625},
        "7b": {"rank": 64, "scale": 0.0625, "update_gap": 500},
    }

    def __init__(
        self,
        params: Iterable[Any],
        *,
        residual: Literal["paper", "repo"] = "paper",
        scaling: Literal["column", "matrix"] = "column",
        **galore: Any,
    ):
        if residual not in ("paper", "repo"):
            raise ValueError(f"residual={residual!r} is neither paper nor repo")
        if scaling not in ("column", "matrix"):
            raise ValueError(f"scaling={scaling!r} is neither column nor matrix")
        super().__init__(params, **galore)
        if any(group["rank"] is not None and group["projection"] == "full" for group in self.param_groups):
            raise ValueError("projection='full' leaves no columns to scale; take std, left or right")
        if self.in_backward:
            raise ValueError("in_backward=True frees the gradient whose residual Fira needs; leave it out")
        self.residual, self.scaling = residual, scaling

    @staticmethod
    def state_bytes(m: int, n: int, rank: int, itemsize: int, **options: Any) -> int:
        """GaLore's, and one number."""
        return GaLoreAdamW.state_bytes(m, n, rank, itemsize, **options) + itemsize

    def leave(self, stack: Stack, inside: Tensor, left: Tensor | None, right: Tensor | None) -> None:
        lr, alpha = stack.group["lr"], stack.group["scale"]
        if lr == 0:
            return
        G, N = stack.gradients(), inside / -lr
        R = project(G, left, right)
        E = G - (alpha if self.residual == "repo" else 1.0) * lift(R, left, right)
        if self.scaling == "matrix":
            k = N.norm(dim=(-2, -1), keepdim=True) / (R.norm(dim=(-2, -1), keepdim=True) + EPS)
        else:
            k = column_factors(N, R, columns=left is not None)
        states = [self.state[p] for p in stack.parameters]
        before = torch.stack([state.get("norm", G.new_tensor(-1.0)) for state in states])
        S = limited(k * E, before)
        for state, norm in zip(states, S.norm(dim=(-2, -1)), strict=True):
            state["norm"] = norm.clone()
        stack.add(-lr * (alpha * lift(N, left, right) + (1.0 if self.residual == "repo" else alpha) * S))
