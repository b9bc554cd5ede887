"""How a weight moves by its gradient: a function on lists of tensors, and AdamW, which most weights follow.

    M ← β₁ M + (1 - β₁) G         V ← β₂ V + (1 - β₂) G²
    W ← (1 - lr λ) W - lr / (1 - β₁ᵗ) · M / (√(V / (1 - β₂ᵗ)) + ε)

A rule keeps nothing itself: the state of a parameter is a dictionary, with torch's names. lorank/optim/rules.py lists the others.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorank.fields import NonNegative

State = dict[str, Any]
Group = Mapping[str, Any]


class Rule:
    """One way to move. Weights, gradients and states are lists of whole tensors, or of parts of them if the rule is
    `elementwise`."""

    kept: ClassVar[tuple[str, ...]]
    """Entries of a state, counters (`step`) left out; a state that has one of them is this rule's."""
    typed: ClassVar[tuple[str, ...]] = ()
    """Those that have the weights' type."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings of a group that are not those of every optimizer."""
    types: ClassVar[Mapping[str, Any]] = {"eps": NonNegative}
    """What settings must be, as the annotation of a field."""
    elementwise: ClassVar[bool] = False
    matrices_only: ClassVar[bool] = False
    at_once: ClassVar[int] = 1
    """How many parameters of a group, one after another, move together: 2 for pairs of factors."""

    def check(self, weights: Sequence[Tensor]) -> None:
        """Raise ValueError if these parameters of a group cannot move together."""

    def owns(self, state: Mapping[str, Any]) -> bool:
        return any(name in state for name in self.kept)

    def make(self, like: Tensor) -> State:
        """The state before the first step of a weight of this shape, type and device."""
        raise NotImplementedError

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Of the tensors that are kept for a weight, by their names; `step` is not included."""
        return dict(_shapes(self, tuple(shape)))

    def step(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        """One step in place, with the group's lr and weight_decay."""
        raise NotImplementedError

    def inside(
        self, zeros: list[Tensor], R: list[Tensor], states: list[State], group: Group, weights: Sequence[Tensor]
    ) -> None:
        """A step of zeros that stand for `weights` in a subspace, where their gradients are R."""
        self.step(zeros, R, states, group)

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Bytes that are kept for a weight; counters are not included."""
        raise NotImplementedError

    def flops(self, shape: Sequence[int]) -> int:
        """FLOPs of the matrix products in a step."""
        return 0

    def gathered(self, shape: Sequence[int], itemsize: int) -> int:
        """Bytes that become whole in each process when a sharded weight is gathered to move: the weight, its gradient, and what is
        kept in their shape."""
        alike = sum(kept == tuple(shape) for kept in self.shapes(shape).values())
        return (2 + alike) * math.prod(shape) * itemsize

    def gathered_inside(self, shape: Sequence[int], itemsize: int) -> int:
        """The same where zeros move in place of a weight: the move, in single precision at least, by a rule that is `elementwise`;
        by another one the matrices that are kept."""
        if self.elementwise:
            return math.prod(shape) * max(itemsize, 4)
        return sum(math.prod(kept) for kept in self.shapes(shape).values() if len(kept) > 1) * itemsize


@functools.lru_cache(maxsize=1024)
def _shapes(rule: Rule, shape: tuple[int, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    made = rule.make(torch.empty(shape, device="meta"))
    return tuple((name, tuple(value.shape)) for name, value in made.items() if name != "step")


class AdamW(Rule):
    """torch's fused AdamW. With `eps_after_root`, ε is added to √V as in GaLore; torch adds it to √(V / (1 - β₂ᵗ)), where
    it must be larger by that root. Counters stay on the host, and parameters that have taken equally many steps move together."""

    kept = typed = ("exp_avg", "exp_avg_sq")
    elementwise = True

    def __init__(self, *, eps_after_root: bool = False):
        self.eps_after_root = eps_after_root

    def make(self, like: Tensor) -> State:
        moments = {name: torch.zeros_like(like, memory_format=torch.contiguous_format) for name in self.typed}
        return {"step": torch.zeros((), dtype=torch.float32, device="cpu"), **moments}

    def step(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        alike: dict[Any, list[int]] = {}
        for i, (W, state) in enumerate(zip(weights, states, strict=True)):
            state["step"] += 1
            alike.setdefault((int(state["step"]), W.device, W.dtype), []).append(i)
        beta1, beta2 = group["betas"]
        for (t, device, _), some in alike.items():
            count = torch.full((), t, dtype=torch.float32, device=device)
            torch._fused_adamw_(
                [weights[i] for i in some],
                [gradients[i] for i in some],
                [states[i]["exp_avg"] for i in some],
                [states[i]["exp_avg_sq"] for i in some],
                [],
                [count] * len(some),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"] / (1 - beta2**t) ** 0.5 if self.eps_after_root else group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        return 2 * math.prod(shape) * itemsize


class Forgetful(AdamW):
    """AdamW with ε after the root, whose moments begin anew after `every` steps."""

    def __init__(self, every: int | None):
        super().__init__(eps_after_root=True)
        self.every = every

    def make(self, like: Tensor) -> State:
        return {**super().make(like), "steps": torch.zeros((), dtype=torch.int64, device="cpu")}

    def step(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        super().step(weights, gradients, states, group)
        for state in states:
            state["steps"] += 1
            if self.every and int(state["steps"]) % self.every == 0:
                forget(state)


def forget(state: State) -> None:
    """Let Adam's moments and their counter begin anew."""
    for name in ("exp_avg", "exp_avg_sq", "step"):
        if name in state:
            state[name].zero_()
