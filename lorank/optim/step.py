"""One optimizer for all methods that decide how weights move: it goes through its groups and asks the method.

    a group with a rank       stacks of equal shape, each moved by `method.move(stack, G, group)`
    a group without           the function of lorank.optim.rules that its ``rule`` names, see lorank/optim/applying.py

There is no optimizer inside, and no copy of a group or a parameter. A state is a flat dictionary: "steps", a basis, and what
the rule keeps. Groups and states are checked in lorank/optim/grouped.py. Gradients may be projected as they arrive:
lorank/optim/arriving.py.
"""

from collections.abc import Callable

import torch

from lorank.optim.applying import decay, step_plain
from lorank.optim.arriving import Arriving
from lorank.optim.groups import rate
from lorank.optim.shards import Waiting
from lorank.optim.stacks import Stack, stacks
from lorank.optim.stochastic import Rounding


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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved, phases, waiting = self._checked(), self._phases(), Waiting()
        found = []
        for group in self.param_groups:
            group = {**group, "lr": rate(group)}
            projected = group["rank"] is not None
            found.append((group, stacks(self.method, group, self.state, moved, phases, waiting) if projected else []))
        for stack in (stack for _, its in found for stack in its):
            self.method.prepare(stack)
        waiting.settle()
        rounding = Rounding(self.param_groups, wanted=self.method.stochastic_rounding)
        for group, its in found:
            if group["rank"] is None:
                step_plain(self.method, group, self.state, rounding)
            for stack in its:
                self._move(stack, rounding)
        rounding.count()
        return loss

    def _move(self, stack: Stack, rounding: Rounding) -> None:
        group, last = stack.group, self.method.decays_last
        G = stack.get("arrived") if "arrived" in stack.states[0] else stack.gradients()
        turned = self.method.tall and G.shape[-2] < G.shape[-1]
        move = self.method.move(stack, G.mT if turned else G, group)
        weights = [rounding.exact(p) for p in stack.parameters]
        decay(weights, group, now=not last)
        stack.add(move.mT if turned else move, to=weights)
        decay(weights, group, now=last)
        for p, V, state in zip(stack.parameters, weights, stack.states, strict=True):
            rounding.store(V, p, group)
            state.pop("arrived", None)
            state["steps"] += 1
