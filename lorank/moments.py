"""What an optimizer remembers about a parameter, for methods that change the parameter between two steps.

Any optimizer of torch or lorank will do. Its state for a parameter holds three kinds of tensors:

    moments     everything of the parameter's shape, and what is factored or projected, by the names in `REDUCED`
    counters    the names in `COUNTERS`
    the rest    bases of projections and scalars, which nothing here changes
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

Prune = Literal["zero", "random", "magnitude"]
REDUCED = ("exp_avg", "exp_avg_sq", "momentum", "momentum_buffer", "row_var", "col_var", "state1", "state2")
"""Names of moments that may have another shape than the parameter."""
COUNTERS = ("step", "steps")
BASES = ("left", "right")


def moments(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """The moments of a parameter, in the order of their names; none before its first step.

    Raises:
        ValueError: there is state but no moment can be recognised in it (8-bit optimizers store bytes).
    """
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    found = [value for name, value in sorted(state.items()) if _is_moment(name, value, parameter)]
    if not found and any(name not in COUNTERS for name in state):
        raise ValueError(
            f"{type(optimizer).__name__} must keep its moments as floating-point tensors, so that they can be reset when "
            f"the parameter changes, got the state {', '.join(sorted(state))}"
        )
    return found


def _is_moment(name: str, value: Any, parameter: Tensor) -> bool:
    named = name in REDUCED or (name not in (*COUNTERS, *BASES) and getattr(value, "shape", None) == parameter.shape)
    return named and isinstance(value, Tensor) and value.is_floating_point()


@torch.no_grad()
def restart(optimizer: Optimizer, parameter: Tensor) -> None:
    """Set a parameter's moments and counters to zero, as before its first step."""
    for moment in moments(optimizer, parameter):
        moment.zero_()
    state = optimizer.state.get(parameter, {})
    for name in COUNTERS:
        if name in state:
            state[name] = state[name].zero_() if isinstance(state[name], Tensor) else 0


def check_prunable(optimizer: Optimizer, parameter: Tensor, how: Prune) -> None:
    """Raises ValueError if `prune_` cannot have one mask for all moments of a parameter."""
    shapes = {moment.shape for moment in moments(optimizer, parameter)}
    if how != "zero" and len(shapes) > 1:
        raise ValueError(
            f"reset must be 'zero' with {type(optimizer).__name__}, whose moments differ in shape and cannot share a mask, got {how!r}"
        )


@torch.no_grad()
def prune_(moments: Sequence[Tensor], how: Prune, ratio: float, generator: torch.Generator) -> None:
    """Set a part of some moments to zero, in place: all ("zero"), a `ratio` of the entries at random, or the `ratio` of them that is
    smallest in the first moment ("magnitude"). One mask serves all moments, which must have one shape unless all becomes zero.

    With a mask for each, Adam's first moment m may survive where the second, v, is zero: a step of lr m / eps.
    """
    if how == "zero" or not moments:
        for moment in moments:
            moment.zero_()
        return
    first = moments[0]
    if how == "random":
        lost = torch.rand(first.shape, generator=generator).to(first.device) <= ratio
    else:
        size, count = first.abs().float(), round(ratio * first.numel())
        lost = size <= size.flatten().kthvalue(count).values if count else torch.zeros_like(first, dtype=torch.bool)
    for moment in moments:
        moment.masked_fill_(lost, 0)
