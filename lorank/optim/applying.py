"""The step of a rule on parameters as they are, and on zeros that stand for them in a subspace; both may be sharded.

An elementwise rule moves each process's part of sharded weights. For another one the weights are gathered, one by one, and each
process keeps its part of what comes out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorank.optim.rule import Rule, State
from lorank.optim.shards import like, local, local_gradient, sharded, stand_in, whole
from lorank.optim.stochastic import Rounding

if TYPE_CHECKING:
    from lorank.optim.driver import ByGroups

Take = Callable[[Tensor], Tensor]
"""`whole`, or `local` for this process's part."""


def step_plain(method: "ByGroups", group: dict[str, Any], states: Mapping[Any, State], rounding: Rounding) -> None:
    """Move a group without rank by its rule."""
    rule, last = method.rules[group["rule"]], method.decays_last
    settings = {**group, "weight_decay": 0.0} if last else group
    together, apart = _sets(group, rule, rounding)
    for some, take in [(together, local), *((one, whole) for one in apart)]:
        for p in some:
            if not rule.owns(states[p]):
                made = rule.make(p if rule.elementwise else stand_in(p))
                own = [name for name, value in made.items() if name in rule.kept and value.shape == p.shape]
                states[p].update({**made, **{name: like(made[name], p) for name in own}})
        W = [local(p) if take is local else rounding.exact(whole(p).clone()) for p in some]
        G = [_gradient(p, V, take, group) for p, V in zip(some, W, strict=True)]
        kept = [_taken(rule, states[p], V.dtype, take) for p, V in zip(some, W, strict=True)]
        if some:
            rule.step(W, G, kept, settings)
        decay(W, group, now=last)
        for p, V, state in zip(some, W, kept, strict=True):
            _give_back(rule, state, states[p], p.dtype, take)
            if take is whole:
                rounding.store(V, p, group)


def _sets(
    group: Mapping[str, Any], rule: Rule, rounding: Rounding
) -> tuple[list[nn.Parameter], list[list[nn.Parameter]]]:
    """The parameters that have gradients: those that move in one call, and sets of those that must be gathered, one by one.
    Of a pair both move if one has a gradient."""
    params, k = group["params"], rule.at_once
    together, apart = [], []
    for some in (params[i : i + k] for i in range(0, len(params), k)):
        if all(p.grad is None for p in some) or not all(p.numel() for p in some):
            continue
        if any((isinstance(p, DTensor) and not rule.elementwise) or rounding.applies(p) for p in some):
            apart.append(some)
        else:
            together += some
    return together, apart


def _gradient(p: nn.Parameter, V: Tensor, take: Take, group: Mapping[str, Any]) -> Tensor:
    """Of the type of V; its negative where a group is to be maximised."""
    if p.grad is None:
        return torch.zeros_like(V)
    G = (local_gradient(p) if take is local else whole(p.grad)).to(V.dtype)
    return -G if group.get("maximize") else G


def step_inside(
    rule: Rule,
    D: Sequence[Tensor],
    R: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    states: Sequence[State],
    group: dict[str, Any],
) -> None:
    """Make of each D, zeros that stand for a parameter in its subspace, what the rule makes of them by the gradient R; both whole."""
    take, parts = (local, sharded) if rule.elementwise else (whole, lambda values, of: values)
    kept = []
    for one, p, state in zip(R, parameters, states, strict=True):
        if not rule.owns(state):
            state.update(rule.make(stand_in(one, p.dtype)))
        own = {name: sharded(state[name], p) for name in (*rule.kept, "step") if name in state}
        state.update(own)
        kept.append(_taken(rule, own, one.dtype, take))
    moved, G = ([parts(X, p) for X, p in zip(of, parameters, strict=True)] for of in (D, R))
    rule.inside([take(X) for X in moved], [take(X) for X in G], kept, group, parameters)
    for X, one, p, state, its in zip(moved, D, parameters, states, kept, strict=True):
        _give_back(rule, its, state, p.dtype, take)
        if isinstance(X, DTensor):
            one.copy_(whole(X))


def _taken(rule: Rule, state: Mapping[str, Any], dtype: torch.dtype, take: Take) -> State:
    """A state as a step needs it: whole or this process's part, and in this type."""
    its = {name: take(value) if isinstance(value, Tensor) else value for name, value in state.items()}
    for name in rule.typed:
        if name in its and its[name].dtype != dtype:
            its[name] = its[name].to(dtype)
    return its


def _give_back(rule: Rule, its: State, state: State, dtype: torch.dtype, take: Take) -> None:
    """Store what was taken and has been changed since, in the type of the parameter."""
    for name, value in its.items():
        new = value.to(dtype) if name in rule.typed and value.dtype != dtype else value
        if not isinstance(kept := state.get(name), DTensor):
            state[name] = new
        elif take is whole:
            local(kept).copy_(local(like(new, kept)))
        elif new is not local(kept):
            local(kept).copy_(new)


def decay(weights: Sequence[Tensor], group: Mapping[str, Any], *, now: bool) -> None:
    """W ← (1 - lr λ) W."""
    if now and group["weight_decay"] and weights:
        torch._foreach_mul_([local(p) for p in weights], 1 - group["lr"] * group["weight_decay"])
