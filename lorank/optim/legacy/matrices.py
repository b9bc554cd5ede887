"""What optimizers of matrices share: groups with a `rank`, and stacks of equal shape, so that one product serves all."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lorank.optim.adamw import check_betas

STACKED = {"cpu": 1 << 18}
"""Numbers in one stack, at most: a CPU is busy with one large product, which a copy into a stack would only delay."""


def processes() -> int:
    """Of a distributed run; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- parameters that are sharded (FSDP2): each process gathers the gradient, computes the same, and keeps its part


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(values: Tensor, of: Tensor) -> Tensor:
    """The part of `values`, the same in all processes, that lies where this process's part of `of` does."""
    if not isinstance(of, DTensor):
        return values
    return distribute_tensor(values, of.device_mesh, of.placements, src_data_rank=None).to_local()


LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "momentum", "momentum_buffer", "left", "right", "error")
"""Entries of a state that have the parameters' type."""


class Stack(NamedTuple):
    """Parameters of one group that have equal shapes and took equally many steps."""

    parameters: list[nn.Parameter]
    group: dict[str, Any]
    states: list[dict[str, Any]]

    def gradients(self) -> Tensor:
        """[k, m, n]."""
        return stacked([whole(p.grad) for p in self.parameters])  # type: ignore[arg-type]

    def get(self, name: str) -> Tensor:
        """An entry of all states [k, ...]."""
        return stacked([state[name] for state in self.states])

    def put(self, name: str, values: Tensor) -> None:
        for state, value in zip(self.states, values, strict=True):
            state[name] = value.clone()

    def add(self, moves: Tensor) -> None:
        """W ← W + moves [k, m, n]."""
        for p, move in zip(self.parameters, moves.to(self.parameters[0].dtype), strict=True):
            local(p).add_(_part(move, p))

    def add_product(self, a: Tensor, b: Tensor, scale: float) -> None:
        """W ← W + scale a b for a [k, m, r] and b [k, r, n], without a matrix m x n in between."""
        for p, left, right in zip(self.parameters, a, b, strict=True):
            if isinstance(p, DTensor):
                local(p).add_(_part(left @ right, p), alpha=scale)
            else:
                p.addmm_(left, right, alpha=scale)


def stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def adamw_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Of Adam's two moments."""
    return 2 * math.prod(shape) * itemsize


def check_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError if a group with a rank has a parameter that is no matrix, or a rank or a gap that is no positive integer."""
    for group in groups:
        for name in ("rank", "update_gap"):
            value = group.get(name)
            given = name in group and (name, value) != ("rank", None)
            if given and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} is no positive integer")
        if group["rank"] is None:
            continue
        for p in group["params"]:
            if p.ndim != 2:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} is no matrix; put it in a group without rank")


def check_numbers(group: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError if one of these settings is no finite number, or negative, or if betas are not in [0, 1)."""
    for name in names:
        value = group[name]
        if not isinstance(value, int | float | Tensor) or not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} is negative or no finite number; give one >= 0")
    check_betas(group.get("betas", ()))


@contextlib.contextmanager
def last_group_or_none(optimizer: Optimizer) -> Iterator[None]:
    """Inside, a ValueError takes the group that was added last out again."""
    try:
        yield
    except ValueError:
        optimizer.param_groups.pop()
        raise


def check_as_many(ours: Sequence[Any], its: Sequence[Any]) -> None:
    """Raises ValueError if an inner optimizer has other groups than its outer one."""
    if len(ours) != len(its):
        raise ValueError("groups have been taken out of param_groups; empty their params instead")


@torch.compiler.disable
def check_finite(gradients: Mapping[nn.Parameter, Tensor | None]) -> None:
    """Look at gradients before anything is done with them.

    Raises:
        FloatingPointError: one is not finite, or, as far as its sum shows, so large that a projection may not be; in all
            processes of a sharded run, whoever's part it is.
        ValueError: one is sparse.
    """
    watched = {p: local(G) for p, G in gradients.items() if G is not None}
    if any(G.is_sparse for G in watched.values()):
        raise ValueError("a gradient is sparse, which no low-rank optimizer takes; use nn.Embedding(sparse=False)")
    if not watched:
        return
    sums = torch.stack([_look(G) for G in watched.values()])
    if any(isinstance(p, DTensor) for p in watched):
        dist.all_reduce(sums)
    if sums.isfinite().all():
        return
    odd = torch.stack([_is_odd(G) for G in watched.values()]).float()  # large numbers may have a sum that is none
    if any(isinstance(p, DTensor) for p in watched):
        dist.all_reduce(odd)
    if odd.any():
        p = next(p for p, is_odd in zip(watched, odd, strict=True) if is_odd)
        raise FloatingPointError(
            f"the gradient of a parameter of shape {tuple(p.shape)} is not finite; lower lr or clip gradients"
        )


def _look(G: Tensor) -> Tensor:
    """A cheap number that is not finite if one of G is not; in half precision, which ends at 65,504, nor if the norm is beyond."""
    if G.dtype != torch.float16:
        return G.sum(dtype=torch.float32)
    room = torch.finfo(torch.float32).max / torch.finfo(torch.float16).max
    return torch.linalg.vector_norm(G, dtype=torch.float32) * room


def _is_odd(G: Tensor) -> Tensor:
    """Whether a number is not finite, or the norm of a row or column of a matrix, which is the most that a projection may hold."""
    if not G.numel():  # a process's part of a sharded one
        return G.new_zeros((), dtype=torch.bool)
    wide = G.to(torch.promote_types(G.dtype, torch.float32))
    largest = wide.abs().max().clamp(min=1)
    scaled = wide / largest
    longest = torch.stack([scaled.norm(dim=dim).max() for dim in (0, 1)] if G.ndim == 2 else [scaled.abs().max()]).max()
    return ~(largest * longest <= torch.finfo(G.dtype).max)


@torch.compiler.disable
def stacks(
    groups: Iterable[dict[str, Any]], state: Mapping[Any, dict[str, Any]], moved: Iterable[nn.Parameter]
) -> list[Stack]:
    """The matrices of groups with a rank that are among `moved`; their states count `steps`."""
    wanted = set(moved)
    return [stack for group in groups if group["rank"] is not None for stack in _alike(group, state, wanted)]


def _alike(group: dict[str, Any], state: Mapping[Any, dict[str, Any]], wanted: set[nn.Parameter]) -> Iterator[Stack]:
    alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for p in group["params"]:
        if p in wanted and p.numel():
            steps = int(state[p].setdefault("steps", torch.tensor(0)))
            alike.setdefault((p.shape, p.dtype, p.device, steps), []).append(p)
    for (shape, _, device, _), parameters in alike.items():
        most = max(1, STACKED.get(device.type, 1 << 26) // shape.numel())
        for start in range(0, len(parameters), most):
            some = parameters[start : start + most]
            yield Stack(some, group, [state[p] for p in some])


def load(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """``Optimizer.load_state_dict``, after which state has the types it was saved with: torch casts all of it to the parameters'
    type, in which indices and counters may not be exact. Moments and bases stay in the parameters' type.

    Raises:
        ValueError: the state is another optimizer's, or of other ranks; nothing has been changed.
    """
    before, seen = (optimizer.param_groups, optimizer.state), dict[str, Any]()
    last = optimizer.register_load_state_dict_pre_hook(lambda _, given: seen.update(given))  # what others made of it
    try:
        Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        last.remove()
    for index, (ours, saved) in enumerate(zip(before[0], optimizer.param_groups, strict=True)):
        missing = sorted(name for name in optimizer.defaults if name in ours and name not in saved)
        if missing or ours["rank"] != saved["rank"]:
            optimizer.param_groups, optimizer.state = before
            what = (
                f"has no {missing[0]!r}" if missing else f"has rank {saved['rank']} where this one has {ours['rank']}"
            )
            raise ValueError(
                f"group {index} of the saved state {what}: it is not of this {type(optimizer).__name__}; make the optimizer as "
                "it was made for the state"
            )
    ids = [index for group in seen["param_groups"] for index in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in zip(ids, parameters, strict=True):
        if index in seen["state"]:
            optimizer.state[p] = _copied(seen["state"][index], optimizer.state[p])


def _copied(saved: Any, loaded: Any) -> Any:
    if isinstance(saved, Tensor):
        return saved.detach().clone().to(loaded.device)
    if not isinstance(saved, dict):
        return saved
    return {k: loaded[k] if k in LIKE_PARAMETERS else _copied(v, loaded[k]) for k, v in saved.items()}


def copied(optimizer: Optimizer) -> dict[str, Any]:
    """What a copy of an optimizer has: neither hooks nor a `step` of its own, which a scheduler sets and which is the original's."""
    return {name: value for name, value in optimizer.__dict__.items() if "hooks" not in name and name != "step"}


class MatrixOptimizer(Optimizer):
    """Groups with a `rank` are stepped as stacks of matrices, the others by ``torch.optim.AdamW``.

    Raises:
        ValueError: as `check_groups`; or a closure.
        FloatingPointError: as `check_finite`; nothing has been changed.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self._adamw: torch.optim.AdamW | None = None
        super().__init__(params, {"rank": None, **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Of AdamW's groups, those without rank, learning rate, betas and the like are read at each step."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        with last_group_or_none(self):
            check_groups([group])
            check_numbers(group, *({"lr", "weight_decay", "eps", "momentum"} & group.keys()))
            for name in ("maximize", "amsgrad"):
                if group.get(name):
                    raise ValueError(f"{type(self).__name__} has no {name}; leave it out of the group")
        if group["rank"] is None:
            plain = {"params": group["params"]}
            if self._adamw is None:
                self._adamw = torch.optim.AdamW([plain])
            else:
                self._adamw.add_param_group(plain)

    def __getstate__(self) -> dict[str, Any]:
        return copied(self)

    def step_stack(self, stack: Stack, G: Tensor) -> Tensor:
        """The move of a stack [k, long, short] by its gradients, which lie with their short side on the right."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError(f"{type(self).__name__} evaluates no closure; call backward() before step()")
        plain = [group for group in self.param_groups if group["rank"] is None]
        check_as_many(plain, self._adamw.param_groups if self._adamw is not None else ())
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        check_finite({p: p.grad for p in moved})
        for stack in stacks(self.param_groups, self.state, moved):
            G = stack.gradients()
            tall = G.shape[-2] >= G.shape[-1]
            move = self.step_stack(stack, G if tall else G.mT)
            torch._foreach_mul_(list[Tensor](stack.parameters), 1 - stack.group["lr"] * stack.group["weight_decay"])
            stack.add(move if tall else move.mT)
            for state in stack.states:
                state["steps"] += 1
        if self._adamw is not None:
            for ours, its in zip(plain, self._adamw.param_groups, strict=True):
                its.update({name: ours[name] for name in ("params", "lr", "betas", "eps", "weight_decay")})
                for p in its["params"]:
                    if p not in self.state:
                        self._adamw.state.pop(p, None)  # somebody has cleared the state
            self._adamw.step()
            self.state.update(
                {p: self._adamw.state[p] for group in plain for p in group["params"] if p in self._adamw.state}
            )
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        if self._adamw is not None:
            self._adamw.state.clear()
            plain = [p for group in self.param_groups if group["rank"] is None for p in group["params"]]
            self._adamw.state.update({p: self.state[p] for p in plain if p in self.state})
