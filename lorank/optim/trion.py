"""Trion: orthonormalised momentum (Muon) in r columns of a cosine basis, with what is left out fed back.

    W ← W - lr scale NS₅(B Q[I]ᵀ) Q[I]        B momentum, Q cosines, I the r of them that weigh most,  in detail:

    B = M + G
    I = r columns of B Qᵀ with the largest norms,  b = (B Qᵀ)[:, I]
    M ← μ B + (1 - μ) (B - b Q[I])                 error feedback through the momentum
    o = NS₅(b)                                     b with its singular values brought near 1
    W ← (1 - lr λ) W - lr scale o Q[I]

    G, W, M, B [m, n], m >= n (else transposed)     Q [n, n]     I [r]     b, o [m, r]

Saves: optimizer state.

The Newton-Schulz products are r wide instead of n. State: m n numbers per matrix. Groups without rank use AdamW at
the same rate or at `adamw_lr`; the authors' is 3e-4 next to 0.02.

Source: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models", arXiv
2505.17967; NS₅ with Jordan's coefficients (Muon).

Departures from the authors' code, whose left projection by FFT goes back in another basis than it came in: here both sides
use the rows of Q.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lorank.fields import Fraction, NonNegative, Positive
from lorank.method import Patterns, Published
from lorank.optim.dct import Transform, back, columns, select, transform, transform_flops, vectors
from lorank.optim.driver import Projected
from lorank.optim.groups import with_lengths
from lorank.optim.muon import SCALES, Scale
from lorank.optim.newton_schulz import newton_schulz, newton_schulz_flops
from lorank.optim.stacks import Product, Stack, as_stack
from lorank.optim.step import LowRankOptimizer


def state_elements(m: int, n: int, r: int) -> int:
    """Numbers kept for a matrix [m, n]: the momentum, whatever the rank."""
    return m * n


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trion(Projected):
    """Muon in a cosine subspace.

    Args:
        rank: a rank above the shorter side is that side.
        momentum: μ; 1 accumulates everything.
        scale: "dion" √(m/n), "kj" √max(1, m/n), "kimi" 0.2 √max(m, n), or "none", with m = d_out and n = d_in.
        adamw_lr: learning rate of the groups without rank that give none, None for `lr`; a schedule multiplies it as it does `lr`.
        ell_norm: 1 as the paper, or 2, which leaves the smallest residual.
        transform: "matmul" or "fft".
        orthonormalise_in: type of the Newton-Schulz products; None: single precision at least (the authors': bfloat16).
    """

    name: ClassVar[str] = "trion"
    # the paper's comparison with Dion and Muon; 1b is its 1.3B, whose shape is not known to us
    published: ClassVar[Published] = {"350m": {"rank": 256}, "1b": {"rank": 256}}
    once: ClassVar[Mapping[str, Any]] = {**Projected.once, "adamw_lr": 3e-4}
    per_group: ClassVar[tuple[str, ...]] = ("momentum",)
    tall: ClassVar[bool] = True

    momentum: Fraction = 0.95
    scale: Scale = "dion"
    adamw_lr: NonNegative | None = None
    ell_norm: Positive = 1.0
    transform: Transform = "matmul"
    orthonormalise_in: Literal["bfloat16", "float16", "float32", "float64"] | None = None

    def optimizer(
        self,
        groups: Iterable[Any],
        *,
        lr: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ) -> LowRankOptimizer:
        """As every method's; betas and eps are those of AdamW, for the groups without rank."""
        return super().optimizer(groups, lr=lr, betas=betas, eps=eps)

    def parameter_groups(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], targets: Patterns, exclude: Patterns
    ) -> list[dict[str, Any]]:
        made = super().parameter_groups(model, groups, targets, exclude)
        projected, rest = ([g for g in made if (g["rank"] is None) == plain] for plain in (False, True))
        return [*with_lengths(model, projected, SCALES[self.scale]), *rest]

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        own = {"lr": self.adamw_lr} if group.get("rank") is None and self.adamw_lr is not None else {}
        return super().settings({**own, **group})

    def move(self, stack: Stack, G: Tensor, group: dict[str, Any]) -> Product:
        n = G.shape[-1]
        B = G + stack.get("momentum") if "momentum" in stack.states[0] else G
        S = transform(B, self.transform)
        chosen = select(S, min(group["rank"], n), self.ell_norm)
        b = columns(S, chosen)
        stack.put("momentum", B - (1 - group["momentum"]) * back(b, chosen, n))
        products = getattr(torch, self.orthonormalise_in) if self.orthonormalise_in else b.dtype
        o = newton_schulz(b.to(products)).to(b.dtype)
        length = group["lr"] * SCALES[self.scale](*stack.parameters[0].shape[-2:])
        return Product(o, vectors(chosen, n, o.dtype), -length)

    def state_shapes(self, shape: Sequence[int], group: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
        if group["rank"] is None:
            return super().state_shapes(shape, group)
        *experts, m, n = shape
        return {"momentum": (*experts, max(m, n), min(m, n))}

    def state_bytes(self, p: Tensor, group: Mapping[str, Any]) -> int:
        """Bytes of the momentum."""
        return super().state_bytes(p, group) if group.get("rank") is None else p.numel() * p.element_size()

    def step_flops(self, p: Tensor, group: Mapping[str, Any], *, micro_batches: int = 1) -> float:
        """B Qᵀ, b Q[I], Newton-Schulz on b, o Q[I].

        >>> Trion(transform="fft").step_flops(torch.empty(20, 10), {"rank": 3}) - newton_schulz_flops(20, 3)
        2400
        """
        if group.get("rank") is None:
            return super().step_flops(p, group)
        k, m, n = as_stack(p.shape)
        rank, there = min(group["rank"], m, n), transform_flops(max(m, n), min(m, n), self.transform)
        return k * (there + 2 * 2 * m * n * rank + newton_schulz_flops(max(m, n), rank))
