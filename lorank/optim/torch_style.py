"""The optimizers as torch writes them: ``GaLoreAdamW(groups, lr=1e-3, rank=128)``, for loops and libraries that take a class and
its arguments, such as transformers' ``Trainer(optimizer_cls_and_kwargs=...)``.

Each is `LowRankOptimizer` with a method whose fields are further arguments. Those of `GaLoreAdamW` are those of
`lorank.GaLore`, and so on; nothing else is different from ``lorank.GaLore(...).optimizer(...)``.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lorank.fields import Count, Rank, check_value, unknown
from lorank.optim.dct_adamw import DCTAdamW as DCTAdamWMethod
from lorank.optim.driver import ByGroups
from lorank.optim.fira import Fira
from lorank.optim.galore import GaLore
from lorank.optim.groups import by_rank, listed
from lorank.optim.plain import Muon
from lorank.optim.step import LowRankOptimizer
from lorank.optim.trion import Trion as TrionMethod

WITHOUT_EFFECT = ("fused", "foreach")
"""Arguments of torch's AdamW that choose among equal ways to compute; any value is accepted."""
NOT_OFFERED = ("amsgrad", "capturable", "differentiable")
"""Those that change what is computed; only False is accepted."""
CHOSEN = {"momentum", "rank", "rule"}
"""What a group says that chooses between Muon and AdamW."""


class TorchStyle(LowRankOptimizer):
    """Base of the classes below.

    Args:
        params: parameters, or groups with ``params`` and, if they like, ``rank``, ``rule``, ``lr``, ``weight_decay`` and more.
        lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``; groups may say their own.
        rank: an integer, or a fraction of the narrower side, for all matrices of groups that say no rank themselves. Without this
            argument it is the method's, unless a group says one: then groups that say none follow plain AdamW.
        settings: the method's fields.

    Raises:
        ValueError: a setting or group does not fit; or there is no matrix to project.
        TypeError: an argument is unknown.
    """

    kind: ClassVar[type[ByGroups]]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **settings: Any,
    ):
        for name in WITHOUT_EFFECT:
            settings.pop(name, None)
        for name in NOT_OFFERED:
            if settings.pop(name, False):
                raise ValueError(f"{name} must be False with {type(self).__name__}, got True; leave it out")
        rank = settings.pop("rank", None)
        known = [field.name for field in dataclasses.fields(self.kind)]
        if extra := next((name for name in settings if name not in known), None):
            raise TypeError(
                unknown(f"argument of {type(self).__name__}", extra, ["lr", "betas", *known], plural="arguments")
            )
        if rank is not None:
            check_value("rank", rank, Rank)
        method = self.kind(**settings)
        super().__init__(
            params, method, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, rank=rank
        )


class GaLoreAdamW(TorchStyle):
    """`lorank.GaLore` with torch's arguments.

    >>> from torch import nn, ones
    >>> linear = nn.Linear(64, 32)
    >>> optimizer = GaLoreAdamW(linear.parameters(), 0.01, rank=4)
    >>> linear(ones(64)).sum().backward()
    >>> optimizer.step()
    >>> tuple(optimizer.state[linear.weight]["exp_avg"].shape)
    (4, 64)
    """

    kind = GaLore


class FiraAdamW(TorchStyle):
    """`lorank.Fira` with torch's arguments."""

    kind = Fira


class DCTAdamW(TorchStyle):
    """`lorank.DCTAdamW` with torch's arguments."""

    kind = DCTAdamWMethod


class Trion(TorchStyle):
    """`lorank.Trion` with torch's arguments. Groups without rank follow AdamW at the same `lr`, or at `adamw_lr` if that is given."""

    kind = TrionMethod

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        **settings: Any,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, **settings)


class MuonAdamW(TorchStyle):
    """`lorank.Muon` with torch's arguments. Muon moves the groups with a ``momentum``, a ``rank`` or ``rule="muon"``; if no
    group has one of these, all matrices. AdamW moves the rest."""

    kind = Muon

    def __init__(self, params: Iterable[Any], *arguments: Any, **settings: Any):
        groups = listed(params)
        if groups and not any(isinstance(group, Mapping) and CHOSEN & group.keys() for group in groups):
            groups = groups if isinstance(groups[0], Mapping) else [{"params": groups}]
            groups = [part for group in groups for part in by_rank(dict(group), 1)]
        super().__init__(groups, *arguments, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = dict(param_group)
        rank = group.pop("rank", None)
        check_value("rank", rank, Count | None)
        if rank is not None or "momentum" in group:
            group.setdefault("rule", "muon")
        super().add_param_group(group)
