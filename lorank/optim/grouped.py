"""Groups and states of a `LowRankOptimizer`: what they must be, when a state begins anew, and what is saved."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.fields import Beta, Count, NonNegative, Rank, check_value, field_types, plain
from lorank.optim.groups import by_rank, listed, says_rank
from lorank.optim.loading import load, misfit

if TYPE_CHECKING:
    from lorank.optim.driver import ByGroups

logger = logging.getLogger(__name__)


class Grouped(Optimizer):
    """What `LowRankOptimizer` does with its groups."""

    def __init__(
        self,
        params: Iterable[Any],
        method: "ByGroups",
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        maximize: bool = False,
        rank: Rank | None = None,
    ):
        params = listed(params)
        if rank is None and not any(says_rank(group) for group in params):
            rank = getattr(method, "rank", None)
        self.method, self.rank = method, rank
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": None, "rule": None}
        super().__init__(params, {**defaults, **({"maximize": maximize} if maximize else {})})
        if rank is not None and not self._projected():
            raise ValueError(
                f"{method.name} must have a matrix to project, got none; give it groups with a rank, as "
                "lorank.optim.low_rank_groups makes them, before a wrapper flattens them, or use torch.optim.AdamW"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one that says no rank is split into its matrices of a rank, where this optimizer has one, and the rest."""
        for part in by_rank(param_group, self.rank):
            super().add_param_group(self.method.settings(part))
            try:
                self._check_group(self.param_groups[-1])
            except ValueError:
                self.param_groups.pop()
                raise

    @torch.compiler.disable
    def _check_group(self, group: dict[str, Any]) -> None:
        group.update(self.method.settings(group))  # what another rule needs, if somebody has changed it
        check_value("rank", group["rank"], Count | None)
        if group["rank"] is not None and not self.method.projects:
            raise ValueError(
                f"{self.method.name} projects nothing; leave rank out of its groups, got {group['rank']!r}"
            )
        check_value("maximize", group.get("maximize", False), bool)
        check_value("betas", group["betas"], tuple[float, float])
        rule, types = self.method.rules[group["rule"]], field_types(type(self.method))  # type: ignore[arg-type]
        own = {name: types[name] for name in self.method.per_group if group["rank"] is not None}
        own |= {"lr_multiplier": NonNegative} if "lr_multiplier" in group else {}
        for name, kind in {"lr": NonNegative, "weight_decay": NonNegative, **rule.types, **own}.items():
            check_value(name, plain(group[name]), kind)
        for i, beta in enumerate(group["betas"]):
            check_value(f"betas[{i}]", beta, Beta)
        if group.get("amsgrad"):
            raise ValueError(f"{self.method.name} has no amsgrad; leave it out of the group")
        for p in group["params"]:
            if p.ndim not in (2, 3) and (group["rank"] is not None or rule.matrices_only):
                other = "without rank" if group["rank"] is not None else f"with another rule than {group['rule']!r}"
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is neither a matrix nor a stack of matrices; put it in a group {other}, "
                    "or use FSDP2 instead of DeepSpeed's ZeRO, which flattens all weights into one vector"
                )
            _check_type(p)
        rule.check(group["params"])

    def _projected(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups if group["rank"] is not None for p in group["params"]]

    @torch.compiler.disable
    def _forget_misfits(self, group: dict[str, Any], parameters: Iterable[nn.Parameter]) -> None:
        """Where somebody changed the rank, projection or rule of a group, basis and moments begin anew."""
        for p in parameters:
            if (state := self.state.get(p)) and misfit(state, self.method, p.shape, group):
                logger.info(
                    "the state of a parameter of shape %s begins anew, as its group was changed", tuple(p.shape)
                )
                state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, of this version or of 0.1."""
        load(self, state_dict)


def _check_type(p: Tensor) -> None:
    if p.dtype == torch.float16:
        raise ValueError(
            "weights must not be float16, in which moments overflow; use bfloat16, or float32 weights under autocast"
        )
