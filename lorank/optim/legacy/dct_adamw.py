"""DCT-AdamW: Adam on the r columns of each gradient that weigh most in a cosine basis, chosen anew at every step.

    A = G + E                                      E: what earlier steps left out (error feedback, if asked for)
    every T steps:  I ← r columns of A Qᵀ with the largest norms,  moments carried over to them
    a = (A Qᵀ)[:, I]                               E ← A - a Q[I]
    M ← β₁ M + (1 - β₁) a        V ← β₂ V + (1 - β₂) a²        u = M̂ / (√V̂ + ε)
    W ← (1 - lr λ) W - lr u Q[I]

    G, W, A, E [m, n], m >= n (else transposed)     Q [n, n]     I [r]     a, M, V, u [m, r]

State: 2 m r numbers and r indices per matrix; error feedback adds m n numbers, or m n bytes quantised.

Source: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models", arXiv
2505.17967.

Departures from the authors' code. Moments are carried by a gather, which is what their product with a 0/1 matrix does. The
previous indices are needed within a step only and are not stored. The quantiser has 256 levels (theirs: 16 in a byte).
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lorank.optim.dct import (
    Transform,
    back,
    carry,
    check_choice,
    columns,
    dequantise,
    quantise,
    select,
    transform,
    transform_flops,
)
from lorank.optim.legacy.matrices import MatrixOptimizer, Stack


def state_elements(m: int, n: int, r: int) -> int:
    """Numbers kept for a matrix [m, n] without error feedback: two moments [max(m, n), r], and r indices.

    >>> state_elements(5461, 2048, 256)
    2796288
    """
    return 2 * max(m, n) * r + r


class DCTAdamW(MatrixOptimizer):
    """AdamW whose groups with a `rank` are projected on cosines; see `MatrixOptimizer` for the errors.

    Args:
        params: parameters or groups; a group with ``rank`` is projected, a rank above the shorter side is that side.
        update_gap: steps between two choices of columns.
        ell_norm: 1 as the paper, or 2, which leaves the smallest residual.
        transform: "matmul" or "fft".
        error_feedback: "none", "full" (in the parameter's dtype), or "8bit".
        rotate: carry the moments of columns that stay; False leaves them where they are.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_gap: int = 1,
        ell_norm: float = 1.0,
        transform: Transform = "matmul",
        error_feedback: Literal["none", "full", "8bit"] = "none",
        rotate: bool = True,
    ):
        if error_feedback not in ("none", "full", "8bit"):
            raise ValueError(f"error_feedback={error_feedback!r} is none of none, full, 8bit")
        check_choice(transform, ell_norm)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "update_gap": update_gap}
        super().__init__(params, defaults)
        self.ell_norm, self.transform, self.error_feedback, self.rotate = ell_norm, transform, error_feedback, rotate

    @staticmethod
    def state_bytes(m: int, n: int, rank: int, itemsize: int, *, error_feedback: str = "none", **_: Any) -> int:
        """Bytes kept for a matrix [m, n] of `itemsize` bytes per number: moments, indices, error feedback."""
        error = {"none": 0, "full": m * n * itemsize, "8bit": m * n + 8 * max(m, n)}[error_feedback]
        return 2 * max(m, n) * rank * itemsize + 4 * rank + error

    @staticmethod
    def step_flops(
        m: int, n: int, rank: int, *, transform: Transform = "matmul", error_feedback: str = "none", **_: Any
    ) -> int:
        """FLOPs of matrix products in a step on a matrix [m, n]: A Qᵀ, u Q[I], and for error feedback a Q[I].

        >>> DCTAdamW.step_flops(20, 10, 3), DCTAdamW.step_flops(20, 10, 3, transform="fft", error_feedback="full")
        (5200, 2400)
        """
        back = 2 * m * n * rank
        return transform_flops(max(m, n), min(m, n), transform) + back * (1 if error_feedback == "none" else 2)

    def step_stack(self, stack: Stack, G: Tensor) -> Tensor:
        group, n, t = stack.group, G.shape[-1], int(stack.states[0]["steps"]) + 1
        A = G if t == 1 else G + self._left_out(stack, G)
        S = transform(A, self.transform)
        refreshed = t == 1 or t % group["update_gap"] == 0
        now = select(S, min(group["rank"], n), self.ell_norm) if refreshed else stack.get("indices").long()
        a = columns(S, now)
        wide = a.to(torch.promote_types(a.dtype, torch.float32))  # in half precision ε would be 0
        if t == 1:
            M, V = torch.zeros_like(wide), torch.zeros_like(wide)
        else:
            M, V = stack.get("exp_avg").to(wide.dtype), stack.get("exp_avg_sq").to(wide.dtype)
            if refreshed and self.rotate:
                before = stack.get("indices").long()
                M, V = carry(M, before, now, n), carry(V, before, now, n)
        (b1, b2), lr = group["betas"], group["lr"]
        M, V = M.lerp(wide, 1 - b1), (V * b2).addcmul(wide, wide, value=1 - b2)  # lerp makes NaN where a² is infinite
        u = (M / (1 - b1**t) / ((V / (1 - b2**t)).sqrt() + group["eps"])).to(a.dtype)
        for name, value in (("exp_avg", M.to(a.dtype)), ("exp_avg_sq", V.to(a.dtype)), ("indices", now.int())):
            stack.put(name, value)
        self._leave_out(stack, A - back(a, now, n) if self.error_feedback != "none" else None)
        return -lr * back(u, now, n)

    def _left_out(self, stack: Stack, G: Tensor) -> Tensor | float:
        if self.error_feedback == "none" or not {"error", "error_codes"} & stack.states[0].keys():
            return 0.0  # the latter where a state of a run without error feedback was loaded
        if self.error_feedback == "full":
            return stack.get("error")
        return dequantise(*(stack.get(f"error_{part}") for part in ("codes", "low", "step"))).to(G.dtype)

    def _leave_out(self, stack: Stack, E: Tensor | None) -> None:
        if E is None:
            return
        if self.error_feedback == "full":
            return stack.put("error", E)
        for part, values in zip(("codes", "low", "step"), quantise(E), strict=True):
            stack.put(f"error_{part}", values)
