"""One optimizer for all methods that decide how weights move: it goes through its groups and asks the method.

    a group with a rank       stacks of equal shape, each moved by `method.move(stack, G, group)`
    a group without           the function of lorank.optim.rules that its ``rule`` names

There is no optimizer inside, and no copy of a group or a parameter. A state is a flat dictionary: "steps", a basis, and what
the rule keeps.

Projected as it arrives. With a method's `in_backward` each gradient is projected in a hook as soon as backward has finished
it, and freed; micro-batches add up inside the subspace, where they are r max(m, n) numbers instead of m n. The step, and with
it a schedule, still comes once per update. Three things differ: a basis that is due is that of the first micro-batch's
gradient; a norm to clip is that of `seen_parameters`, which is what the optimizer sees of the gradient; and to drop gradients,
call the optimizer's ``zero_grad``, because the model's does not reach them. Parameters without rank keep their gradients.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lorank.fields import Beta, Count, NonNegative, Rank, check_value, field_types, joined_by_or
from lorank.method import Method, Patterns
from lorank.optim.groups import ranks, split
from lorank.optim.loading import load
from lorank.optim.rules import RULES, Rule
from lorank.optim.shards import gathered, like, local, processes, put_back, stand_in, whole
from lorank.optim.stacks import Product, Stack, check_finite, stacks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByGroups(Method):
    """Base of the methods that move weights group by group, with `LowRankOptimizer`."""

    key: ClassVar[str] = "optimizer"
    per_group: ClassVar[tuple[str, ...]] = ()
    """Fields that a group with a rank may set for itself."""
    decays_last: ClassVar[bool] = False
    """Whether weight decay comes after a move: W ← W - lr λ W."""
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
        """An optimizer over parameters, or over groups with ``params`` and, if they like, ``rank``, ``rule``,
        ``weight_decay`` and settings that differ from the arguments and fields."""
        return LowRankOptimizer(groups, self, lr=lr, betas=betas, eps=eps)

    def prepare(self, stack: Stack) -> None:
        """What a stack needs before anything moves; it may fail without harm."""

    def move(self, stack: Stack, G: Tensor, group: dict[str, Any]) -> Tensor | Product:
        """What is added to the weights of a stack with the gradients G, both [k, m, n]."""
        raise NotImplementedError(f"{self.name} moves no stacks; leave rank out of its groups")

    def state_bytes(self, p: Tensor, group: Mapping[str, Any]) -> int:
        return self.rules[self.settings(group)["rule"]].bytes(p.shape, p.element_size())

    def step_flops(self, p: Tensor, group: Mapping[str, Any], *, micro_batches: int = 1) -> float:
        return self.rules[self.settings(group)["rule"]].flops(p.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projected(ByGroups):
    """Base of the methods that move matrices in a subspace: a rank, and what `move` makes of a stack."""

    rank: Rank = 0.25

    def parameter_groups(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], targets: Patterns, exclude: Patterns
    ) -> list[dict[str, Any]]:
        return split(groups, ranks(model, self.rank, targets=targets, exclude=exclude))


class LowRankOptimizer(Optimizer):
    """What `GaLore(rank=128).optimizer(...)` and its siblings make.

    Raises:
        ValueError: a group or setting that does not fit, such as a rank for a vector or weights in float16; a closure; or
            `in_backward` in a distributed run, where each process would project its own part of the gradient, or under
            ``torch.amp.GradScaler``.
        FloatingPointError: the norm of a gradient is not finite; nothing has been changed. With `in_backward` it is raised in
            the backward pass, when other gradients may have been projected: no weight and no moment has been changed, and the
            optimizer's ``zero_grad`` drops the rest.
    """

    def __init__(self, params: Iterable[Any], method: ByGroups, *, lr: float, betas: tuple[float, float], eps: float):
        self.method = method
        self.in_backward: bool = getattr(method, "in_backward", False)
        if self.in_backward:
            _check_alone()
        self._watched: set[nn.Parameter] = set()
        self._phases: dict[nn.Parameter, int] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "rank": None, "rule": None}
        super().__init__(params, defaults)
        projected = [(p, group) for group in self.param_groups if group["rank"] for p in group["params"]]
        if getattr(method, "stagger", False):
            self._phases = {p: i * g["update_gap"] // len(projected) for i, (p, g) in enumerate(projected)}
        self._watch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(self.method.settings(param_group))
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        if "_watched" in self.__dict__:
            self._watch()

    def _check_group(self, group: dict[str, Any]) -> None:
        check_value("rank", group["rank"], Count | None)
        rule, types = self.method.rules[group["rule"]], field_types(type(self.method))  # type: ignore[arg-type]
        own = {name: types[name] for name in self.method.per_group if group["rank"] is not None}
        for name, kind in {"lr": NonNegative, "weight_decay": NonNegative, **rule.types, **own}.items():
            check_value(name, group[name].item() if isinstance(group[name], Tensor) else group[name], kind)
        for i, beta in enumerate(group["betas"]):
            check_value(f"betas[{i}]", beta, Beta)
        if group.get("amsgrad"):
            raise ValueError(f"{self.method.name} has no amsgrad; leave it out of the group")
        for p in group["params"]:
            if group["rank"] is not None and p.ndim != 2:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is not a matrix; put it in a group without rank"
                )
            if rule.matrices_only and p.ndim != 2:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is not a matrix; put it in a group with another rule than "
                    f"{group['rule']!r}"
                )
            _check_type(p)

    # ---- gradients that are projected as they arrive

    def _watch(self) -> None:
        """With `in_backward`: see gradients as they arrive, for as long as this optimizer lives."""
        me = weakref.ref(self)

        def arrive(p: nn.Parameter) -> None:
            optimizer = me()
            if optimizer is not None and p.grad is not None:
                optimizer._arrive(p)

        for p in self._projected() if self.in_backward else ():
            if p.requires_grad and p not in self._watched:
                self._watched.add(p)
                p.register_post_accumulate_grad_hook(arrive)

    @torch.no_grad()
    def _arrive(self, p: nn.Parameter) -> None:
        """Project a gradient that backward has just finished, and free it."""
        group = next((group for group in self.param_groups if any(q is p for q in group["params"])), None)
        if group is None:
            return  # somebody has removed it
        check_finite({p: p.grad})
        for stack in stacks(self.method, {**group, "params": [p]}, self.state, [p], self._phases):
            self.method.prepare(stack)
            R, before = stack._replace(states=[self._without_arrived(p)]).project(stack.gradients()), self.state[p]
            stack.put("arrived", R + stack.get("arrived") if "arrived" in before else R)
        p.grad = None

    def _without_arrived(self, p: nn.Parameter) -> dict[str, Any]:
        return {name: value for name, value in self.state[p].items() if name != "arrived"}

    def seen_parameters(self) -> list[Tensor]:
        """Tensors whose ``.grad`` is what the optimizer sees; with `in_backward`, give these to ``clip_grad_norm_``."""
        return [self._seen(p) for group in self.param_groups for p in group["params"]]

    def _seen(self, p: nn.Parameter) -> Tensor:
        R = self.state[p].get("arrived") if p in self.state else None
        if R is None:
            return p
        seen = R.detach()
        seen.grad = R
        return seen

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for state in self.state.values():
            state.pop("arrived", None)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Has ``torch.amp.GradScaler`` come to `step` with its gradients scaled, where `in_backward` is refused."""
        return self.in_backward

    # ---- the step

    def _projected(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups if group["rank"] is not None for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError(f"step() must have no closure with {self.method.name}; call backward() before step()")
        if self.in_backward:
            self._collect()
        parameters = [p for group in self.param_groups for p in group["params"]]
        seen = {p: self._seen(p).grad for p in parameters}
        moved = [p for p, G in seen.items() if G is not None]
        for p in moved:
            _check_type(p)
        check_finite({p: seen[p] for p in moved})
        groups = [{**group, "lr": float(group["lr"])} for group in self.param_groups]  # which may be a tensor
        found = [
            stacks(self.method, group, self.state, moved, self._phases) if group["rank"] is not None else []
            for group in groups
        ]
        for stack in (stack for of_group in found for stack in of_group):
            self.method.prepare(stack)
        for group, of_group in zip(groups, found, strict=True):
            if group["rank"] is None:
                self._step_plain(group)
            for stack in of_group:
                self._step_stack(stack)
        return None

    def _collect(self) -> None:
        """Project what no backward pass brought, or none while the parameter was trained."""
        if hasattr(self, "found_inf"):
            raise ValueError(
                "in_backward must be False with GradScaler, because gradients are projected before they are unscaled; "
                "train in bfloat16, which needs no scaler, or leave it out"
            )
        _check_alone()  # the processes may have come together since
        for p in self._projected():
            if p.grad is not None:
                self._arrive(p)
        self._watch()

    def _step_stack(self, stack: Stack) -> None:
        group = stack.group
        G = stack.get("arrived") if "arrived" in stack.states[0] else stack.gradients()
        turned = self.method.tall and G.shape[-2] < G.shape[-1]
        move = self.method.move(stack, G.mT if turned else G, group)
        self._decay(stack.parameters, group, now=not self.method.decays_last)
        stack.add(move.mT if turned else move)
        self._decay(stack.parameters, group, now=self.method.decays_last)
        for state in stack.states:
            state.pop("arrived", None)
            state["steps"] += 1

    def _step_plain(self, group: dict[str, Any]) -> None:
        rule = self.method.rules[group["rule"]]
        weights = [p for p in group["params"] if p.grad is not None and p.numel()]
        for p in weights:
            if not rule.owns(self.state[p]):
                made = rule.make(p if rule.elementwise else stand_in(p))
                self.state[p] |= {
                    name: like(value, p) if name in rule.kept and value.shape == p.shape else value
                    for name, value in made.items()
                }
        given = {**group, "weight_decay": 0.0} if self.method.decays_last else group
        sign = -1 if group.get("maximize") else 1
        apart = [p for p in weights if isinstance(p, DTensor) and not rule.elementwise]
        together = [p for p in weights if p not in set(apart)]
        states = [self.state[p] for p in together]
        parts = [{n: local(v) if isinstance(v, DTensor) else v for n, v in state.items()} for state in states]
        gradients = [local(p.grad) * sign if sign < 0 else local(p.grad) for p in together]  # type: ignore[arg-type]
        if together:
            rule.step([local(p) for p in together], gradients, parts, given)
            for state, part in zip(states, parts, strict=True):
                state.update({n: v for n, v in part.items() if not isinstance(state[n], DTensor)})
        for p in apart:
            W, state = whole(p).clone(), gathered(self.state[p])
            rule.step([W], [whole(p.grad) * sign], [state], given)  # type: ignore[arg-type]
            local(p).copy_(local(like(W, p)))
            put_back(state, self.state[p])
        self._decay(weights, group, now=self.method.decays_last)

    def _decay(self, weights: Sequence[Tensor], group: dict[str, Any], *, now: bool) -> None:
        if now and group["weight_decay"] and weights:
            torch._foreach_mul_([local(p) for p in weights], 1 - group["lr"] * group["weight_decay"])

    # ---- copies and saved states

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks, and without the `step` that a scheduler sets, which is the original's."""
        return {n: v for n, v in self.__dict__.items() if "hooks" not in n and n not in ("step", "_watched")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "method" in state:
            self._watched = set()
            self._watch()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, of this version or of 0.1."""
        load(self, state_dict)


def _check_alone() -> None:
    if processes() > 1:
        raise ValueError(
            "in_backward must be False in distributed runs, because it sees the gradient of one process only"
        )


def _check_type(p: Tensor) -> None:
    if p.dtype == torch.float16:
        raise ValueError(
            "weights must not be float16, in which moments overflow; use bfloat16, or float32 weights under autocast"
        )
