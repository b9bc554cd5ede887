"""What an optimizer remembers about a parameter, for methods that change the parameter between two steps.

Its state for a parameter has four kinds of entries:

    moments     what begins at zero, or at a setting of its group (`STARTS`): reset to where it began
    counters    the names in `COUNTERS`
    bases       of projections, and scalars, which nothing here changes
    the rest    of the parameter's shape, under another name: nobody knows where it began, so it is refused

So every optimizer of lorank will do, of bitsandbytes those that keep floating-point numbers, and of torch all but LBFGS, whose
memory is not by parameter, and ASGD, which keeps a mean of the weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

Prune = Literal["zero", "random", "magnitude"]
MOMENTS = ("exp_inf", "square_avg", "acc_delta", "grad_avg", "variance", "prev")
"""Names of moments that begin at zero, besides those that begin with a word of `WORDS`."""
REDUCED = ("row_var", "col_var", "state1", "state2", "error", "error_low", "error_step")
"""Likewise, of moments that may have another shape than the parameter."""
WORDS = ("exp_avg", "max_exp_avg", "momentum")
STARTS = {"step_size": "lr", "sum": "initial_accumulator_value"}
"""Moments that begin at a setting of their group: Rprop's length of steps, and Adagrad's sum of squares."""
COUNTERS = {"step": 0, "steps": 0, "norm": 0, "mu_product": 1}
"""What counts steps or is updated with the count, and where it begins: also the last norm of a limiter, and NAdam's product of momenta."""
BASES = ("left", "right")


def moments(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """The moments of a parameter, in the order of their names; none before its first step.

    Raises:
        ValueError: there is state but no moment can be recognised in it (8-bit optimizers store bytes), or an entry of which
            nobody knows where it began.
    """
    return [moment for moment, _ in _with_starts(optimizer, parameter)]


def _with_starts(optimizer: Optimizer, parameter: Tensor) -> list[tuple[Tensor, float]]:
    """The moments of a parameter, each with the value at which it began."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise ValueError(f"the optimizer must remember each parameter by itself, so that it can begin anew, got {kind}")
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    found = []
    if state and (dampening := _group_of(optimizer, parameter).get("dampening")):
        raise ValueError(
            f"dampening must be 0, so that moments can begin anew (a first step has none), got {dampening} in {kind}"
        )
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor) or not value.is_floating_point() or name in (*COUNTERS, *BASES):
            continue
        if name in STARTS:
            found.append((value, _setting(optimizer, parameter, STARTS[name])))
        elif name in (*MOMENTS, *REDUCED) or name.startswith(WORDS):
            found.append((value, 0.0))
        elif value.shape == parameter.shape:
            raise ValueError(
                f"{kind} must keep entries that can begin anew when the parameter changes, but it keeps {name!r}, whose first value "
                "lorank does not know; use another optimizer"
            )
    if not found and any(name not in COUNTERS for name in state):
        raise ValueError(
            f"{kind} must keep its moments as floating-point tensors, so that they can be reset when "
            f"the parameter changes, got the state {', '.join(sorted(state))}"
        )
    return found


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def _setting(optimizer: Optimizer, parameter: Tensor, name: str) -> float:
    """A setting of a parameter's group. Of the learning rate the peak, which a scheduler notes: the present one may be 0."""
    group = _group_of(optimizer, parameter)
    return float(group.get("initial_lr", group["lr"]) if name == "lr" else group[name])


@torch.no_grad()
def restart(optimizer: Optimizer, parameter: Tensor) -> None:
    """Set a parameter's moments and counters to where they began, as before its first step."""
    for moment, start in _with_starts(optimizer, parameter):
        moment.fill_(start)
    state = optimizer.state.get(parameter, {})
    for name, first in COUNTERS.items():
        if name in state:
            state[name] = state[name].fill_(first) if isinstance(state[name], Tensor) else first


def check_prunable(optimizer: Optimizer, parameter: Tensor, how: Prune) -> None:
    """Raises ValueError if `prune_` cannot have one mask for all moments of a parameter."""
    shapes = {moment.shape for moment in moments(optimizer, parameter)}
    if how != "zero" and len(shapes) > 1:
        raise ValueError(
            f"reset must be 'zero' with {type(optimizer).__name__}, whose moments differ in shape and cannot share a mask, got {how!r}"
        )


@torch.no_grad()
def prune(
    optimizer: Optimizer,
    parameter: Tensor,
    how: Prune,
    ratio: float,
    generator: torch.Generator,
    *,
    together: bool = True,
) -> None:
    """Let a part of a parameter's moments begin anew; `together`: with one mask for all of them. See `prune_`."""
    found = _with_starts(optimizer, parameter)
    for group in [found] if together else [[one] for one in found]:
        prune_([moment for moment, _ in group], how, ratio, generator, [start for _, start in group])


@torch.no_grad()
def prune_(
    moments: Sequence[Tensor],
    how: Prune,
    ratio: float,
    generator: torch.Generator,
    starts: Sequence[float] | None = None,
) -> None:
    """Set a part of some moments to where they began, zero unless `starts` are given, in place: all ("zero"), a `ratio` of the
    entries at random, or the `ratio` of them that is smallest in the first moment ("magnitude"). One mask serves all moments, which
    must have one shape unless all is reset.

    With a mask for each, Adam's first moment m may survive where the second, v, is zero: a step of lr m / eps.
    """
    pairs = [*zip(moments, starts or [0.0] * len(moments), strict=True)]
    if how == "zero" or not moments:
        for moment, start in pairs:
            moment.fill_(start)
        return
    first = moments[0]
    if how == "random":
        lost = torch.rand(first.shape, generator=generator).to(first.device) <= ratio
    else:
        size, count = first.abs().float(), round(ratio * first.numel())
        lost = size <= size.flatten().kthvalue(count).values if count else torch.zeros_like(first, dtype=torch.bool)
    for moment, start in pairs:
        moment.masked_fill_(lost, start)
