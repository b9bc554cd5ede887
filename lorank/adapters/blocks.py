"""Adapters that are chosen or mixed by something outside the model's input: a task, a picture's quality, a user.

    y = W x + s Σ_i g_i B_i A_i x (+ b)     g [N], or [batch, N] with a row for each sample; block i has r_i ranks

`lorank.set_context` says what g follows; it holds until it is called again, also while blocks are computed a second time for the backward
pass. So with activation checkpointing call ``backward`` before the next `lorank.set_context`: a sum of losses of several contexts would be
differentiated at the last one. Where g is the same for all samples, a layer merges.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lorank.adapters.gated import Adapter, GatedAdapter, blockwise


class Context:
    """What `lorank.set_context` was given, one for all layers of a model."""

    value: Tensor | None = None


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
