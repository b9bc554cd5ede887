"""GaLore: Adam inside the leading singular subspace of each matrix's gradient, found anew every T steps.

    every T steps:   P = first r left singular vectors of G  (m < n),  or Q = first r right ones  (m >= n)
    R = Pᵀ G  or  G Qᵀ
    M ← β₁ M + (1 - β₁) R         V ← β₂ V + (1 - β₂) R²         N = M / (√V + ε)
    W ← W - lr √(1 - β₂ᵗ) / (1 - β₁ᵗ) α P N  (or α N Q),  then W ← W - lr λ W

    G, W [m, n]     P [m, r]     Q [r, n]     R, M, V, N [r, n] or [m, r]

The basis is that of the very gradient it projects, and the moments are not turned when it changes. State of a matrix:
2 r max(m, n) numbers and r min(m, n) for the basis, where Adam keeps 2 m n. The α of a projected group is a fraction of the
learning rate and does not depend on r.

Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, arXiv 2403.03507.

Departures from the authors' code. ε defaults to the paper's 1e-8 (theirs: 1e-6). "reverse_std" goes back on the side it
came from. As there, parameters without rank take the same rule at α = 1, with ε beside √V and weight decay after the step:
torch's AdamW with another ε. Matrices of equal shape share one batched product. Tensors that are no matrices are refused, not decomposed.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorank.method import Published
from lorank.optim.legacy.subspace import Subspace


def state_elements(m: int, n: int, r: int) -> int:
    """Numbers kept for a matrix [m, n]: two moments [r, max(m, n)] and the basis [r, min(m, n)].

    >>> state_elements(1376, 512, 128)
    417792
    """
    return 2 * r * max(m, n) + r * min(m, n)


class GaLoreAdamW(Subspace):
    """AdamW whose groups with a `rank` are projected; arguments and errors as in `Subspace` and ``torch.optim.AdamW``.

    >>> from torch import nn
    >>> linear = nn.Linear(64, 32)
    >>> groups = [{"params": [linear.weight], "rank": 4}, {"params": [linear.bias]}]
    >>> optimizer = GaLoreAdamW(groups, lr=0.01)
    >>> linear(torch.ones(64)).sum().backward()
    >>> _ = optimizer.step()
    >>> tuple(optimizer.state[linear.weight]["left"].shape)
    (32, 4)
    """

    # table 5 of the paper; the authors' script for 1b has rank 1024
    published: ClassVar[Published] = {
        "60m": {"rank": 128},
        "130m": {"rank": 256},
        "350m": {"rank": 256},
        "1b": {"rank": 512},
        "7b": {"rank": 1024, "update_gap": 500},
    }

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **subspace: Any,
    ):
        self._taken: dict[Tensor, int] = {}
        options = {"fused": not subspace.get("foreach"), **subspace}
        super().__init__(params, torch.optim.AdamW, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)

    def step_inside(self) -> None:
        """AdamW with ε beside √V: torch adds it to √(V / (1 - β₂ᵗ)), where it has to be larger by that root.

        So parameters that have taken equally many steps t are stepped together.
        """
        waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for group in self.inner.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    known = p in self._taken and p in self.inner.state
                    self._taken[p] = 1 + (self._taken[p] if known else self._saved_count(p))
                    waiting.setdefault(self._taken[p], []).append((p, p.grad))
                    p.grad = None
        for t, some in waiting.items():
            for p, gradient in some:
                p.grad = gradient
            for ours, its in zip(self.param_groups, self.inner.param_groups, strict=True):
                its["eps"] = ours["eps"] / (1 - its["betas"][1] ** t) ** 0.5
            self.inner.step()
            for p, _ in some:
                p.grad = None
        for some in waiting.values():
            for p, gradient in some:
                p.grad = gradient

    def _saved_count(self, p: Tensor) -> int:
        return int(state["step"]) if (state := self.inner.state.get(p)) else 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._taken.clear()
