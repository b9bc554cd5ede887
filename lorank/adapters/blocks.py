"""Adapters that are chosen or mixed by something outside the model's input: a task, a picture's quality, a user.

    y = W x + s Σ_i g_i B_i A_i x (+ b)     g [N], or [batch, N] with a row for each sample; block i has r_i ranks

`lorank.set_context` says what g follows; it holds until it is called again. A block that is computed a second time for the backward pass
(activation checkpointing) follows what its first run did, so losses of several contexts may be summed; then compile the whole model, if
at all, and not parts of checkpointed blocks. Where g is the same for all samples, a layer merges.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorank.adapters.gated import Adapter, GatedAdapter, blockwise
from lorank.checkpointing import first_run

KEPT = 64
"""Contexts whose losses one backward pass may have under activation checkpointing."""


class Context:
    """What `lorank.set_context` was given, one for all layers of a model."""

    def __init__(self) -> None:
        self.now: Tensor | None = None
        self.since: deque[tuple[int, Tensor | None]] = deque([(0, None)], maxlen=KEPT)
        """Contexts, and autograd's number of the first operation that could follow each; autograd counts upwards."""

    @property
    def value(self) -> Tensor | None:
        """The last one that was set; in the second run of a checkpointed block, that of its first run.

        Raises:
            RuntimeError: the first run was more than `KEPT` contexts ago.
        """
        if (number := first_run()) is None:
            return self.now
        for since, value in reversed(self.since):
            if since <= number:
                return value
        raise RuntimeError(
            f"with activation checkpointing a backward pass must follow at most {KEPT} calls of lorank.set_context, got more; call "
            "backward more often"
        )

    @value.setter
    def value(self, value: Tensor | None) -> None:
        self.now, number = value, torch._C._autograd._get_sequence_nr()  # type: ignore[attr-defined]
        if self.since[-1][0] == number:  # no operation has followed the one before
            self.since.pop()
        self.since.append((number, value))


class BlockAdapter(GatedAdapter):
    """Factors of several adapters on top of each other. A subclass overrides `mixture`."""

    def __init__(self, dense: nn.Linear, ranks: Sequence[int], *, scale: float, dropout: float = 0.0):
        super().__init__(dense, sum(ranks), scale=scale, dropout=dropout)
        self.ranks, self.context = list(ranks), Context()

    def mixture(self) -> Tensor:
        """g [N] or [batch, N], from `self.context.value`, which is None before `lorank.set_context`."""
        raise NotImplementedError

    def static_gate(self) -> Tensor:
        if (g := self.mixture()).ndim > 1:
            raise ValueError("the context must be one for all samples here, got one for each; call lorank.set_context")
        return blockwise(g, self.ranks).to(self.A.weight.device)

    def gate(self, x: Tensor, z: Tensor) -> Tensor:
        g = blockwise(self.mixture().to(z.device), self.ranks)
        return g if g.ndim == 1 else by_sample(g, z)

    def block(self, i: int) -> slice:
        """The ranks of block i."""
        return slice(sum(self.ranks[:i]), sum(self.ranks[: i + 1]))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.ranks}"


def by_sample(g: Tensor, z: Tensor) -> Tensor:
    """g [batch, r] for z [batch · windows, ..., r], whose first axis may hold several windows of each sample, one after another."""
    times, left = divmod(len(z), len(g))
    if left or z.ndim < 2:
        raise ValueError(f"the context must have a row for each sample, got {len(g)} rows for a batch of {len(z)}")
    return g.repeat_interleave(times, dim=0, output_size=len(z)).view(len(z), *[1] * (z.ndim - 2), z.shape[-1])


class Contextual(Adapter):
    """Base of the methods whose layers are `BlockAdapter`s."""

    def context(self, value: Any) -> Tensor:
        """What layers are given, from what the user says.

        Raises:
            ValueError: it does not fit the method.
        """
        raise NotImplementedError

    def finish(self, model: nn.Module) -> None:
        super().finish(model)
        context = Context()
        for layer in self.layers(model).values():
            layer.context = context  # type: ignore[assignment]
