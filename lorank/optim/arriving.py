"""Gradients that are projected as they arrive, for `LowRankOptimizer`.

With a method's `in_backward` each gradient is projected in a hook as soon as backward has finished
it, and freed; micro-batches add up inside the subspace, where they are r max(m, n) numbers instead of m n. The step, and with
it a schedule, still comes once per update. Three things differ: a basis that is due is that of the first micro-batch's
gradient; a norm to clip is that of `seen_parameters`, which is what the optimizer sees of the gradient; and to drop gradients,
call the optimizer's ``zero_grad``, because the model's does not reach them. Parameters without rank keep their gradients.
"""

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorank.optim.finite import check_finite
from lorank.optim.grouped import Grouped
from lorank.optim.shards import Waiting, processes
from lorank.optim.stacks import stacks

if TYPE_CHECKING:
    from lorank.optim.driver import ByGroups


class Arriving(Grouped):
    """What `LowRankOptimizer` does before its step: see gradients, and project them early if it must."""

    def __init__(self, params: Iterable[Any], method: "ByGroups", **settings: Any):
        self.in_backward: bool = getattr(method, "in_backward", False)
        if self.in_backward:
            check_alone()
        self._watched: set[nn.Parameter] = set()
        super().__init__(params, method, **settings)
        self._staggered = len(self._projected()) if getattr(method, "stagger", False) else 0
        self._watch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._watch()

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
        self._check_group({**group, "params": [p]})
        check_finite({p: p.grad})
        self._forget_misfits(group, [p])
        for stack in stacks(self.method, {**group, "params": [p]}, self.state, [p], self._phases(), Waiting()):
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

    def _collect(self) -> None:
        """Project what no backward pass brought, or none while the parameter was trained."""
        if hasattr(self, "found_inf"):
            raise ValueError(
                "in_backward must be False with GradScaler, because gradients are projected before they are unscaled; "
                "train in bfloat16, which needs no scaler, or leave it out"
            )
        check_alone()  # the processes may have come together since
        for p in self._projected():
            if p.grad is not None:
                self._arrive(p)
        self._watch()

    def _checked(self) -> list[nn.Parameter]:
        """The parameters that a step moves; their groups, states and gradients are as they must be."""
        for group in self.param_groups:
            self._check_group(group)  # which users may change
            self._forget_misfits(group, group["params"])
        if self.in_backward:
            self._collect()
        seen = {p: self._seen(p).grad for group in self.param_groups for p in group["params"]}
        check_finite(seen)
        return [p for p, G in seen.items() if G is not None]

    def _phases(self) -> dict[nn.Parameter, int]:
        """By how many steps the refreshes of a matrix come earlier, by its place in the groups: wrappers swap parameters."""
        if not self._staggered:
            return {}
        places = [(p, group["update_gap"]) for group in self.param_groups if group["rank"] for p in group["params"]]
        return {p: i * gap // self._staggered for i, (p, gap) in enumerate(places[: self._staggered])}

    # ---- copies

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks, and without the `step` that a scheduler sets, which is the original's."""
        return {n: v for n, v in self.__dict__.items() if "hook" not in n and n not in ("step", "_watched")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "method" in state:
            self._watched = set()
            self._watch()


def check_alone() -> None:
    if processes() > 1:
        raise ValueError(
            "in_backward must be False in distributed runs, because it sees the gradient of one process only"
        )
