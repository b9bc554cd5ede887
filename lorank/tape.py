"""Outputs that a layer passes to the layer of the same projection in the next block, in addition to the hidden states.

Model code passes hidden states only. A method whose layers read the outputs of their neighbours uses a `Tape` per stack:
each depth leaves its output there, and the next one removes it. Outside a forward pass a tape is empty. It is not in the
state_dict, and a copy of it (deepcopy, pickle) is a new one.

A block under activation checkpointing runs a second time in the backward pass, without its neighbour running before it.
`Rerun` belongs to one call of a block. It keeps the results that the checkpoint policy keeps and the outputs read from tapes
or, if these were dropped, the way to compute them backwards from the block's own output (`keep_recurrence`). Each call has
another `Rerun`, so several forward passes may wait for their backward passes.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, SelectiveCheckpointContext

from lorank.method import Site

ANCHORS = 8
"""If outputs are dropped and rebuilt, every eighth is stored."""
GROWTH = {torch.bfloat16: 4.0, torch.float16: 4.0}
"""How much rebuilding may magnify a rounding error of these types; `WIDE_GROWTH` is for wider ones. An output is stored before
the error would grow more."""
WIDE_GROWTH = 128.0


class Slot:
    """An output for blocks that run again, without its graph; None if it was dropped and is not rebuilt yet."""

    value: Tensor | None = None


class Tape:
    """The outputs of one projection on their way from depth to depth, counted from 0 within the stack.

    Args:
        role: role of the projection, for messages.
        depths: number of layers.
        dense_start: whether the first layer is dense, without a bottleneck that could be kept.
    """

    def __init__(self, role: str, depths: int, dense_start: bool = True):
        self.role = role
        self.depths = depths
        self.dense_start = dense_start
        self.waiting: dict[int, tuple[Tensor, Slot]] = {}
        self.growth = 1.0
        """How much an error of the next output would grow until the first dropped output is rebuilt from it."""

    def __reduce__(self) -> Any:
        return Tape, (self.role, self.depths, self.dense_start)

    def is_anchor(self, depth: int) -> bool:
        """Whether the output is stored even under `keep_recurrence`: every eighth one, with the last and without the first."""
        return depth > 0 and (self.depths - 1 - depth) % ANCHORS == 0

    def may_drop(self, depth: int, dtype: torch.dtype, slope: Callable[[], float]) -> bool:
        """Whether the output of `depth` may be dropped and rebuilt from the next, in which it has the factor `slope`."""
        if not self.is_anchor(depth):
            self.growth = max(1.0, self.growth) / max(slope(), 1e-30)
            if self.growth <= GROWTH.get(dtype, WIDE_GROWTH):
                return True
        self.growth = 1.0
        return False

    def put(self, depth: int, y: Tensor) -> None:
        """Leave the output of `depth` for the next one."""
        rerun = _running[-1] if _running else None
        if rerun is not None and rerun.again:
            return
        slot = Slot()
        if rerun is not None:
            rerun.own[self, depth] = slot
        if depth == 0:
            self.waiting.clear()  # left by an interrupted forward pass
            self.growth = 1.0
        if depth + 1 < self.depths:
            self.waiting[depth] = y, slot
        elif rerun is not None and rerun.rebuilds and self.is_anchor(depth):
            slot.value = y.detach()

    def take(
        self,
        depth: int,
        shape: torch.Size,
        invert: Callable[[Tensor], Tensor] | None = None,
        slope: Callable[[], float] = float,
    ) -> Tensor:
        """The output of this shape that the depth before `depth` left. `invert` computes it from the output of `depth`, which
        changes by `slope` if it changes by 1; without it the output is never dropped.

        Raises:
            RuntimeError: there is none, because blocks run twice, are skipped or out of order, or run again under an
                activation checkpointing without support for tapes; or it is for other tokens.
        """
        rerun = _running[-1] if _running else None
        if rerun is not None and rerun.again:
            return rerun.taken_again(self, depth, invert)
        if depth - 1 not in self.waiting:
            raise RuntimeError(
                f"{self.role}: depth {depth} finds no output of depth {depth - 1}; blocks must run in order, once each, and "
                "activation checkpointing must be turned on by lorank.checkpoint"
            )
        y, slot = self.waiting.pop(depth - 1)
        if y.shape != shape:
            raise RuntimeError(
                f"{self.role}: depth {depth - 1} left an output {[*y.shape]} for depth {depth}, which needs {[*shape]}; all blocks "
                "must see the same tokens"
            )
        rebuilds = rerun is not None and rerun.rebuilds and invert is not None
        drop = rebuilds and self.may_drop(depth - 1, y.dtype, slope)
        slot.value = None if drop else y.detach()
        if rerun is not None:
            rerun.previous[self, depth] = Previous(slot, y.dtype, y.requires_grad)
        return y


class Previous(NamedTuple):
    """An output that a layer read from its tape."""

    slot: Slot
    dtype: torch.dtype
    requires_grad: bool


class Rerun:
    """One call of a checkpointed block, to be repeated in the backward pass.

    Args:
        rebuilds: drop the outputs that layers read from tapes, except anchors, and compute them backwards.
    """

    def __init__(self, rebuilds: bool):
        self.rebuilds = rebuilds
        self.again = False
        self.aside = False
        """Whether the second run computes something that the first did not."""
        self.kept: dict[tuple[Any, int], Any] = {}
        """Results by operation and the number of its call."""
        self.own: dict[tuple[Tape, int], Slot] = {}
        self.previous: dict[tuple[Tape, int], Previous] = {}

    def taken_again(self, tape: Tape, depth: int, invert: Callable[[Tensor], Tensor] | None) -> Tensor:
        """The result of `Tape.take` in the first run, up to rounding if it has been dropped."""
        slot, dtype, requires_grad = self.previous[tape, depth]
        output = self.own[tape, depth].value
        if slot.value is None and output is None:
            raise RuntimeError(
                f"{tape.role}: depth {depth} cannot be rebuilt before depth {depth + 1}; for a loss that does not come from the "
                "last block use another checkpoint policy than keep_recurrence, for example keep_bottlenecks"
            )
        self.aside = True
        with torch.no_grad():
            if slot.value is None:
                assert output is not None
                assert invert is not None
                slot.value = invert(output)
            y = slot.value.detach().to(dtype)
        self.aside = False
        return y.requires_grad_(requires_grad)


_running: list[Rerun] = []
"""The checkpointed calls that are running, the innermost last."""


class _Run(TorchDispatchMode):
    """One of the two runs of a block; it sees every operation."""

    again: ClassVar[bool]

    def __init__(self, rerun: Rerun):
        super().__init__()
        self.rerun = rerun
        self.calls: Counter[Any] = Counter()

    def __enter__(self) -> Any:
        self.rerun.again = self.again
        self.calls.clear()
        _running.append(self.rerun)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _running.pop()
        super().__exit__(*exception)

    def call(self, func: Any) -> tuple[Any, int]:
        """A name for this call of an operation, the same in both runs."""
        self.calls[func] += 1
        return func, self.calls[func]


class _First(_Run):
    again = False

    def __init__(self, rerun: Rerun, policy: Callable[..., CheckpointPolicy | bool]):
        super().__init__(rerun)
        self.policy = policy

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        dense = not self.rerun.previous and all(tape.dense_start for tape, _ in self.rerun.own)
        if self.rerun.rebuilds and dense:  # a first block without bottlenecks
            self.rerun.kept.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in SAC_IGNORED_OPS:
            return out
        call = self.call(func)
        context = SelectiveCheckpointContext(is_recompute=False, op_output=out)
        if self.policy(context, func, *args, **kwargs) in _KEPT:
            self.rerun.kept[call] = tree_map_only(Tensor, Tensor.detach, out)
        return out


class _Again(_Run):
    again = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        passes = self.rerun.aside or func in SAC_IGNORED_OPS
        if not passes and (call := self.call(func)) in self.rerun.kept:
            return tree_map_only(Tensor, Tensor.detach, self.rerun.kept[call])
        return func(*args, **(kwargs or {}))


_KEPT = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE, True)


def contexts(policy: Callable[..., CheckpointPolicy | bool], rebuilds: bool) -> tuple[_First, _Again]:
    """The two contexts of a checkpointed call (`context_fn` of ``torch.utils.checkpoint``) in a model with tapes.

    They do the same as torch's selective contexts, which do not allow operations that are not in the first run, such as those
    that rebuild outputs.
    """
    rerun = Rerun(rebuilds)
    return _First(rerun, policy), _Again(rerun)


def check_neighbours(stack: Sequence[Site], who: str) -> None:
    """Raises ValueError unless the sites of a projection are in neighbouring blocks."""
    for one, other in itertools.pairwise(stack):
        if other.depth != one.depth + 1:
            raise ValueError(
                f"{who} chains {one.role} from block to block, but depth {other.depth} was chosen without depth "
                f"{other.depth - 1}; choose neighbouring blocks or exclude {one.role}"
            )
