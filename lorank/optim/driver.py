"""The bases of methods that decide how weights move: `ByGroups`, and `Projected` for one that moves matrices in a subspace. The step is
in lorank/optim/step.py."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorank.fields import Rank, joined_by_or
from lorank.method import Method, Patterns
from lorank.optim.bases import basis_bytes
from lorank.optim.groups import ranks, split
from lorank.optim.rule import Rule
from lorank.optim.rules import RULES
from lorank.optim.stacks import Product, Stack
from lorank.optim.step import LowRankOptimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByGroups(Method):
    """Base of the methods that move weights group by group, with `LowRankOptimizer`."""

    stochastic_rounding: bool = False
    """Round bfloat16 weights by chance, see lorank/optim/stochastic.py; it changes nothing for others."""

    key: ClassVar[str] = "optimizer"
    per_group: ClassVar[tuple[str, ...]] = ()
    """Fields that a group with a rank may set for itself."""
    decays_last: ClassVar[bool] = False
    """Whether weight decay comes after a move: W ← W - lr λ W."""
    structure: ClassVar[str | None] = None
    """A method whose weights it needs, such as "low-rank"; None: it moves any model."""
    tall: ClassVar[bool] = False
    """Whether `move` sees all gradients with their longer side first; wide matrices are then moved as their transposes."""

    @property
    def rules(self) -> Mapping[str, Rule]:
        """By their names in groups."""
        return RULES

    def rule_for(self, group: Mapping[str, Any]) -> str:
        """The rule of a group that names none."""
        return "adamw"

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group with what it does not say itself; lr, betas and eps are the optimizer's."""
        rule = group.get("rule") or self.rule_for(group)
        if rule not in self.rules:
            raise ValueError(f"rule must be {joined_by_or([repr(name) for name in self.rules])}, got {rule!r}")
        own = {name: getattr(self, name) for name in self.per_group} if group.get("rank") is not None else {}
        return {**self.rules[rule].defaults, **own, **group, "rule": rule}

    def optimizer(
        self,
        groups: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> LowRankOptimizer:
        """An optimizer over parameters, or over groups with ``params`` and, if they like, ``rank``, ``rule``, ``lr_multiplier``,
        ``weight_decay`` and settings that differ from the arguments and fields."""
        return LowRankOptimizer(groups, self, lr=lr, betas=betas, eps=eps)

    @property
    def projects(self) -> bool:
        """Whether groups may have a rank."""
        return type(self).move is not ByGroups.move

    def prepare(self, stack: Stack) -> None:
        """What a stack needs before anything moves; it may fail without harm."""

    def move(self, stack: Stack, G: Tensor, group: dict[str, Any]) -> Tensor | Product:
        """What is added to the weights of a stack with the gradients G, both [k, m, n]."""
        raise NotImplementedError

    def state_shapes(self, shape: Sequence[int], group: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
        """What is kept for a weight from its first step on, by name and without `step`, so that a state of another rank or
        method is noticed. None: the method does not say, and nothing is noticed."""
        return self.rules[group["rule"]].shapes(shape) if group["rank"] is None else None

    def state_bytes(self, p: Tensor, group: Mapping[str, Any]) -> int:
        return self.rules[self.settings(group)["rule"]].bytes(p.shape, p.element_size())

    def step_flops(self, p: Tensor, group: Mapping[str, Any], *, micro_batches: int = 1) -> float:
        return self.rules[self.settings(group)["rule"]].flops(p.shape)

    def gathered_bytes(self, p: Tensor, group: Mapping[str, Any]) -> float:
        """Of a group without rank what its rule says, nothing if that is elementwise and rounds nothing by chance. Of one with a rank
        the gradient, and once each matrix that is kept; a method that gathers anything else says so."""
        group = self.settings(group)
        rule, itemsize = self.rules[group["rule"]], p.element_size()
        if group.get("rank") is None:
            by_chance = self.stochastic_rounding and p.dtype == torch.bfloat16
            return rule.gathered(p.shape, itemsize) if by_chance or not rule.elementwise else 0
        kept = (self.state_shapes(p.shape, group) or {}).values()
        return (p.numel() + sum(math.prod(shape) for shape in kept if len(shape) > 1)) * itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projected(ByGroups):
    """Base of the methods that move matrices in a subspace: a rank, and what `move` makes of a stack."""

    once: ClassVar[Mapping[str, Any]] = {"expert_matrices": False}

    rank: Rank = 0.25
    expert_matrices: bool = True
    """Move the experts of a mixture, [E, m, n], as E matrices; False leaves them to AdamW."""

    def parameter_groups(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], targets: Patterns, exclude: Patterns
    ) -> list[dict[str, Any]]:
        return split(groups, ranks(model, self.rank, targets=targets, exclude=exclude, experts=self.expert_matrices))

    def gathered_bytes(self, p: Tensor, group: Mapping[str, Any]) -> float:
        """The gradient, once each matrix that is kept, and all that a basis takes which `Stack.refresh` keeps: one with an `update_gap`."""
        found, group = super().gathered_bytes(p, group), self.settings(group)
        if group.get("rank") is None or "update_gap" not in group:
            return found
        kept = self.state_shapes(p.shape, group) or {}
        basis = sum(math.prod(kept[side]) for side in ("left", "right") if side in kept)
        return found - basis * p.element_size() + basis_bytes(p, basis, group["update_gap"]) if basis else found
