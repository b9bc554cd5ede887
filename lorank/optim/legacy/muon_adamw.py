"""torch.optim.Muon with AdamW beside it, for the parameters that Muon does not take."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lorank.optim.legacy.matrices import check_finite, copied, last_group_or_none
from lorank.optim.legacy.trion import newton_schulz_flops


def muon_flops(shape: Sequence[int]) -> int:
    """FLOPs of the matrix products of Muon's step on a matrix: Newton-Schulz, five steps on the whole of it."""
    return newton_schulz_flops(*shape)


MUON = "ns_steps"
"""A setting that groups of Muon have and those of AdamW have not."""


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for the groups with a ``momentum`` or a ``rank``, torch.optim.AdamW for the others, as one optimizer.

    Muon's updates are scaled to AdamW's root mean square (``adjust_lr_fn="match_rms_adamw"``, arXiv 2502.16982), so
    that one learning rate, weight decay and schedule serve both. Both halves work on this object's `param_groups` and
    `state`: schedulers, ``state_dict`` and hooks see one optimizer. It works inside a `Subspace`, whose groups have ranks.

    Raises:
        ValueError: a parameter of Muon's is not a matrix or is sharded (FSDP2), a closure, or a state with other groups.
        FloatingPointError: a gradient is not finite; nothing has been changed.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4, bias=False))
    >>> optimizer = MuonAdamW([{"params": model[1].weight, "momentum": 0.95}, {"params": model[0].weight}], lr=0.01)
    >>> model(torch.arange(10)).square().mean().backward()
    >>> optimizer.step()
    >>> [sorted(optimizer.state[p]) for p in model.parameters()]
    [['exp_avg', 'exp_avg_sq', 'step'], ['momentum_buffer']]
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):
        some = [nn.Parameter(torch.empty(0, 0))]
        both: Any = {"lr": lr, "weight_decay": weight_decay}
        self._muon = torch.optim.Muon(some, momentum=momentum, adjust_lr_fn="match_rms_adamw", **both)
        self._adamw = torch.optim.AdamW(some, betas=betas, eps=eps, **both)
        super().__init__(params, both)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        ours = "momentum" in param_group or param_group.get("rank") is not None
        given = {name: value for name, value in param_group.items() if not (ours and name in ("betas", "eps"))}
        super().add_param_group({**(self._muon if ours else self._adamw).defaults, **given})
        with last_group_or_none(self):
            for p in self.param_groups[-1]["params"] if ours else ():
                if p.ndim != 2:
                    raise ValueError(
                        f"a parameter of shape {tuple(p.shape)} is no matrix; put it in a group without momentum"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return copied(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = [MUON in group for group in state_dict["param_groups"]]
        if saved != [MUON in group for group in self.param_groups]:
            raise ValueError(
                "the saved state has other groups under Muon than this MuonAdamW; make it as it was made for the state"
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("MuonAdamW evaluates no closure; call backward() before step()")
        if any(isinstance(p.grad, DTensor) for group in self.param_groups if MUON in group for p in group["params"]):
            raise ValueError("Muon orthonormalises whole matrices and sees parts of sharded ones (FSDP2); take DDP")
        check_finite({p: p.grad for group in self.param_groups for p in group["params"]})
        for half in (self._muon, self._adamw):
            half.param_groups = [group for group in self.param_groups if (MUON in group) == (half is self._muon)]
            half.state = self.state
            half.step()
        return None
