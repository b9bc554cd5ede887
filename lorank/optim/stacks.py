"""Matrices of equal shape as one stack [k, m, n], so that one product serves all of them, and the subspaces they move in.

A parameter [E, m, n], as a mixture's experts are, is a stack by itself: k = E, and what is kept of it begins with E too.

    R = Pᵀ G        or  R = G Qᵀ        or  R = Pᵀ G Qᵀ           into the subspace
    W ← W + P D     or  W + D Q         or  W + P D Q             and back

    G, W [m, n]     P [m, r], orthonormal columns     Q [r, n], orthonormal rows     R, D [r, n], [m, r] or [r, r]

What is computed is computed in single precision at least, and stored in the type of the weights.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorank.optim.bases import Basis, sides
from lorank.optim.shards import Waiting, add_product, all_finite, like, local, sharded, whole

if TYPE_CHECKING:
    from lorank.optim.driver import ByGroups

STACKED = {"cpu": 1 << 18}
"""Numbers in one stack, at most: a CPU is busy with one large product, which a copy into a stack would only delay."""
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
    """Bases that processes of a sharded run find together."""

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

    def add(self, moves: Tensor | Product) -> None:
        """W ← W + moves [k, m, n]."""
        if isinstance(moves, Product):
            for p, a, b in zip(self.parameters, each(moves.a, self.ndim), each(moves.b, self.ndim), strict=True):
                add_product(p, a, b, moves.scale)
        else:
            for p, move in zip(self.parameters, each(moves, self.ndim), strict=True):
                local(p).add_(local(like(move, p)))

    # ---- a subspace of each matrix

    def refresh(self, basis: Basis) -> None:
        """Find the bases that are due every `update_gap` steps, unless a gradient has been projected for this step."""
        gap, steps = self.group["update_gap"], self.steps
        due = [
            i
            for i, (state, phase) in enumerate(zip(self.states, self.phases, strict=True))
            if not ("left" in state or "right" in state) or (steps + phase) % gap == 0
        ]
        if not due or "arrived" in self.states[0]:
            return
        some = self._replace(parameters=[self.parameters[i] for i in due], states=[self.states[i] for i in due])
        G, of = some.gradients(), some.parameters[0]
        rank = min(self.group["rank"], *G.shape[1:])
        asked = sides(self.group["projection"], *G.shape[1:])
        for side, is_asked, given in zip(("left", "right"), asked, (G, G.mT), strict=True):
            if is_asked:
                store = partial(some._put_basis, side)
                if isinstance(of, DTensor):
                    self.waiting.share(given, rank, of, basis, store)
                else:
                    store(basis(given, rank))

    def _put_basis(self, side: str, P: Tensor) -> None:
        self.put(side, P if side == "left" else P.mT)

    def project(self, G: Tensor) -> Tensor:
        """R of gradients [k, m, n]; of those that were projected as they arrived, R is there already."""
        if "arrived" in self.states[0]:
            return self.get("arrived")
        left, right = self._bases()
        R = G if left is None else left.mT @ G
        return R if right is None else R @ right.mT

    def lift(self, D: Tensor, scale: float = 1.0) -> Product:
        """The way back: scale · P D, D Q or P D Q."""
        left, right = self._bases()
        if right is None:
            return Product(left, D, scale)  # type: ignore[arg-type]
        return Product(D if left is None else left @ D, right, scale)

    def _bases(self) -> tuple[Tensor | None, Tensor | None]:
        left, right = (self.get(side) if side in self.states[0] else None for side in ("left", "right"))
        return left, right

    def ruled(self, R: Tensor, **changes: Any) -> Tensor:
        """D [k, ...]: what the group's rule makes of weights that are 0 and have the gradients R. Of sharded state each process
        moves its part if the rule is elementwise."""
        rule, zeros = self.method.rules[self.group["rule"]], torch.zeros_like(R)
        for state, one in zip(self.states, each(R, self.ndim), strict=True):
            if not rule.owns(state):
                state.update(rule.make(one))
        names = (*rule.kept, "step")
        states = [{name: state[name] for name in names if name in state} for state in self.states]
        states = [{n: sharded(v, p) for n, v in s.items()} for p, s in zip(self.parameters, states, strict=True)]
        parts, take = (sharded, local) if rule.elementwise else (_same, whole)
        moved, given = (
            [parts(X, p) for X, p in zip(each(stack, self.ndim), self.parameters, strict=True)] for stack in (zeros, R)
        )
        its = [{n: take(v) if isinstance(v, Tensor) else v for n, v in state.items()} for state in states]
        for state in its:
            state.update({name: state[name].to(R.dtype) for name in rule.typed if name in state})
        settings = {**self.group, "weight_decay": 0.0, **changes}
        rule.inside([take(X) for X in moved], [take(X) for X in given], its, settings, self.parameters)
        stored = self.parameters[0].dtype
        for p, ours, before, after in zip(self.parameters, self.states, states, its, strict=True):
            for name, value in after.items():
                new = value.to(stored) if name in rule.typed else value
                if rule.elementwise and isinstance(before[name], DTensor):
                    local(before[name]).copy_(new)
                    ours[name] = before[name]
                else:
                    ours[name] = sharded(new, p)
        return stacked([whole(X) for X in moved], self.ndim) if isinstance(self.parameters[0], DTensor) else zeros


def _same(values: Tensor, of: Tensor) -> Tensor:
    return values


def stacked(values: list[Tensor], ndim: int) -> Tensor:
    """[k, ...] of one value for each parameter of so many dimensions; that of a parameter [E, m, n] is together already. May share
    the memory of the value."""
    if ndim == 3:
        return values[0]
    return values[0][None] if len(values) == 1 else torch.stack(values)


def each(values: Tensor, ndim: int) -> Sequence[Tensor]:
    """The way back: one value for each parameter."""
    return [values] if ndim == 3 else values.unbind()


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
    waiting: Waiting | None = None,
) -> list[Stack]:
    """The matrices of a group that are among `moved`; their states count `steps`."""
    return list(_alike(method, group, state, set(moved), phases, Waiting() if waiting is None else waiting))


def _alike(
    method: "ByGroups",
    group: dict[str, Any],
    state: Mapping[Any, dict[str, Any]],
    wanted: set[nn.Parameter],
    phases: Mapping[nn.Parameter, int],
    waiting: Waiting,
) -> Iterator[Stack]:
    alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for p in group["params"]:
        if p in wanted and p.numel():
            steps = int(state[p].setdefault("steps", torch.zeros((), dtype=torch.int64, device="cpu")))
            alike.setdefault((p.shape, p.dtype, p.device, steps), []).append(p)
    for (shape, _, device, _), parameters in alike.items():
        most = 1 if len(shape) == 3 else max(1, STACKED.get(device.type, 1 << 26) // shape.numel())
        for start in range(0, len(parameters), most):
            some = parameters[start : start + most]
            yield Stack(method, some, group, [state[p] for p in some], [phases.get(p, 0) for p in some], waiting)


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """In single precision, squared or not."""
    if all(G.device.type == "cpu" and G.dtype == torch.float32 and G.is_contiguous() for G in gradients):
        return [torch.dot(G.view(-1), G.view(-1)) for G in gradients]  # the fastest there
    return [norm.float() for norm in torch._foreach_norm(gradients)]


def _largest_square(G: Tensor) -> Tensor:
    """In single precision at least, or not finite; as small as one can be, so that processes may add theirs."""
    if not G.numel():
        return torch.zeros((), dtype=torch.float64, device=G.device)
    largest = G.to(torch.promote_types(G.dtype, torch.float32)).abs().max()
    return torch.where(largest.square().isfinite(), torch.zeros_like(largest), largest.square()).double()


@torch.compiler.disable
def check_finite(gradients: Mapping[nn.Parameter, Tensor | None]) -> None:
    """Look at gradients before anything is done with them.

    Raises:
        FloatingPointError: an entry of one or its square is not finite, in all processes of a sharded run, whoever's part it is.
        ValueError: one is sparse.
    """
    watched = {p: local(G) for p, G in gradients.items() if G is not None}
    if any(G.is_sparse for G in watched.values()):
        raise ValueError(
            "gradients must be dense with low-rank optimizers, got a sparse one; use nn.Embedding(sparse=False)"
        )
    if not watched:
        return
    finite = all_finite(torch.stack(_norms(list(watched.values()))), watched)
    if finite.all():
        return
    doubtful = {p: G for (p, G), is_finite in zip(watched.items(), finite, strict=True) if not is_finite}
    finite = all_finite(torch.stack([_largest_square(G) for G in doubtful.values()]), doubtful)
    if not finite.all():  # else it was the sum of squares that is too large
        p = next(p for p, is_finite in zip(doubtful, finite, strict=True) if not is_finite)
        raise FloatingPointError(
            f"the gradient of a parameter of shape {tuple(p.shape)} is not finite; lower lr or clip gradients"
        )
