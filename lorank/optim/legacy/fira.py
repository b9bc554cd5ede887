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
presumably made with the latter, whose limiter compares norms without Adam's bias correction. A residual of norm 0 limits
nothing; in the authors' code one gradient of zero keeps it near 0 for hundreds of steps.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lorank.method import Published
from lorank.optim.legacy import galore
from lorank.optim.legacy.galore import GaLoreAdamW
from lorank.optim.legacy.matrices import Stack
from lorank.optim.legacy.subspace import lift

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

    unit_lr = True  # N is wanted also where a warm-up begins at 0

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
        if self.in_backward:
            raise ValueError("in_backward=True frees the gradient whose residual Fira needs; leave it out")
        self.residual, self.scaling = residual, scaling

    def _admit(self, group: dict[str, Any]) -> dict[str, Any]:
        if group["rank"] is not None and group["projection"] == "full":
            raise ValueError("projection='full' leaves no columns to scale; take std, left or right")
        return super()._admit(group)

    @staticmethod
    def state_bytes(m: int, n: int, rank: int, itemsize: int, **options: Any) -> int:
        """GaLore's, and one number of at least single precision."""
        return GaLoreAdamW.state_bytes(m, n, rank, itemsize, **options) + max(itemsize, 4)

    @staticmethod
    def step_flops(m: int, n: int, rank: int, **options: Any) -> float:
        """GaLore's, and P R for the residual."""
        return GaLoreAdamW.step_flops(m, n, rank, **options) + 2 * m * n * rank

    def leave(self, stack: Stack, inside: Tensor, left: Tensor | None, right: Tensor | None) -> None:
        lr, alpha, repo = stack.group["lr"], stack.group["scale"], self.residual == "repo"
        G, R, N = stack.gradients(), self.projected(stack), -inside
        if stack.group["maximize"]:
            G, R = -G, -R
        E = G - (alpha if repo else 1.0) * lift(R, left, right)
        if self.scaling == "matrix":
            k = norm(N, (-2, -1)) / (norm(R, (-2, -1)) + EPS)
        else:
            k = column_factors(N, R, columns=left is not None)
        states = [self.state[p] for p in stack.parameters]
        before = torch.stack([state.get("norm", k.new_tensor(-1.0)).to(k.dtype) for state in states])
        (b1, b2), t = stack.group["betas"], int(stack.states[0]["steps"])
        correction = (1 - b2**t) ** 0.5 / (1 - b1**t) if repo else 1.0  # which the authors apply after the limiter
        S = limited(k * E / correction, before)
        for state, length in zip(states, S.norm(dim=(-2, -1)), strict=True):
            state["norm"] = length.clone()
        stack.add(-lr * (alpha * lift(N, left, right) + (correction if repo else alpha) * S))
