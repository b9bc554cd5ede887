"""torch.optim.Muon with AdamW beside it, for the parameters that Muon does not take."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorank.optim.trion import newton_schulz_flops


def muon_flops(shape: Sequence[int]) -> int:
    """FLOPs of the matrix products of Muon's step on a matrix: Newton-Schulz, five steps on the whole of it."""
    return newton_schulz_flops(*shape)


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon on the hidden matrices and torch.optim.AdamW on everything else, as one optimizer.

    Muon's updates are scaled to AdamW's root mean square (``adjust_lr_fn="match_rms_adamw"``, arXiv 2502.16982), so
    that one learning rate, weight decay and schedule serve both. Both halves work on this object's `param_groups` and
    `state`: schedulers, ``state_dict`` and hooks see one optimizer.
    """

    def __init__(
        self,
        hidden: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ):
        self._halves = (
            [torch.optim.Muon(hidden, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")] if hidden else []
        ) + ([torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps)] if others else [])
        self._sizes = [len(half.param_groups) for half in self._halves]
        super().__init__([group for half in self._halves for group in half.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        for half, size in zip(self._halves, self._sizes, strict=True):
            half.param_groups = self.param_groups[start : start + size]
            half.state = self.state
            start += size

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("MuonAdamW evaluates no closure; call backward() before step()")
        for half in self._halves:
            half.step()
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()  # loading made new groups and a new state


def muon(groups: list[dict[str, Any]], *, lr: float, weight_decay: float, **settings: Any) -> MuonAdamW:
    """Muon on the groups with a `rank`, which come first, and AdamW on the others: `inner` of a `Subspace`."""
    groups = [{**group, "weight_decay": weight_decay} for group in groups]
    ranked = [group["rank"] is not None for group in groups]
    if ranked != sorted(ranked, reverse=True):
        raise ValueError("groups with a rank must come first, as lorank.optim.low_rank_groups puts them")
    return MuonAdamW([g for g in groups if g["rank"]], [g for g in groups if not g["rank"]], lr=lr, **settings)
