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

from lorank.optim import galore
from lorank.optim.galore import GaLoreAdamW
from lorank.optim.matrices import Stack
from lorank.parametrization import Published

GAMMA = 1.01
"""Largest growth of the residual's norm from one step to the next."""
EPS = 1e-8


def column_factors(inside: Tensor, projected: Tensor, columns: bool) -> Tensor:
    """k: the length that Adam gives each column (or row) of R, over the length it had; broadcasts against G."""
    along = -2 if columns else -1
    return (norm(inside, along) / (norm(projected, along) + EPS)).to(inside.dtype)


def norm(matrices: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """In single precision at least, where `EPS` is a number."""
    wide = torch.promote_types(matrices.dtype, torch.float32)
    return torch.linalg.vector_norm(matrices, dim=dim, keepdim=True, dtype=wide)


def residual_norm(G: Tensor, R: Tensor, k: Tensor, alpha: float, columns: bool) -> Tensor:
    """‖k E‖ of E = G - α P R, without E: PᵀP = I gives ‖E[:, i]‖² = ‖G[:, i]‖² - (2 α - α²) ‖R[:, i]‖²."""
    along = -2 if columns else -1
    squares = norm(G, along).double() ** 2 - (2 * alpha - alpha**2) * norm(R, along).double() ** 2
    return (k.double() ** 2 * squares.clamp(min=0)).sum(dim=(-2, -1)).sqrt()


def limiter(length: Tensor, before: Tensor) -> Tensor:
    """What shortens S [k, m, n] of norms `length` [k] where they exceed GAMMA times the norm `before` [k] (0 or less: there was
    none, or nothing to compare with)."""
    growth = length / (before + EPS)
    return torch.where(before <= 0, torch.ones_like(growth), GAMMA / growth.clamp(min=GAMMA))


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
        if any(group["rank"] is not None and group["projection"] == "full" for group in self.param_groups):
            raise ValueError("projection='full' leaves no columns to scale; take std, left or right")
        if self.in_backward:
            raise ValueError("in_backward=True frees the gradient whose residual Fira needs; leave it out")
        self.residual, self.scaling = residual, scaling

    @staticmethod
    def state_bytes(m: int, n: int, rank: int, itemsize: int, **options: Any) -> int:
        """GaLore's, and one number."""
        return GaLoreAdamW.state_bytes(m, n, rank, itemsize, **options) + itemsize

    @staticmethod
    def step_flops(m: int, n: int, rank: int, **options: Any) -> float:
        """As GaLore's: G to R, and one product back; the residual costs none of its own, see `leave`."""
        return GaLoreAdamW.step_flops(m, n, rank, **options)

    def leave(self, stack: Stack, inside: Tensor, left: Tensor | None, right: Tensor | None) -> None:
        """W ← W - lr (α P N + s S) with S = c (G - a P R) as two products: s c G goes to W at once, α N - s a c R by P."""
        lr, alpha, repo = stack.group["lr"], stack.group["scale"], self.residual == "repo"
        G, R, N = stack.gradients(), self.projected(stack), -inside
        (b1, b2), t = stack.group["betas"], int(stack.states[0]["steps"])
        correction = (1 - b2**t) ** 0.5 / (1 - b1**t) if repo else 1.0  # which the authors apply after the limiter
        a, s, columns = (alpha, correction, left is not None) if repo else (1.0, alpha, left is not None)
        if self.scaling == "matrix":
            k = (norm(N, (-2, -1)) / (norm(R, (-2, -1)) + EPS)).to(N.dtype)
        else:
            k = column_factors(N, R, columns)
        before = torch.stack([self.state[p].get("norm", G.new_tensor(-1.0)) for p in stack.parameters])
        length = residual_norm(G, R, k, a, columns) / correction
        shorter = limiter(length, before.double())
        for p, norm_now in zip(stack.parameters, (shorter * length).to(G.dtype), strict=True):
            self.state[p]["norm"] = norm_now.clone()
        c = k * (shorter / correction)[:, None, None].to(k.dtype)
        stack.add(-lr * s * c * G)
        within = alpha * N - s * a * c * R
        if left is not None:
            stack.add_product(left, within, -lr)
        elif right is not None:
            stack.add_product(within, right, -lr)
