"""Saved states of a `LowRankOptimizer`, and of the optimizers that lorank had before it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lorank.optim.stacks import LIKE_PARAMETERS

if TYPE_CHECKING:
    from lorank.optim.driver import ByGroups
    from lorank.optim.grouped import Grouped

COUNTERS = ("step", "steps", "seed")
"""They stay on the host, where reading them waits for nothing."""
IN_PASSING = {*COUNTERS, "arrived"}
"""What a state may have before and between steps."""
BASES = {"left", "right"}
"""They are there before the first step if gradients are projected as they arrive."""
WRAPPED = ("inner", "__bnb_optimizer_quant_state__")
"""Dictionaries inside a state: that of an optimizer inside another, and what bitsandbytes hides from FSDP."""
OF_MUON = "ns_steps"
"""A setting that groups of torch's Muon have."""


def load(optimizer: "Grouped", state_dict: dict[str, Any]) -> None:
    """``Optimizer.load_state_dict``, after which state has the types it was saved with: torch casts all of it to the parameters'
    type, in which indices and counters may not be exact. Moments and bases stay in the parameters' type.

    Raises:
        ValueError: the state is another optimizer's, or of other ranks; nothing has been changed.
    """
    before, seen = (optimizer.param_groups, optimizer.state), dict[str, Any]()

    def last(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:  # after what users' hooks make of it
        seen.update(translated(optimizer, given))
        return dict(seen)

    hook = optimizer.register_load_state_dict_pre_hook(last)
    try:
        Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        hook.remove()
    try:
        for index, (ours, saved) in enumerate(zip(before[0], optimizer.param_groups, strict=True)):
            _check_same(optimizer, index, ours, saved)
    except ValueError:
        optimizer.param_groups, optimizer.state = before
        raise
    ids = [index for group in seen["param_groups"] for index in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in zip(ids, parameters, strict=True):
        if index in seen["state"]:
            loaded = optimizer.state[p]
            saved = {name: _copied(name, value, loaded[name]) for name, value in seen["state"][index].items()}
            optimizer.state[p] = saved


def translated(optimizer: "Grouped", given: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state in today's layout: flat, and with a rule in each group."""
    groups = list(given["param_groups"])
    for index, (ours, group) in enumerate(zip(optimizer.param_groups, groups, strict=False)):
        rule = "muon" if OF_MUON in group else "adamw" if ours["rule"] == "muon" else ours["rule"]
        needed = () if ours["rank"] is None else ("rank", *optimizer.method.per_group)
        added = {name: value for name, value in ours.items() if name not in needed or name in optimizer.method.once}
        if "rule" not in group:  # of 0.1, with the defaults of then
            added |= {name: old for name, old in optimizer.method.once.items() if name in needed}
        groups[index] = {**added, "rule": rule, **group}
    return {**given, "param_groups": groups, "state": {index: flat(state) for index, state in given["state"].items()}}


def flat(state: Any) -> Any:
    if not isinstance(state, Mapping):
        return state
    wrapped = [state[name] for name in WRAPPED if name in state]
    plain = {name: value for name, value in state.items() if name not in WRAPPED}
    for inner in wrapped:
        plain |= flat(inner)
    return plain


def _check_same(optimizer: "Grouped", index: int, ours: dict[str, Any], saved: dict[str, Any]) -> None:
    missing = sorted(ours.keys() - saved.keys())
    what = ""
    if missing:
        what = f"has no {missing[0]!r}"
    elif ours["rank"] != saved["rank"]:
        what = f"has rank {saved['rank']} where this one has {ours['rank']}"
    elif ours["rule"] != saved["rule"]:
        what = f"has rule {saved['rule']!r} where this one has {ours['rule']!r}"
    else:
        states = ((p, optimizer.state.get(p)) for p in ours["params"])
        wrong = (misfit(state, optimizer.method, p.shape, saved) for p, state in states if state)
        what = next((f"has {found}" for found in wrong if found), "")
    if what:
        raise ValueError(
            f"group {index} of the saved state {what}, so it was not saved by an optimizer like this {optimizer.method.name}; make the "
            "optimizer with the settings of the one that was saved"
        )


def misfit(state: Mapping[str, Any], method: "ByGroups", shape: Sequence[int], group: Mapping[str, Any]) -> str:
    """What a state has that the method would not keep for a weight of this shape, in a few words; "" if it fits."""
    shapes = method.state_shapes(shape, group)
    if shapes is None or not (kept := state.keys() - (IN_PASSING - shapes.keys())):
        return ""
    begun = kept - BASES
    for name in sorted(shapes.keys() | kept):
        if name not in kept:
            if begun:
                return f"no {name!r}"
            continue
        if name not in shapes:
            return repr(name)
        if tuple(state[name].shape) != shapes[name]:
            return f"{name!r} of shape {tuple(state[name].shape)} where {shapes[name]} is needed"
    return ""


def _copied(name: str, saved: Any, loaded: Any) -> Any:
    if not isinstance(saved, Tensor) or (name in LIKE_PARAMETERS and not isinstance(saved, DTensor)):
        return loaded
    return saved.detach().clone().to("cpu" if name in COUNTERS else loaded.device)
