"""Matrices of equal shape as one stack [k, m, n], so that one product serves all of them, and the subspaces they move in.

A parameter [E, m, n], as a mixture's experts are, is a stack by itself: k = E, and what is kept of it begins with E too.

    R = Pᵀ G        or  R = G Qᵀ        or  R = Pᵀ G Qᵀ           into the subspace
    W ← W + P D     or  W + D Q         or  W + P D Q             and back

    G, W [m, n]     P [m, r], orthonormal columns     Q [r, n], orthonormal rows     R, D [r, n], [m, r] or [r, r]

What is computed is computed in single precision at least, and stored in the type of the weights.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lorank.optim.applying import step_inside
from lorank.optim.bases import Basis, sides
from lorank.optim.shards import Waiting, add_product, like, local, sharded, whole

if TYPE_CHECKING:
    from lorank.optim.driver import ByGroups

T = TypeVar("T")
STACKED = {"cpu": 1 << 18}
"""Numbers in one stack, at most, by device; elsewhere 2²⁶. A CPU is busy with one large product, which a copy would only delay."""
LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "momentum", "momentum_buffer", "left", "right", "error", "arrived")
"""Entries of a state that have the parameters' type."""


class Product(NamedTuple):
    """A move scale · a b that is added to the weights without the matrix m x n in between."""

    a: Tensor
    """[k, m, r]"""
    b: Tensor
    """[k, r, n]"""
    scale: float = 1.0

    @property
    def mT(self) -> "Product":
        return Product(self.b.mT, self.a.mT, self.scale)

    @property
    def value(self) -> Tensor:
        return torch.baddbmm(self.a.new_zeros(()), self.a, self.b, beta=0, alpha=self.scale)


class Stack(NamedTuple):
    """Matrices of one group that have equal shapes and have taken equally many steps, or a parameter that is a stack already."""

    method: "ByGroups"
    parameters: list[nn.Parameter]
    group: dict[str, Any]
    states: list[dict[str, Any]]
    phases: list[int]
    """By how many steps the refresh of each basis is earlier than others'."""
    waiting: Waiting

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.promote_types(self.parameters[0].dtype, torch.float32)

    @property
    def ndim(self) -> int:
        """Of each parameter: 2, or 3 for one that is a stack already."""
        return self.parameters[0].ndim

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.states[0]["steps"])

    def gradients(self) -> Tensor:
        """[k, m, n]; their negatives where a group is to be maximised."""
        G = stacked([whole(p.grad) for p in self.parameters], self.ndim).to(self.dtype)  # type: ignore[arg-type]
        return -G if self.group.get("maximize") else G

    def get(self, name: str, *, or_else: float | None = None) -> Tensor:
        """An entry of all states [k, ...]; `or_else`, one number for each matrix, where it is not kept yet."""
        if or_else is not None and any(name not in state for state in self.states):
            missing = torch.full(self.parameters[0].shape[:-2], or_else, device=self.parameters[0].device)
            return stacked([state.get(name, missing).to(self.dtype) for state in self.states], self.ndim)
        values = stacked([whole(state[name]) for state in self.states], self.ndim)
        return values.to(self.dtype) if name in LIKE_PARAMETERS else values

    def put(self, name: str, values: Tensor) -> None:
        """Store an entry of all states; where the weights are sharded, matrices are too."""
        values = values.to(self.parameters[0].dtype) if name in LIKE_PARAMETERS else values
        for p, state, value in zip(self.parameters, self.states, each(values, self.ndim), strict=True):
            kept = value.clone(memory_format=torch.contiguous_format)
            state[name] = sharded(kept, p)

    def add(self, moves: Tensor | Product, to: Sequence[Tensor]) -> None:
        """W ← W + moves [k, m, n], for the parameters or their copies."""
        if isinstance(moves, Product):
            for W, a, b in zip(to, each(moves.a, self.ndim), each(moves.b, self.ndim), strict=True):
                add_product(W, a, b, moves.scale)
        else:
            for W, move in zip(to, each(moves, self.ndim), strict=True):
                local(W).add_(local(like(move, W)))

    # ---- a subspace of each matrix

    def refresh(self, basis: Basis) -> None:
        """Find the bases that are due every `update_gap` steps, unless a gradient has been projected for this step."""
        begun = ["left" in state or "right" in state for state in self.states]
        late = [(self.steps + phase) % self.group["update_gap"] == 0 for phase in self.phases]
        due = [i for i in range(len(begun)) if late[i] or not begun[i]]
        if not due or "arrived" in self.states[0]:
            return
        some = self._replace(parameters=[self.parameters[i] for i in due], states=[self.states[i] for i in due])
        G = some.gradients()
        rank = min(self.group["rank"], *G.shape[1:])
        left, right = sides(self.group["projection"], *G.shape[1:])
        if left:
            self.waiting.find(basis, G, rank, some.parameters[0], lambda P: some.put("left", P))
        if right:
            self.waiting.find(basis, G.mT, rank, some.parameters[0], lambda P: some.put("right", P.mT))

    def project(self, G: Tensor) -> Tensor:
        """R of gradients [k, m, n]; of those that were projected as they arrived, R is there already."""
        if "arrived" in self.states[0]:
            return self.get("arrived")
        left, right = self._bases()
        R = G if left is None else left.mT @ G
        return R if right is None else R @ right.mT

    def ruled(self, R: Tensor, **changes: Any) -> Tensor:
        """D [k, ...]: what the group's rule makes of weights that are 0 and have the gradients R."""
        D, group = torch.zeros_like(R), {**self.group, "weight_decay": 0.0, **changes}
        rule = self.method.rules[group["rule"]]
        step_inside(rule, each(D, self.ndim), each(R, self.ndim), self.parameters, self.states, group)
        return D

    def lift(self, D: Tensor, scale: float = 1.0) -> Product:
        """The way back: scale · P D, D Q or P D Q."""
        left, right = self._bases()
        if right is None:
            return Product(left, D, scale)  # type: ignore[arg-type]
        return Product(D if left is None else left @ D, right, scale)

    def _bases(self) -> tuple[Tensor | None, Tensor | None]:
        left, right = (self.get(side) if side in self.states[0] else None for side in ("left", "right"))
        return left, right


def stacked(values: list[Tensor], ndim: int) -> Tensor:
    """[k, ...] of one value for each parameter of that many dimensions; that of a parameter [E, m, n] is together already. May share
    the memory of the value."""
    if ndim == 3:
        return values[0]
    return values[0][None] if len(values) == 1 else torch.stack(values)


def each(values: Tensor, ndim: int) -> Sequence[Tensor]:
    """The way back: one value for each parameter."""
    return [values] if ndim == 3 else values.unbind()


def at_once(
    items: Iterable[T], tensors: Callable[[T], Sequence[Tensor]], apart: Callable[[T], Hashable] = lambda item: None
) -> Iterator[list[T]]:
    """The items by the stack they belong to: those whose tensors have equal shapes and types, and that `apart` does not tell apart, as
    many as `STACKED` lets into one. Those with tensors [E, m, n] are stacks already."""
    alike: dict[tuple[Hashable, ...], list[T]] = {}
    for item in items:
        alike.setdefault((apart(item), *((t.shape, t.dtype, t.device) for t in tensors(item))), []).append(item)
    for some in alike.values():
        first = tensors(some[0])
        numbers = sum(tensor.numel() for tensor in first)
        most = 1 if first[0].ndim == 3 else max(1, STACKED.get(first[0].device.type, 1 << 26) // numbers)
        yield from (some[start : start + most] for start in range(0, len(some), most))


def as_stack(shape: Sequence[int]) -> tuple[int, int, int]:
    """(k, m, n) of a weight [m, n] or [k, m, n].

    >>> as_stack((20, 10)), as_stack((8, 20, 10))
    ((1, 20, 10), (8, 20, 10))
    """
    *k, m, n = shape
    return math.prod(k), m, n


@torch.compiler.disable
def stacks(
    method: "ByGroups",
    group: dict[str, Any],
    state: Mapping[Any, dict[str, Any]],
    moved: Iterable[nn.Parameter],
    phases: Mapping[nn.Parameter, int],
    waiting: Waiting,
) -> list[Stack]:
    """The matrices of a group that are among `moved`; their states count `steps`."""
    wanted = set(moved)
    matrices = [p for p in group["params"] if p in wanted and p.numel()]

    def steps(p: nn.Parameter) -> int:
        return int(state[p].setdefault("steps", torch.zeros((), dtype=torch.int64, device="cpu")))

    return [
        Stack(method, some, group, [state[p] for p in some], [phases.get(p, 0) for p in some], waiting)
        for some in at_once(matrices, lambda p: [p], steps)
    ]
