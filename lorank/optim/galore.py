"""GaLore: Adam inside the leading singular subspace of each matrix's gradient, found anew every T steps.

    W ← W - lr α P Adam(Pᵀ G)        (m < n; otherwise from the right)  in detail:

    every T steps:   P = first r left singular vectors of G  (m < n),  or Q = first r right ones  (m >= n)
    R = Pᵀ G  or  G Qᵀ
    M ← β₁ M + (1 - β₁) R         V ← β₂ V + (1 - β₂) R²         N = √(1 - β₂ᵗ) / (1 - β₁ᵗ) · M / (√V + ε)
    W ← W - lr α P N  (or α N Q),  then W ← W - lr λ W

    G, W [m, n]     P [m, r]     Q [r, n]     R, M, V, N [r, n] or [m, r]

Saves: optimizer state.

The basis is that of the very gradient it projects, and the moments are not turned when it changes. State of a matrix:
2 r max(m, n) numbers and r min(m, n) for the basis, where Adam keeps 2 m n. The α of a projected group is a fraction of the
learning rate and does not depend on r. Another `rule` than AdamW works inside as on any weight.

Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, arXiv 2403.03507.

Departures from the authors' code. ε defaults to the paper's 1e-8 (theirs: 1e-6). "reverse_std" goes back on the side it
came from. As there, parameters without rank follow the same rule at α = 1, with ε added to √V and weight decay after the step:
torch's AdamW with another ε. Matrices of equal shape share one batched product. Tensors that are not matrices are refused, not
decomposed.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from lorank import renamed
from lorank.fields import Count, Positive
from lorank.method import Published
from lorank.optim.bases import BASES, Projection, basis_bytes, basis_flops, basis_shapes, inside_shape, sides
from lorank.optim.driver import Projected
from lorank.optim.rule import AdamW, Rule
from lorank.optim.rules import RULES
from lorank.optim.stacks import Product, Stack, as_stack

WITH_ITS_EPS = {**RULES, "adamw": AdamW(eps_after_root=True)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaLore(Projected):
    """Adam in the leading singular subspace of each gradient.

    Args:
        rank: a rank above the narrower side is that side.
        update_gap: T, steps between two refreshes of a basis; the first step has one.
        scale: α.
        projection: "std" projects the longer side and keeps the moments r wide on the shorter (m >= n from the
            right), "reverse_std" the other way round, "left", "right", or "full" from both sides.
        basis: "singular", "svd", "randomised", or a function of yours; see lorank/optim/bases.py.
        stagger: refresh the bases of a k-th of the matrices at a time instead of all in one long step.
        in_backward: project each gradient when it arrives; see lorank/optim/arriving.py.
        rule: what works inside; parameters without rank follow it too, under "muon" they follow AdamW.

    >>> from torch import nn, ones
    >>> linear = nn.Linear(64, 32)
    >>> groups = [{"params": [linear.weight], "rank": 4}, {"params": [linear.bias]}]
    >>> optimizer = GaLore().optimizer(groups, lr=0.01)
    >>> linear(ones(64)).sum().backward()
    >>> optimizer.step()
    >>> tuple(optimizer.state[linear.weight]["left"].shape)
    (32, 4)
    """

    name: ClassVar[str] = "galore"
    # table 5 of the paper; the authors' script for 1b has rank 1024
    published: ClassVar[Published] = {
        "60m": {"rank": 128},
        "130m": {"rank": 256},
        "350m": {"rank": 256},
        "1b": {"rank": 512},
        "7b": {"rank": 1024, "update_gap": 500},
    }
    soon: ClassVar[Mapping[str, Any]] = {"update_gap": 2}
    per_group: ClassVar[tuple[str, ...]] = ("update_gap", "scale", "projection")
    decays_last: ClassVar[bool] = True

    update_gap: Count = 200
    scale: Positive = 0.25
    projection: Projection = "std"
    basis: Literal["singular", "svd", "randomised"] | Callable[..., Tensor] = "singular"
    stagger: bool = False
    in_backward: bool = False
    rule: Literal["adamw", "adamw-8bit", "adafactor", "muon"] = "adamw"

    # ---- one step, called in lorank/optim/step.py; what a stack does is in lorank/optim/stacks.py

    def prepare(self, stack: Stack) -> None:
        stack.refresh(BASES[self.basis] if isinstance(self.basis, str) else self.basis)  # every T steps

    def move(self, stack: Stack, G: Tensor, group: dict[str, Any]) -> Tensor | Product:
        R = stack.project(G)  # Pᵀ G [k, r, n]  or  G Qᵀ [k, m, r]
        D = stack.ruled(R)  # -lr N, or what another rule makes of a 0 with this gradient
        return stack.lift(D, group["scale"])  # α P D  or  α D Q

    @property
    def rules(self) -> Mapping[str, Rule]:
        return WITH_ITS_EPS if self.rule == "adamw" else RULES

    def rule_for(self, group: Mapping[str, Any]) -> str:
        return "adamw" if self.rule == "muon" and group.get("rank") is None else self.rule

    # ---- what it costs

    def state_shapes(self, shape: Sequence[int], group: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
        if group["rank"] is None:
            return super().state_shapes(shape, group)
        *experts, m, n = shape
        bases = basis_shapes(group["projection"], m, n, min(group["rank"], m, n))
        moments = self.rules[group["rule"]].shapes(_inside(shape, group))
        return {**{name: (*experts, *basis) for name, basis in bases.items()}, **moments}

    def state_bytes(self, p: Tensor, group: Mapping[str, Any]) -> int:
        """Bytes of the rule's state on R, and of the basis."""
        if group.get("rank") is None:
            return super().state_bytes(p, group)
        (k, m, n), group = as_stack(p.shape), self.settings(group)
        bases = basis_shapes(group["projection"], m, n, min(group["rank"], m, n)).values()
        inside = self.rules[group["rule"]].bytes(_inside(p.shape, group), p.element_size())
        return inside + k * sum(map(math.prod, bases)) * p.element_size()

    def step_flops(self, p: Tensor, group: Mapping[str, Any], *, micro_batches: int = 1) -> float:
        """Into the subspace 2 m n r (with `in_backward` for each micro-batch), the rule's on R, back as much, and a refresh
        spread over T steps: what finds a basis is in `basis_flops`; that of a function of yours is left out."""
        if group.get("rank") is None:
            return super().step_flops(p, group)
        (k, m, n), group = as_stack(p.shape), self.settings(group)
        rank, (left, right) = min(group["rank"], m, n), sides(group["projection"], m, n)
        both = left and right
        into = 2 * m * n * rank + (2 * rank * rank * n if both else 0)  # the second from [r, n] to R
        out = 2 * m * n * rank + (2 * m * rank * rank if both else 0)  # from D to [m, r]
        found = 0
        if isinstance(self.basis, str):
            found = left * basis_flops(self.basis, m, n, rank) + right * basis_flops(self.basis, n, m, rank)
        inside = self.rules[group["rule"]].flops(inside_shape(group["projection"], m, n, rank))
        return k * (into * (micro_batches if self.in_backward else 1) + inside + out + found / group["update_gap"])

    def gathered_bytes(self, p: Tensor, group: Mapping[str, Any]) -> float:
        """G, what the basis takes, and what the rule needs of R."""
        if group.get("rank") is None:
            return super().gathered_bytes(p, group)
        (k, m, n), group, itemsize = as_stack(p.shape), self.settings(group), p.element_size()
        bases = basis_shapes(group["projection"], m, n, min(group["rank"], m, n)).values()
        basis = basis_bytes(p, k * sum(map(math.prod, bases)), group["update_gap"])
        inside = self.rules[group["rule"]].gathered_inside(_inside(p.shape, group), itemsize)
        return p.numel() * itemsize + basis + inside

    def kept_gradient(self, p: Tensor, group: Mapping[str, Any]) -> tuple[int, ...]:
        projected = group.get("rank") is not None and self.in_backward
        return _inside(p.shape, self.settings(group)) if projected else tuple(p.shape)


def state_elements(m: int, n: int, r: int) -> int:
    """Numbers kept for a matrix [m, n]: two moments [r, max(m, n)] and the basis [r, min(m, n)].

    >>> state_elements(1376, 512, 128)
    417792
    """
    return 2 * r * max(m, n) + r * min(m, n)


def _inside(shape: Sequence[int], group: Mapping[str, Any]) -> tuple[int, ...]:
    """Of R, for a gradient [m, n] or [k, m, n]."""
    *experts, m, n = shape
    return (*experts, *inside_shape(group["projection"], m, n, min(group["rank"], m, n)))


renamed.hint(__name__)
