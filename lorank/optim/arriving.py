"""Gradients that are projected as they arrive, for `LowRankOptimizer`.

With a method's `in_backward` each gradient is projected in a hook as soon as backward has finished
it, and freed; micro-batches add up inside the subspace, where they are r max(m, n) numbers instead of m n. The step, and with
it a schedule, still comes once per update. Three things differ: a basis that is due is that of the first micro-batch's
gradient; a norm to clip is that of `seen_parameters`, which is what the optimizer sees of the gradient; and to drop gradients,
call the optimizer's ``zero_grad``, because the model's does not reach them. Parameters without rank keep their gradients.
"""

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.optim.loading import misfit
from lorank.optim.shards import processes
from lorank.optim.stacks import check_finite, stacks

if TYPE_CHECKING:
    from lorank.optim.driver import ByGroups

logger = logging.getLogger(__name__)


class Arriving(Optimizer):
    """What `LowRankOptimizer` does before its step: see gradients, project them early if it must, look after states."""

    method: "ByGroups"
    in_backward: bool
    _check_group: Callable[[dict[str, Any]], None]
    _watched: set[nn.Parameter]
    _staggered: int

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
        for stack in stacks(self.method, {**group, "params": [p]}, self.state, [p], self._phases()):
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

    # ---- groups and states

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

    def _phases(self) -> dict[nn.Parameter, int]:
        """By how many steps the refreshes of a matrix come earlier, by its place in the groups: wrappers swap parameters."""
        if not self._staggered:
            return {}
        places = [(p, group["update_gap"]) for group in self.param_groups if group["rank"] for p in group["params"]]
        return {p: i * gap // self._staggered for i, (p, gap) in enumerate(places[: self._staggered])}


def check_alone() -> None:
    if processes() > 1:
        raise ValueError(
            "in_backward must be False in distributed runs, because it sees the gradient of one process only"
        )
