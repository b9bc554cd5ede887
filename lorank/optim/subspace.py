"""Training in a subspace: the weights stay dense, but the optimizer sees their gradients through a window of rank r.

    R = Pᵀ G        or  R = G Qᵀ        or  R = Pᵀ G Qᵀ           into the subspace
    D = what any optimizer does to a parameter that is 0 and has the gradient R
    W ← W + scale · P D  or  scale · D Q  or  scale · P D Q       and back

    G, W [m, n]     P [m, r], orthonormal columns     Q [r, n], orthonormal rows     R, D [r, n], [m, r] or [r, r]

Basis and optimizer are independent of each other: `Subspace` takes any class of torch.optim, and a `Basis` is a
function. GaLore is the singular basis with AdamW (lorank/optim/galore.py); Fira lifts differently (lorank/optim/fira.py).
State per matrix: that of the inner optimizer on R, and the basis.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.optim.matrices import Stack, check_groups, restore, stacks

Projection = Literal["std", "reverse_std", "left", "right", "full"]
Basis = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From gradients [k, m, n] in fp32 and a rank r: columns P [k, m, r] and rows Q [k, r, n]."""


# ---- the mathematics


def sides(projection: Projection, m: int, n: int) -> tuple[bool, bool]:
    """Whether a gradient [m, n] is projected from the left, from the right, or both."""
    if projection == "full":
        return True, True
    right = {"std": m >= n, "reverse_std": m < n, "left": False, "right": True}[projection]
    return not right, right


def singular_basis(gradients: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first r singular vectors; where LAPACK does not converge, from the Gram matrices in float64."""
    try:
        U, _, Vh = torch.linalg.svd(gradients, full_matrices=False)
    except torch.linalg.LinAlgError:
        G = gradients.double()
        U = torch.linalg.eigh(G @ G.mT).eigenvectors.flip(-1).to(gradients.dtype)
        Vh = torch.linalg.eigh(G.mT @ G).eigenvectors.flip(-1).mT.to(gradients.dtype)
    return U[..., :rank], Vh[..., :rank, :]


def randomised_basis(gradients: Tensor, rank: int, iterations: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Nearly the same at a fraction of the time: subspace iteration on r random directions (arXiv 0909.4061)."""
    generator = torch.Generator(gradients.device).manual_seed(seed)
    shape = (*gradients.shape[:-2], gradients.shape[-1], rank)
    Q = torch.randn(shape, generator=generator, device=gradients.device, dtype=gradients.dtype)
    for _ in range(iterations):
        P = torch.linalg.qr(gradients @ Q).Q
        Q = torch.linalg.qr(gradients.mT @ P).Q
    return torch.linalg.qr(gradients @ Q).Q, Q.mT


def project(gradients: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """R of G [..., m, n]."""
    inside = gradients if left is None else left.mT @ gradients
    return inside if right is None else inside @ right.mT


def lift(inside: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The way back, [..., m, n]."""
    outside = inside if left is None else left @ inside
    return outside if right is None else outside @ right


# ---- the optimizer


class Subspace(Optimizer):
    """Any optimizer, for the groups that have a `rank` in a subspace of that rank, for the others as it is.

    Args:
        params: parameters or groups of them. The keys of a projected group are ``rank`` (a rank above the narrower side
            is that side), and, to differ from the arguments below, ``update_gap``, ``scale`` and ``projection``.
        inner: class of the optimizer that works inside, called with groups and `options`.
        lr: learning rate, of the group as everywhere in torch.
        update_gap: steps between two refreshes of a basis; the first step has one.
        scale: factor of what is lifted back.
        projection: "std" projects the longer side away and keeps the moments r wide on the shorter (m >= n from the
            right), "reverse_std" the other way round, "left", "right", or "full" from both sides.
        basis: `singular_basis`, `randomised_basis`, or a function of yours.
        weight_decay: decoupled: W ← W - lr weight_decay W after the step, not scaled.

    Raises:
        ValueError: a parameter of a projected group is not a matrix, an unknown projection, or a closure.
        FloatingPointError: a gradient is not finite; nothing has been changed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        inner: Callable[..., Optimizer],
        *,
        lr: float,
        update_gap: int = 200,
        scale: float = 0.25,
        projection: Projection = "std",
        basis: Basis = singular_basis,
        weight_decay: float = 0.0,
        **options: Any,
    ):
        defaults = {"lr": lr, "rank": None, "update_gap": update_gap, "scale": scale, "projection": projection}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        check_groups(self.param_groups)
        self.basis = basis
        self._inside = {p: self._check(group, p) for group in self.param_groups for p in group["params"]}
        self.inner = inner(
            [{"params": [self._inside[p] for p in group["params"]], "lr": lr} for group in self.param_groups],
            weight_decay=0.0,
            **options,
        )

    def _check(self, group: dict[str, Any], p: nn.Parameter) -> nn.Parameter:
        """What stands for a parameter in the inner optimizer: itself, or an empty one that is filled for each step."""
        if group["rank"] is None:
            return p
        if group["projection"] not in ("std", "reverse_std", "left", "right", "full"):
            raise ValueError(f"projection={group['projection']!r} is none of std, reverse_std, left, right, full")
        if group["update_gap"] < 1:
            raise ValueError(f"update_gap={group['update_gap']} is not positive")
        return nn.Parameter(p.new_empty(0, 0))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError(f"{type(self).__name__} evaluates no closure; call backward() before step()")
        found = stacks(self.param_groups, self.state)
        for stack in found:
            self._enter(stack)
        for ours, its in zip(self.param_groups, self.inner.param_groups, strict=True):
            its["lr"] = ours["lr"]
        self.prepare()
        self.inner.step()
        for p, inside in self._inside.items():
            if inside in self.inner.state:
                self.state[p]["inner"] = self.inner.state[inside]
        for stack in found:
            self._leave(stack)
        for group in self.param_groups:
            if group["weight_decay"]:
                moved = [p for p in group["params"] if p.grad is not None]
                torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
        return None

    def prepare(self) -> None:
        """Called before the inner optimizer steps."""

    def move(self, stack: Stack, inside: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        """What is added to the weights [k, m, n], from the inner optimizer's step `inside`."""
        return stack.group["scale"] * lift(inside, left, right)

    def _enter(self, stack: Stack) -> None:
        """Refresh the basis if it is time, and give the inner optimizer zeros with the projected gradients."""
        G, group = stack.gradients(), stack.group
        first = self.state[stack.parameters[0]]
        if int(first["steps"]) % group["update_gap"] == 0:
            on_left, on_right = sides(group["projection"], *G.shape[1:])
            P, Q = self.basis(G.float(), min(group["rank"], *G.shape[1:]))
            for p, columns, rows in zip(stack.parameters, P, Q, strict=True):
                kept = {"left": columns} if on_left else {}
                kept |= {"right": rows} if on_right else {}
                self.state[p].update({side: basis.to(G.dtype).contiguous() for side, basis in kept.items()})
        for p, R in zip(stack.parameters, project(G, *self._bases(stack)), strict=True):
            inside = self._inside[p]
            inside.data = torch.zeros_like(R)
            inside.grad = R
            self.state[p]["steps"] += 1

    def _leave(self, stack: Stack) -> None:
        inside = [self._inside[p] for p in stack.parameters]
        moves = self.move(stack, torch.stack([p.data for p in inside]), *self._bases(stack))
        stack.add(moves)
        for p in inside:
            p.data, p.grad = p.new_empty(0, 0), None

    def _bases(self, stack: Stack) -> tuple[Tensor | None, Tensor | None]:
        left, right = (stack.get(side) if side in stack.states[0] else None for side in ("left", "right"))
        return left, right

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore(self, state_dict)
        for p, inside in self._inside.items():
            if "inner" in self.state[p]:
                self.inner.state[inside] = self.state[p]["inner"]
