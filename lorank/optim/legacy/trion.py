"""Trion: orthonormalised momentum (Muon) in r columns of a cosine basis, with what is left out fed back.

    B = M + G
    I = r columns of B Qᵀ with the largest norms,  b = (B Qᵀ)[:, I]
    M ← μ B + (1 - μ) (B - b Q[I])                 error feedback through the momentum
    o = NS₅(b)                                     b with its singular values brought near 1
    W ← (1 - lr λ) W - lr scale o Q[I]

    G, W, M, B [m, n], m >= n (else transposed)     Q [n, n]     I [r]     b, o [m, r]

The Newton-Schulz products are r wide instead of n. State: m n numbers per matrix. Groups without rank take AdamW at
the rate `adamw_lr`.

Source: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models", arXiv
2505.17967; NS₅ with Jordan's coefficients (Muon).

Departures from the authors' code, whose left projection by FFT goes back in another basis than it came in: here both sides
use the rows of Q.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lorank.method import Published
from lorank.optim.dct import Transform, back, check_choice, columns, select, transform, transform_flops
from lorank.optim.legacy.matrices import MatrixOptimizer, Stack

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SCALES = {
    "dion": lambda m, n: (m / n) ** 0.5,
    "kj": lambda m, n: max(1.0, m / n) ** 0.5,
    "kimi": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "none": lambda m, n: 1.0,
}
"""Length of an update by d_out = m and d_in = n."""


def state_elements(m: int, n: int, r: int) -> int:
    """Numbers kept for a matrix [m, n]: the momentum, whatever the rank."""
    return m * n


def newton_schulz(b: Tensor, steps: int = 5) -> Tensor:
    """b [k, m, r] with singular values near 1 (0.68 to 1.16 where they were not below 0.005 of its norm)."""
    x, y, z = COEFFICIENTS
    X = b / (b.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = X.shape[-2] <= X.shape[-1]
    X = X if wide else X.mT
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=y, alpha=z), X, beta=x)  # x X + (y A + z A A) X
    return X if wide else X.mT


def newton_schulz_flops(m: int, n: int, steps: int = 5) -> int:
    """Of `newton_schulz` on [m, n] with the shorter side s and the longer l: steps (4 s² l + 2 s³).

    >>> newton_schulz_flops(20, 3)
    3870
    """
    short, long = min(m, n), max(m, n)
    return steps * (4 * short * short * long + 2 * short**3)


class Trion(MatrixOptimizer):
    """Muon in a cosine subspace, for the groups with a `rank`; see `MatrixOptimizer` for the errors.

    Args:
        params: parameters or groups; a rank above a matrix's shorter side is that side.
        momentum: μ; 1 accumulates everything.
        scale: "dion" √(m/n), "kj" √max(1, m/n), "kimi" 0.2 √max(m, n), or "none", with m = d_out and n = d_in.
        betas, eps: of AdamW, for the groups without rank.
        adamw_lr: learning rate of the groups without rank that give none; a schedule multiplies it as it does `lr`.
        orthonormalise_in: dtype of the Newton-Schulz products, or its name; None: the gradient's (the authors': bfloat16).
    """

    # the paper's comparison with Dion and Muon; 1b is its 1.3B, whose shape is not known to us
    published: ClassVar[Published] = {"350m": {"rank": 256}, "1b": {"rank": 256}}

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        scale: Literal["dion", "kj", "kimi", "none"] = "dion",
        adamw_lr: float = 3e-4,
        ell_norm: float = 1.0,
        transform: Transform = "matmul",
        orthonormalise_in: torch.dtype | str | None = None,
    ):
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r} is none of {', '.join(SCALES)}")
        check_choice(transform, ell_norm)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum!r} is not in [0, 1]; the usual one is 0.95")
        if isinstance(orthonormalise_in, str):
            orthonormalise_in = getattr(torch, orthonormalise_in, None)
            if not isinstance(orthonormalise_in, torch.dtype) or not orthonormalise_in.is_floating_point:
                raise ValueError("orthonormalise_in is no floating-point dtype of torch; give bfloat16, for example")
        self.adamw_lr = adamw_lr
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults)
        self.scale, self.ell_norm, self.transform = scale, ell_norm, transform
        self.orthonormalise_in = orthonormalise_in

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group without rank takes `adamw_lr` unless it says otherwise."""
        if param_group.get("rank") is None:
            param_group.setdefault("lr", self.adamw_lr)
        super().add_param_group(param_group)

    @staticmethod
    def state_bytes(m: int, n: int, rank: int, itemsize: int, **_: Any) -> int:
        """Bytes kept for a matrix [m, n] of `itemsize` bytes per number: its momentum."""
        return m * n * itemsize

    @staticmethod
    def step_flops(m: int, n: int, rank: int, *, transform: Transform = "matmul", **_: Any) -> int:
        """FLOPs of matrix products in a step on a matrix [m, n]: B Qᵀ, b Q[I], Newton-Schulz on b, o Q[I].

        >>> Trion.step_flops(20, 10, 3, transform="fft") - newton_schulz_flops(20, 3)
        2400
        """
        there = transform_flops(max(m, n), min(m, n), transform)
        return there + 2 * 2 * m * n * rank + newton_schulz_flops(max(m, n), rank)

    def step_stack(self, stack: Stack, G: Tensor) -> Tensor:
        group, n = stack.group, G.shape[-1]
        B = G + stack.get("momentum") if int(stack.states[0]["steps"]) else G
        S = transform(B, self.transform)
        chosen = select(S, min(group["rank"], n), self.ell_norm)
        b = columns(S, chosen)
        stack.put("momentum", B - (1 - group["momentum"]) * back(b, chosen, n))
        o = newton_schulz(b.to(self.orthonormalise_in or b.dtype)).to(b.dtype)
        length = group["lr"] * SCALES[self.scale](*stack.parameters[0].shape)
        return -length * back(o, chosen, n)
