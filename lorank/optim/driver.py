"""One optimizer for all methods that decide how weights move: it goes through its groups and asks the method.

    a group with a rank       stacks of equal shape, each moved by `method.move(stack, G, group)`
    a group without           the function of lorank.optim.rules that its ``rule`` names

There is no optimizer inside, and no copy of a group or a parameter. A state is a flat dictionary: "steps", a basis, and what
the rule keeps.

Gradients may be projected as they arrive: lorank/optim/arriving.py.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorank.fields import Beta, Count, NonNegative, Rank, check_value, field_types, joined_by_or, plain
from lorank.method import Method, Patterns
from lorank.optim.arriving import Arriving, check_alone
from lorank.optim.groups import by_rank, listed, ranks, rate, says_rank, split
from lorank.optim.loading import load
from lorank.optim.rules import RULES, Rule
from lorank.optim.shards import Waiting, gathered, like, local, local_gradient, put_back, stand_in, whole
from lorank.optim.stacks import Product, Stack, check_finite, stacks
from lorank.optim.stochastic import rounded


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
    ) -> "LowRankOptimizer":
        """An optimizer over parameters, or over groups with ``params`` and, if they like, ``rank``, ``rule``, ``lr_multiplier``,
        ``weight_decay`` and settings that differ from the arguments and fields."""
        return LowRankOptimizer(groups, self, lr=lr, betas=betas, eps=eps)

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


class LowRankOptimizer(Arriving):
    """What `GaLore(rank=128).optimizer(...)` and its siblings make.

    Args:
        rank: of the matrices of groups that say none themselves. None: if no group says one, all matrices have the method's; else
            groups that say none are plain.
        weight_decay, maximize: of groups that say none themselves.

    Raises:
        ValueError: a group or setting that does not fit, such as a rank for a vector or weights in float16; no matrix to project;
            a rank that is a table, which needs names; or
            `in_backward` in a distributed run, where each process would project its own part of the gradient, or under
            ``torch.amp.GradScaler``.
        FloatingPointError: a gradient or its square is not finite; nothing has been changed. With `in_backward` it is raised in
            the backward pass, when other gradients may have been projected: no weight and no moment has been changed, and the
            optimizer's ``zero_grad`` drops the rest.
    """

    def __init__(
        self,
        params: Iterable[Any],
        method: ByGroups,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        maximize: bool = False,
        rank: Rank | None = None,
    ):
        params = listed(params)
        if rank is None and isinstance(method, Projected) and not any(says_rank(group) for group in params):
            rank = method.rank
        self.method, self.rank = method, rank
        self.in_backward: bool = getattr(method, "in_backward", False)
        if self.in_backward:
            check_alone()
        self._watched: set[nn.Parameter] = set()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": None, "rule": None}
        super().__init__(params, {**defaults, **({"maximize": maximize} if maximize else {})})
        if rank is not None and not self._projected():
            raise ValueError(
                f"{method.name} must have a matrix to project, got none; give it groups with a rank, as "
                "lorank.optim.low_rank_groups makes them, before a wrapper flattens them, or use torch.optim.AdamW"
            )
        self._staggered = len(self._projected()) if getattr(method, "stagger", False) else 0
        self._watch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one that says no rank is split into its matrices of a rank, where this optimizer has one, and the rest."""
        for part in by_rank(param_group, self.rank):
            self._add(part)

    def _add(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(self.method.settings(param_group))
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        if "_watched" in self.__dict__:
            self._watch()

    @torch.compiler.disable
    def _check_group(self, group: dict[str, Any]) -> None:
        group.update(self.method.settings(group))  # what another rule needs, if somebody has changed it
        check_value("rank", group["rank"], Count | None)
        if group["rank"] is not None and type(self.method).move is ByGroups.move:
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
                    f"a parameter of shape {tuple(p.shape)} is neither a matrix nor a stack of matrices; put it in a group {other}"
                )
            _check_type(p)
        rule.check(group["params"])

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_group(group)  # which users may change
            self._forget_misfits(group, group["params"])
        if self.in_backward:
            self._collect()
        parameters = [p for group in self.param_groups for p in group["params"]]
        seen = {p: self._seen(p).grad for p in parameters}
        moved = [p for p, G in seen.items() if G is not None]
        check_finite({p: seen[p] for p in moved})
        groups = [{**group, "lr": rate(group)} for group in self.param_groups]
        phases, waiting = self._phases(), Waiting()
        found = [
            stacks(self.method, group, self.state, moved, phases, waiting) if group["rank"] is not None else []
            for group in groups
        ]
        for stack in (stack for of_group in found for stack in of_group):
            self.method.prepare(stack)
        waiting.settle()
        for group, of_group in zip(groups, found, strict=True):
            if group["rank"] is None:
                self._step_plain(group)
            for stack in of_group:
                self._step_stack(stack)
        for group in self.param_groups if self.method.stochastic_rounding else ():
            group["roundings"] = group.get("roundings", 0) + 1
        return loss

    def _by_chance(self, p: Tensor) -> bool:
        return self.method.stochastic_rounding and p.dtype == torch.bfloat16

    def _exact(self, p: Tensor) -> Tensor:
        """The parameter, or where it will be rounded by chance a copy in single precision."""
        return p.float() if self._by_chance(p) else p

    def _store(self, V: Tensor, p: nn.Parameter, group: dict[str, Any]) -> None:
        """V, whole or sharded like `p`, into `p`."""
        if V is p:
            return
        part = local(V if isinstance(V, DTensor) else like(V, p))
        if self._by_chance(p):
            place = next(i for i, q in enumerate(q for g in self.param_groups for q in g["params"]) if q is p)
            part = rounded(part, group.get("roundings", 0) * 1_000_003 + place)
        local(p).copy_(part)

    def _step_stack(self, stack: Stack) -> None:
        group = stack.group
        G = stack.get("arrived") if "arrived" in stack.states[0] else stack.gradients()
        turned = self.method.tall and G.shape[-2] < G.shape[-1]
        move = self.method.move(stack, G.mT if turned else G, group)
        weights: list[Any] = [self._exact(p) for p in stack.parameters]
        self._decay(weights, group, now=not self.method.decays_last)
        stack._replace(parameters=weights).add(move.mT if turned else move)
        self._decay(weights, group, now=self.method.decays_last)
        for p, V in zip(stack.parameters, weights, strict=True):
            self._store(V, p, group)
        for state in stack.states:
            state.pop("arrived", None)
            state["steps"] += 1

    def _step_plain(self, group: dict[str, Any]) -> None:
        rule = self.method.rules[group["rule"]]
        together, apart = self._sets(group, rule)
        weights = [p for some in (together, *apart) for p in some]
        for p in weights:
            if not rule.owns(self.state[p]):
                made = rule.make(p if rule.elementwise else stand_in(p))
                self.state[p] |= {
                    name: like(value, p) if name in rule.kept and value.shape == p.shape else value
                    for name, value in made.items()
                }
        given = {**group, "weight_decay": 0.0} if self.method.decays_last else group
        sign = -1 if group.get("maximize") else 1
        signed = lambda p, G: torch.zeros_like(local(p)) if G is None else G * sign if sign < 0 else G  # noqa: E731
        states = [self.state[p] for p in together]
        parts = [{n: local(v) if isinstance(v, DTensor) else v for n, v in state.items()} for state in states]
        gradients = [signed(p, p.grad if p.grad is None else local_gradient(p)) for p in together]
        if together:
            rule.step([local(p) for p in together], gradients, parts, given)
            for state, part in zip(states, parts, strict=True):
                state.update({n: v for n, v in part.items() if not isinstance(state[n], DTensor)})
        for some in apart:
            W, kept = [self._exact(whole(p).clone()) for p in some], [gathered(self.state[p]) for p in some]
            for V, state in zip(W, kept, strict=True):
                state.update({name: state[name].to(V.dtype) for name in rule.typed if name in state})
            pairs = list(zip(some, W, strict=True))
            G = [torch.zeros_like(V) if p.grad is None else whole(p.grad).to(V.dtype) * sign for p, V in pairs]
            rule.step(W, G, kept, given)
            self._decay(W, group, now=self.method.decays_last)
            for (p, V), state in zip(pairs, kept, strict=True):
                self._store(V, p, group)
                put_back({n: v.to(p.dtype) if n in rule.typed else v for n, v in state.items()}, self.state[p])
        self._decay(together, group, now=self.method.decays_last)

    def _sets(self, group: dict[str, Any], rule: Rule) -> tuple[list[nn.Parameter], list[list[nn.Parameter]]]:
        """The parameters that have gradients: those that move in one call, and sets of those that must be gathered, one by one.
        Of a pair both move if one has a gradient."""
        params, k = group["params"], rule.at_once
        sets = [params[i : i + k] for i in range(0, len(params), k)]
        sets = [some for some in sets if any(p.grad is not None for p in some) and all(p.numel() for p in some)]
        gathers = [
            (not rule.elementwise and any(isinstance(p, DTensor) for p in some)) or any(map(self._by_chance, some))
            for some in sets
        ]
        apart = [some for some, gather in zip(sets, gathers, strict=True) if gather]
        return [p for some, gather in zip(sets, gathers, strict=True) if not gather for p in some], apart

    def _decay(self, weights: Sequence[Tensor], group: dict[str, Any], *, now: bool) -> None:
        if now and group["weight_decay"] and weights:
            torch._foreach_mul_([local(p) for p in weights], 1 - group["lr"] * group["weight_decay"])

    # ---- copies and saved states

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks, and without the `step` that a scheduler sets, which is the original's."""
        return {n: v for n, v in self.__dict__.items() if "hook" not in n and n not in ("step", "_watched")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "method" in state:
            self._watched = set()
            self._watch()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, of this version or of 0.1."""
        load(self, state_dict)


def _check_type(p: Tensor) -> None:
    if p.dtype == torch.float16:
        raise ValueError(
            "weights must not be float16, in which moments overflow; use bfloat16, or float32 weights under autocast"
        )
