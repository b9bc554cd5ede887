"""Training in a subspace: the weights stay dense, but the optimizer sees their gradients through a window of rank r.

    R = Pᵀ G        or  R = G Qᵀ        or  R = Pᵀ G Qᵀ           into the subspace
    D = what any optimizer does to a parameter that is 0 and has the gradient R
    W ← W + scale · P D  or  scale · D Q  or  scale · P D Q       and back

    G, W [m, n]     P [m, r], orthonormal columns     Q [r, n], orthonormal rows     R, D [r, n], [m, r] or [r, r]

Basis and optimizer are independent of each other: `Subspace` takes any class of torch.optim, and a basis is a function
(lorank/optim/bases.py). GaLore is the singular basis with AdamW (lorank/optim/galore.py); Fira lifts differently
(lorank/optim/fira.py). State per matrix: that of the inner optimizer on R, and the basis.

Projected as it arrives. With `in_backward` each gradient is projected in a hook as soon as backward has finished it, and
freed; micro-batches add up inside the subspace, where they are r max(m, n) numbers instead of m n. The step, and with it
a schedule, still comes once per update. Three things differ: a basis that is due is that of the first micro-batch's
gradient; a norm to clip is that of `seen_parameters`, which is what the optimizer sees of the gradient; and to drop gradients,
call the optimizer's ``zero_grad``, as the model's knows nothing of them. Parameters without rank keep their gradients.
"""

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lorank.optim.bases import BASES, Basis, basis_flops
from lorank.optim.legacy.matrices import (
    Stack,
    adamw_bytes,
    check_as_many,
    check_finite,
    check_groups,
    check_numbers,
    copied,
    last_group_or_none,
    load,
    local,
    processes,
    stacked,
    stacks,
    whole,
)

Projection = Literal["std", "reverse_std", "left", "right", "full"]
OURS = ("params", "update_gap", "scale", "projection", "weight_decay")
"""Settings of a group that are not the inner optimizer's."""
BY_STACK = ("torch.", "lorank.")
"""Packages whose optimizers count steps parameter by parameter, so that one stack after another may be stepped: then no more than
one's R and D are there at a time, and in a CPU's caches. Others may count calls, or look at their groups in the first."""


# ---- the mathematics


def sides(projection: Projection, m: int, n: int) -> tuple[bool, bool]:
    """Whether a gradient [m, n] is projected from the left, from the right, or both."""
    if projection == "full":
        return True, True
    right = {"std": m >= n, "reverse_std": m < n, "left": False, "right": True}[projection]
    return not right, right


def inside_shape(projection: Projection, m: int, n: int, rank: int) -> tuple[int, int]:
    """Of R, for a gradient [m, n]."""
    left, right = sides(projection, m, n)
    return rank if left else m, rank if right else n


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
        params: parameters or groups of them, for example of `lorank.optim.low_rank_groups`. The keys of a projected
            group are ``rank`` (a rank above the narrower side is that side), and, to differ from the arguments below,
            ``update_gap``, ``scale`` and ``projection``.
        inner: class of the optimizer that works inside, called with groups and `options`: any that steps without a
            closure and makes its state when it first sees a gradient (AdamW, SGD, Adafactor, RMSprop, `lorank.optim.MuonAdamW`,
            bitsandbytes' AdamW8bit, ...; not Adagrad), and of the weights' size knows nothing (LAMB does; torch's Adafactor
            too, and is given it). Settings of its own may differ from group to group as in torch.
        lr: learning rate, of the group as everywhere in torch.
        update_gap: steps between two refreshes of a basis; the first step has one.
        scale: factor of what is lifted back.
        projection: "std" projects the longer side away and keeps the moments r wide on the shorter (m >= n from the
            right), "reverse_std" the other way round, "left", "right", or "full" from both sides.
        basis: "singular", "svd", "randomised", or a function of yours; see lorank/optim/bases.py.
        stagger: refresh the bases of a k-th of the matrices at a time instead of all in one long step.
        in_backward: project each gradient when it arrives, see above.
        weight_decay: decoupled, for all groups: W ← W - lr weight_decay W after the step, not scaled.

    Raises:
        ValueError: a parameter of a projected group is not a matrix, an unknown projection or basis, a closure, or
            `in_backward` in a distributed run, where each process would project its own part of the gradient, or under
            ``torch.amp.GradScaler``.
        FloatingPointError: a gradient is not finite; nothing has been changed. With `in_backward` it is raised in the backward
            pass, when other gradients may have been projected: no weight and no moment has been changed, and the optimizer's
            ``zero_grad`` drops the rest.
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
        basis: str | Basis = "singular",
        stagger: bool = False,
        in_backward: bool = False,
        weight_decay: float = 0.0,
        **options: Any,
    ):
        defaults = {"lr": lr, "rank": None, "update_gap": update_gap, "scale": scale, "projection": projection}
        if isinstance(basis, str) and basis not in BASES:
            raise ValueError(f"basis={basis!r} is none of {', '.join(BASES)}")
        if in_backward:
            _check_alone()
        self._watched: set[nn.Parameter] = set()
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self.basis: Basis = BASES[basis] if isinstance(basis, str) else basis
        self.in_backward = in_backward
        self._inside: dict[nn.Parameter, nn.Parameter] = {}
        """What stands for a parameter in the inner optimizer: itself, or an empty one that is filled for each step."""
        admitted = [self._admit(group) for group in self.param_groups]
        takes = inspect.signature(inner).parameters
        all_takes = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        decay = {"weight_decay": 0.0} if "weight_decay" in takes or all_takes else {}
        self.inner = inner(admitted, lr=lr, **decay, **options)
        if any(self.inner.state.values()):
            raise ValueError(
                f"{type(self.inner).__name__} makes its state before it has seen a gradient, so it cannot work in a subspace"
            )
        if self.inner.defaults.get("scale_parameter"):
            raise ValueError(
                "an Adafactor with scale_parameter=True goes by the size of the weights, which it does not see in a subspace; take "
                "torch.optim.Adafactor, which is given it, or scale_parameter=False"
            )
        self._share()
        projected = [(p, group) for group in self.param_groups if group["rank"] for p in group["params"]]
        self._phase = {p: i * g["update_gap"] // len(projected) * stagger for i, (p, g) in enumerate(projected)}
        self._watch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "inner" in self.__dict__:
            with last_group_or_none(self):
                self.inner.add_param_group(self._admit(self.param_groups[-1]))
            self._share()
            self._watch()

    def _admit(self, group: dict[str, Any]) -> dict[str, Any]:
        """The inner optimizer's group for one of ours: what the user gave that is not ours is for it."""
        check_groups([group])
        check_numbers(group, "lr", "weight_decay", "scale", *(["eps"] if isinstance(group.get("eps"), float) else []))
        if group["projection"] not in ("std", "reverse_std", "left", "right", "full"):
            raise ValueError(f"projection={group['projection']!r} is none of std, reverse_std, left, right, full")
        for p in group["params"]:
            self._inside[p] = p if group["rank"] is None else nn.Parameter(local(p).new_empty(0, 0))
        own = {name: value for name, value in group.items() if name not in OURS}
        return {**own, "params": [self._inside[p] for p in group["params"]]}

    def _share(self) -> None:
        """Show the inner optimizer's settings in our groups, where schedules and users look for them."""
        for ours, its in zip(self.param_groups, self.inner.param_groups, strict=True):
            for name, value in its.items():
                ours.setdefault(name, value)
        for name, value in self.inner.defaults.items():
            self.defaults.setdefault(name, value)

    def _watch(self) -> None:
        """With `in_backward`: be told of gradients as they arrive, for as long as this optimizer lives."""
        me = weakref.ref(self)

        def arrive(p: nn.Parameter) -> None:
            optimizer = me()
            if optimizer is not None and p.grad is not None:
                optimizer._arrive(p)

        for p, inside in self._inside.items() if self.in_backward else ():
            if inside is not p and p.requires_grad and p not in self._watched:
                self._watched.add(p)
                p.register_post_accumulate_grad_hook(arrive)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in copied(self).items() if name != "_watched"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watched = set()
        if "in_backward" in state:
            self._watch()

    @staticmethod
    def state_bytes(
        m: int,
        n: int,
        rank: int,
        itemsize: int,
        *,
        moments: Callable[[Sequence[int], int], int] = adamw_bytes,
        projection: Projection = "std",
        **_: Any,
    ) -> int:
        """Bytes kept for a matrix [m, n] of `itemsize` bytes per number, `moments` of them by the inner optimizer on R."""
        left, right = sides(projection, m, n)
        return moments(inside_shape(projection, m, n, rank), itemsize) + rank * (m * left + n * right) * itemsize

    @staticmethod
    def step_flops(
        m: int,
        n: int,
        rank: int,
        *,
        inside: Callable[[Sequence[int]], int] = lambda shape: 0,
        micro_batches: int = 1,
        in_backward: bool = False,
        projection: Projection = "std",
        basis: str | Basis = "singular",
        update_gap: int = 200,
        **_: Any,
    ) -> float:
        """FLOPs of matrix products in a step on a matrix [m, n], a refresh spread over `update_gap` steps: into the subspace 2 m n r
        (with `in_backward` for each micro-batch), `inside` on R, and back as much.

        What finds a basis is in `basis_flops`, decompositions left out, and a function of yours too.

        >>> Subspace.step_flops(10, 20, 3, basis="svd")
        2400.0
        """
        left, right = sides(projection, m, n)
        across = 2 * rank * rank * n if projection == "full" else 0  # from [r, n] to R
        again = 2 * m * rank * rank if projection == "full" else 0  # from D to [m, r]
        into, out = 2 * m * n * rank + across, 2 * m * n * rank + again
        found = 0
        if isinstance(basis, str):
            found = left * basis_flops(basis, m, n, rank) + right * basis_flops(basis, n, m, rank)
        times = micro_batches if in_backward else 1
        return into * times + inside(inside_shape(projection, m, n, rank)) + out + found / update_gap

    @staticmethod
    def kept_gradient(
        m: int, n: int, rank: int, *, in_backward: bool = False, projection: Projection = "std", **_: Any
    ) -> tuple[int, int]:
        """Shape of what waits for the step of a gradient [m, n] that backward has finished."""
        return inside_shape(projection, m, n, rank) if in_backward else (m, n)

    def seen_parameters(self) -> list[nn.Parameter]:
        """Parameters whose ``.grad`` is what the optimizer sees; with `in_backward`, give these to ``clip_grad_norm_``."""
        return [self._inside[p] if self.in_backward else p for p in self._parameters()]

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for p, inside in self._inside.items():
            if inside is not p:
                inside.grad = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Has ``torch.amp.GradScaler`` come to `step` with its gradients scaled, where `in_backward` is refused."""
        return self.in_backward

    @torch.compiler.disable  # parameters of the inner optimizer change their shape; compile `inner.step` where that helps
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError(f"{type(self).__name__} evaluates no closure; call backward() before step()")
        if self.in_backward and hasattr(self, "found_inf"):
            raise ValueError(
                "in_backward=True projects gradients that GradScaler has scaled, and cannot scale them back; "
                "train in bfloat16, which needs no scaler, or leave it out"
            )
        check_as_many(self.param_groups, self.inner.param_groups)
        if self.in_backward:
            _check_alone()  # the processes may have come together since
            self._forget_orphans(self._parameters())
            for p in self._parameters():
                if self._inside[p] is not p and p.grad is not None:
                    self._arrive(p)  # no backward pass brought it, or none while the parameter was trained
            self._watch()
        seen = dict(zip(self._parameters(), self.seen_parameters(), strict=True))
        moved = [p for p, sees in seen.items() if sees.grad is not None]
        check_finite({p: seen[p].grad for p in moved})
        self._check_sharded(moved)
        found = stacks(self.param_groups, self.state, moved)
        if not self.in_backward:
            for p, inside in self._inside.items():
                if inside is not p:
                    inside.grad = None  # what a step left that failed half-way
            for stack in found:
                self._refresh(stack)
        for p, inside in self._inside.items():
            if "inner" not in self.state.get(p, ()):
                self.inner.state.pop(inside, None)  # somebody has cleared the state
        for ours, its in zip(self.param_groups, self.inner.param_groups, strict=True):
            its.update({name: ours[name] for name in its if name not in OURS and name in ours})
            if self.unit_lr and ours["rank"]:
                its["lr"] = 1.0
        plain = [p for p in moved if self._inside[p] is p]
        own_step = "step" in self.inner.__dict__  # such as a compiled one, which wants equal calls
        if type(self.inner).__module__.startswith(BY_STACK) and not own_step:
            self._move([], plain)
            for stack in found:
                self._move([stack], [])
        else:
            self._move(found, plain)
        for ours, its in zip(self.param_groups, self.inner.param_groups, strict=True):
            its["params"] = [self._inside[p] for p in ours["params"]]
        have_moved = set(moved)
        for group in self.param_groups:
            decayed: list[Tensor] = [p for p in group["params"] if p in have_moved]
            if group["weight_decay"] and decayed:
                torch._foreach_mul_(decayed, 1 - group["lr"] * group["weight_decay"])
        return None

    def _move(self, found: list[Stack], plain: list[nn.Parameter]) -> None:
        """Into the subspace, the inner optimizer's step, and back."""
        for stack in found:
            if not self.in_backward:
                self._enter(stack)
            for p in stack.parameters:
                self._inside[p].data = torch.zeros_like(self._inside[p].grad)  # type: ignore[arg-type]
        stepped = {p for stack in found for p in stack.parameters}.union(plain)
        for ours, its in zip(self.param_groups, self.inner.param_groups, strict=True):
            its["params"] = [self._inside[p] for p in ours["params"] if p in stepped]
        self.step_inside()
        for p in stepped:
            if self._inside[p] in self.inner.state:
                self.state[p]["inner"] = self.inner.state[self._inside[p]]
        for stack in found:
            for state in stack.states:
                state["steps"] += 1
            self.leave(stack, stacked([self._change(p, stack.group) for p in stack.parameters]), *_bases(stack))
            for p in stack.parameters:
                self._inside[p].data, self._inside[p].grad = local(p).new_empty(0, 0), None

    def _check_sharded(self, moved: Sequence[nn.Parameter]) -> None:
        """Adafactor's step goes by norms of whole parameters, which torch takes of a process's part alone; bitsandbytes' kernels
        do not know parts."""
        plain = {p for group in self.param_groups if group["rank"] is None for p in group["params"]}
        whole_only = isinstance(self.inner, torch.optim.Adafactor) or type(self.inner).__module__.startswith(
            "bitsandbytes"
        )
        if whole_only and any(isinstance(p, DTensor) and p in plain for p in moved):
            raise ValueError(
                f"{type(self.inner).__name__} needs whole parameters and sees a part of those without rank, which are sharded "
                "(FSDP2); take another inner optimizer, or DDP"
            )

    unit_lr = False
    """Whether the inner optimizer takes projected groups at a learning rate of 1, which `leave` puts right."""

    def step_inside(self) -> None:
        """The inner optimizer's step."""
        self.inner.step()

    def _change(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """What the inner optimizer made of its zeros; Adafactor takes the size of weights into account, and gets it here."""
        change = self._inside[p].data
        if isinstance(self.inner, torch.optim.Adafactor):
            least = group["eps"][1]
            size = whole(p.detach()).square().mean().sqrt()
            change = change * (size / least).clamp(min=1)
        return change

    def leave(self, stack: Stack, inside: Tensor, left: Tensor | None, right: Tensor | None) -> None:
        """Add to the weights [k, m, n] what belongs to the inner optimizer's step `inside`."""
        if right is not None:
            stack.add_product(inside if left is None else left @ inside, right, stack.group["scale"])
        elif left is not None:
            stack.add_product(left, inside, stack.group["scale"])

    def projected(self, stack: Stack) -> Tensor:
        """R [k, ...] of a stack, from the beginning of a step to its end."""
        return stacked([self._inside[p].grad for p in stack.parameters])  # type: ignore[misc]

    @torch.no_grad()
    def _arrive(self, p: nn.Parameter) -> None:
        """Project a gradient that backward has just finished, and free it."""
        group = next((group for group in self.param_groups if any(q is p for q in group["params"])), None)
        if group is None:
            return  # somebody has taken it out
        self._forget_orphans([p])
        check_finite({p: p.grad})
        [stack] = stacks([{**group, "params": [p]}], self.state, [p])
        self._refresh(stack)
        self._enter(stack)
        p.grad = None

    def _forget_orphans(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop gradients that were projected on a basis which is no more, as the state has been cleared or loaded since."""
        for p in parameters:
            if self._inside[p] is not p and not _has_basis(self.state.get(p, {})):
                self._inside[p].grad = None

    def _refresh(self, stack: Stack) -> None:
        """Find the bases that are due, unless this update has begun."""
        group, steps = stack.group, int(stack.states[0]["steps"])
        due = [
            i
            for i, (p, state) in enumerate(zip(stack.parameters, stack.states, strict=True))
            if not _has_basis(state) or (steps + self._phase.get(p, 0)) % group["update_gap"] == 0
        ]
        if not due or self._inside[stack.parameters[0]].grad is not None:
            return
        G = Stack([stack.parameters[i] for i in due], group, [stack.states[i] for i in due]).gradients()
        wide, rank = G.to(torch.promote_types(G.dtype, torch.float32)), min(group["rank"], *G.shape[1:])
        for side, asked in zip(("left", "right"), sides(group["projection"], *G.shape[1:]), strict=True):
            if asked:
                found = self.basis(wide, rank) if side == "left" else self.basis(wide.mT, rank).mT
                for i, basis in zip(due, found.to(G.dtype), strict=True):
                    stack.states[i][side] = basis.contiguous()

    def _enter(self, stack: Stack) -> None:
        """Project gradients [k, m, n] and add them to the `.grad` of what stands for their parameters."""
        for p, R in zip(stack.parameters, project(stack.gradients(), *_bases(stack)), strict=True):
            inside = self._inside[p]
            if inside.grad is None:
                inside.data, inside.grad = torch.empty_like(R), R
            else:
                inside.grad += R

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        self.inner.state.clear()
        for p, inside in self._inside.items():
            if inside is not p:
                inside.grad = None
            if "inner" in self.state.get(p, {}):
                self.inner.state[inside] = self.state[p]["inner"]


def _check_alone() -> None:
    if processes() > 1:
        raise ValueError("in_backward=True sees the gradient of one process only; leave it out in distributed runs")


def _has_basis(state: Mapping[str, Any]) -> bool:
    return "left" in state or "right" in state


def _bases(stack: Stack) -> tuple[Tensor | None, Tensor | None]:
    left, right = (stack.get(side) if side in stack.states[0] else None for side in ("left", "right"))
    return left, right
