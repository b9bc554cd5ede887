"""What happens between two optimizer steps, in any training loop."""

import warnings
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorank.rounding import Rests

_expected: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
"""Models whose method acts between steps, and its name."""


def expect_hook(model: nn.Module, method: str) -> None:
    """Let an optimizer warn at its first step if it moves a model whose method acts between steps, and has no hook for that."""
    _expected[model] = method


def _warn_without_hook(optimizer: Optimizer, *_: Any) -> None:
    if hasattr(optimizer, "lorank_hook"):
        return
    optimizer.lorank_hook = None  # type: ignore[attr-defined]  # asked once
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for method in {name for model, name in _expected.items() if not moved.isdisjoint(map(id, model.parameters()))}:
        warnings.warn(
            f"{method} acts between steps, but this optimizer has no hook for it; call lorank.step_hook(model, optimizer, steps=...) before "
            "the first step",
            stacklevel=2,
        )


register_optimizer_step_pre_hook(_warn_without_hook)  # of all optimizers


class StepHook:
    """Something that happens between optimizer steps. It uses the optimizer's own hooks, so it works in any training loop.

    A subclass overrides `before_step` (gradients are final, clipped and accumulated) or `after_step`. Tensors of the
    model change only in place; what must survive a restart and is in neither the model nor the optimizer's state
    belongs in `state_dict`.

    Args:
        edits: modules whose parameters the subclass changes; they must be whole in each process.

    Raises:
        ValueError: the optimizer has a hook already, both of which would act; or before a step, parameters of `edits` are sharded.
    """

    owner: str | None = None
    """The method whose hook it is, as `lorank.step_hook` says."""

    def __init__(self, optimizer: Optimizer, edits: Iterable[nn.Module] = ()):
        if getattr(optimizer, "lorank_hook", None) is not None:
            raise ValueError("optimizer must have one hook, but it has one already; use that or make another optimizer")
        optimizer.lorank_hook = self  # type: ignore[attr-defined]
        self.optimizer, self.edits = optimizer, list(edits)
        self.step = 0
        """Optimizer steps done: 0 in the first call of `before_step`, 1 in the first of `after_step`."""
        self.rests = Rests()
        """What rounding took from 16-bit weights that the subclass edits in place; saved with the hook."""
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def before_step(self) -> None:
        """Called before each optimizer step."""

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def next_task(self) -> None:
        """Called where a new task begins (`lorank.next_task`): `step` counts from 0 again."""
        self.step = 0

    def aside(self) -> Mapping[str, AbstractContextManager[None]]:
        """Other models that this one contains, such as that at which a run will end: by name, a context in which it computes
        the same. Evaluations during training report them too."""
        return {}

    def check_whole(self) -> None:
        """Raises ValueError if parameters of `edits` are sharded."""
        if any(isinstance(p, DTensor) for module in self.edits for p in module.parameters()):
            raise ValueError(
                f"{self.owner or type(self).__name__} changes whole weights between steps, but they are sharded (FSDP2 or tensor parallelism); use DDP or one "
                "device"
            )

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A closure makes the gradients inside the step, so what comes before the step follows its first call."""
        self.check_whole()  # they may have been sharded since the hook was made
        given = (*args[1:], kwargs.get("closure"))[0]  # args[0] is the optimizer
        if given is None:
            return self.before_step()
        waiting = [self.before_step]

        def closure() -> Any:
            loss = given()
            if waiting:
                waiting.pop()()
            return loss

        return (args[0], closure), {name: value for name, value in kwargs.items() if name != "closure"}

    def _after_step(self, *_: Any) -> None:
        self.step += 1
        self.after_step()

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on exactly as this one; tensors only."""
        return {"step": torch.tensor(self.step), **self.rests.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where `state_dict` was taken; model and optimizer are loaded already."""
        self.step = int(state["step"])
        self.rests.load_state_dict(state)
