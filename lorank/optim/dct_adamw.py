"""DCT-AdamW: Adam on the r columns of each gradient that weigh most in a cosine basis, chosen anew at every step.

    W ← W - lr Adam(G Q[I]ᵀ) Q[I]        Q cosines, I the r of them that weigh most,  in detail:

    A = G + E                                      E: what earlier steps left out (error feedback, if asked for)
    every T steps:  I ← r columns of A Qᵀ with the largest norms,  moments carried over to them
    a = (A Qᵀ)[:, I]                               E ← A - a Q[I]
    M ← β₁ M + (1 - β₁) a        V ← β₂ V + (1 - β₂) a²        u = M̂ / (√V̂ + ε)
    W ← (1 - lr λ) W - lr u Q[I]

    G, W, A, E [m, n], m >= n (else transposed)     Q [n, n]     I [r]     a, M, V, u [m, r]

Saves: optimizer state.

State: 2 m r numbers and r indices per matrix; error feedback adds m n numbers, or m n bytes quantised.

Source: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models", arXiv
2505.17967.

Departures from the authors' code. Moments are carried by a gather, which is what their product with a 0/1 matrix does. The
previous indices are needed within a step only and are not stored. The quantiser has 256 levels (theirs: 16 in a byte).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lorank.fields import Count, Positive
from lorank.optim.dct import (
    Transform,
    back,
    carry,
    columns,
    dequantise,
    quantise,
    select,
    some_columns,
    transform,
    transform_flops,
    vectors,
)
from lorank.optim.driver import Projected
from lorank.optim.stacks import Product, Stack, as_stack


def state_elements(m: int, n: int, r: int) -> int:
    """Numbers kept for a matrix [m, n] without error feedback: two moments [max(m, n), r], and r indices.

    >>> state_elements(5461, 2048, 256)
    2796288
    """
    return 2 * max(m, n) * r + r


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCTAdamW(Projected):
    """AdamW in a subspace of cosines.

    Args:
        rank: a rank above the shorter side is that side.
        update_gap: steps between two choices of columns.
        ell_norm: 1 as the paper, or 2, which leaves the smallest residual.
        transform: "matmul" or "fft".
        error_feedback: "none", "full" (in the parameter's dtype), or "8bit".
        rotate: carry the moments of columns that stay; False leaves them where they are.
    """

    name: ClassVar[str] = "dct-adamw"
    soon: ClassVar[Mapping[str, Any]] = {"update_gap": 2}
    per_group: ClassVar[tuple[str, ...]] = ("update_gap",)
    tall: ClassVar[bool] = True

    update_gap: Count = 1
    ell_norm: Positive = 1.0
    transform: Transform = "matmul"
    error_feedback: Literal["none", "full", "8bit"] = "none"
    rotate: bool = True

    def move(self, stack: Stack, G: Tensor, group: dict[str, Any]) -> Product:
        n, t = G.shape[-1], stack.steps + 1
        first = "exp_avg" not in stack.states[0]
        A = G if first else G + self._left_out(stack, G)
        refreshed = first or t % group["update_gap"] == 0
        if refreshed:
            S = transform(A, self.transform)
            now = select(S, min(group["rank"], n), self.ell_norm)
            a = columns(S, now)
        else:  # r columns are all that is needed
            now = stack.get("indices").long()
            a = some_columns(A, now, self.transform)
        if first:
            M, V = torch.zeros_like(a), torch.zeros_like(a)
        else:
            M, V = stack.get("exp_avg"), stack.get("exp_avg_sq")
            if refreshed and self.rotate:
                before = stack.get("indices").long()
                M, V = carry(M, before, now, n), carry(V, before, now, n)
        b1, b2 = group["betas"]
        M, V = M.lerp(a, 1 - b1), (V * b2).addcmul(a, a, value=1 - b2)
        u = M / (1 - b1**t) / ((V / (1 - b2**t)).sqrt() + group["eps"])
        for name, value in (("exp_avg", M), ("exp_avg_sq", V), ("indices", now.int())):
            stack.put(name, value)
        self._leave_out(stack, A - back(a, now, n) if self.error_feedback != "none" else None)
        return Product(u, vectors(now, n, u.dtype), -group["lr"])

    def _left_out(self, stack: Stack, G: Tensor) -> Tensor | float:
        if self.error_feedback == "none":
            return 0.0
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

    def state_shapes(self, shape: Sequence[int], group: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
        if group["rank"] is None:
            return super().state_shapes(shape, group)
        *experts, m, n = shape
        r = min(group["rank"], m, n)
        moment, all_of_it, row = (*experts, max(m, n), r), (*experts, max(m, n), min(m, n)), (*experts, max(m, n), 1)
        error = {
            "none": {},
            "full": {"error": all_of_it},
            "8bit": {"error_codes": all_of_it, "error_low": row, "error_step": row},
        }
        return {"exp_avg": moment, "exp_avg_sq": moment, "indices": (*experts, r), **error[self.error_feedback]}

    def state_bytes(self, p: Tensor, group: Mapping[str, Any]) -> int:
        """Bytes of moments, indices and error feedback."""
        if group.get("rank") is None:
            return super().state_bytes(p, group)
        (k, m, n), itemsize = as_stack(p.shape), p.element_size()
        rank = min(group["rank"], m, n)
        error = {"none": 0, "full": m * n * itemsize, "8bit": m * n + 8 * max(m, n)}[self.error_feedback]
        return k * (2 * max(m, n) * rank * itemsize + 4 * rank + error)

    def gathered_bytes(self, p: Tensor, group: Mapping[str, Any]) -> float:
        """G, moments and error feedback; of experts their indices too."""
        if group.get("rank") is None:
            return super().gathered_bytes(p, group)
        k, m, n = as_stack(p.shape)
        indices = 4 * k * min(group["rank"], m, n)
        read = 0.0 if p.ndim == 2 else 1.0 if self.rotate else 1 - 1 / self.settings(group)["update_gap"]
        return p.numel() * p.element_size() + self.state_bytes(p, group) - (1 - read) * indices

    def step_flops(self, p: Tensor, group: Mapping[str, Any], *, micro_batches: int = 1) -> float:
        """A Qᵀ every T steps and A Q[I]ᵀ in the others, by an FFT without products; u Q[I], and for error feedback a Q[I].

        >>> p = torch.empty(20, 10)
        >>> DCTAdamW().step_flops(p, {"rank": 3}), DCTAdamW(transform="fft", error_feedback="full").step_flops(p, {"rank": 3})
        (5200, 2400)
        >>> DCTAdamW(update_gap=2).step_flops(p, {"rank": 3})
        3800.0
        """
        if group.get("rank") is None:
            return super().step_flops(p, group)
        k, m, n = as_stack(p.shape)
        part, gap = 2 * m * n * min(group["rank"], m, n), self.settings(group)["update_gap"]
        chosen = transform_flops(max(m, n), min(m, n), self.transform)
        between = part if self.transform == "matmul" else 0
        into = chosen if gap == 1 else (chosen + (gap - 1) * between) / gap
        return k * (into + part * (1 if self.error_feedback == "none" else 2))
