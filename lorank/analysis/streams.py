"""Gram matrices of activations, summed over batches by hooks on the projections."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lorank.analysis.batches import Batch, tokens_of, without_cache
from lorank.sites import Place


class Streams:
    """Sums of XᵀX, YᵀY and Y_lᵀ Y_{l−1} for the projections of a model; no activation outlives its batch.

    Args:
        outputs: False: of inputs only.
        only: names of the projections to sum for; None: all. A survey with none finds shapes and neighbours.
        before: from an earlier survey: name of a projection -> the same one block before.
    """

    def __init__(
        self,
        found: Sequence[Place],
        *,
        outputs: bool = True,
        only: Collection[str] | None = None,
        before: Mapping[str, str] | None = None,
    ):
        self.places = found
        self.wants_outputs = outputs
        self.wanted = {place.name for place in found} if only is None else set(only)
        self.compared = {earlier for name, earlier in (before or {}).items() if name in self.wanted}
        """Projections whose outputs are summed too, because the wanted ones are compared with them."""
        self.shapes: dict[str, tuple[int, int]] = {}
        """Name -> (d_in, d_out)."""
        self.tokens = 0
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.crosses: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}
        """Name -> number of calls."""
        self.reads: dict[str, str] = {}
        """Name -> the first projection that read the same input."""
        self.before: dict[str, str] = {}
        """Name of a projection -> the same one block before."""
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to the current batch."""
        self.mask: Tensor | None = None
        self.read: tuple[Tensor, str] | None = None  # the last input, and who read it first
        self.last: dict[str, tuple[int, str, Tensor]] = {}  # role -> depth, name and outputs of the block before

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        modules: dict[nn.Module, list[Place]] = {}
        for place in self.places:
            modules.setdefault(place.module, []).append(place)
        hooks = [module.register_forward_hook(partial(self._see, parts)) for module, parts in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, model: nn.Module, batch: Batch) -> None:
        mask = batch.get("attention_mask")
        self.mask = None if mask is None or bool(mask.all()) else mask.flatten().bool()
        try:
            model(**{name: batch[name] for name in batch if name != "labels"}, **without_cache(model))
        finally:
            self._forget()
        self.tokens += tokens_of(batch)

    def _see(self, parts: list[Place], module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x, first = args[0], parts[0].name
        reader = self.read[1] if self.read is not None and self.read[0] is x else first
        for place in parts:
            self.reads.setdefault(place.name, reader)
            self.calls[place.name] = self.calls.get(place.name, 0) + 1
        if self.reads[first] == first and first in self.wanted:
            x_rows = self._rows(x).double()
            _accumulate(self.inputs, first, x_rows, x_rows)
        self.read = x, reader
        if not self.wants_outputs:
            return
        y = self._rows(output)
        for place in parts:
            name, own = place.name, place.rows(y.T).T
            self.shapes[name] = x.shape[-1], own.shape[-1]
            if name in self.wanted or name in self.compared:
                own = own.double()
                _accumulate(self.outputs, name, own, own)
            above, earlier, previous = self.last.get(place.role, (-2, "", None))
            if above == place.depth - 1 and previous is not None and previous.shape == own.shape:
                self.before[name] = earlier
                if name in self.wanted:
                    _accumulate(self.crosses, name, own, previous)
            self.last[place.role] = place.depth, name, own

    def _rows(self, tensor: Tensor) -> Tensor:
        rows = tensor.detach().flatten(0, -2)  # [b n, d]
        return rows[self.mask] if self.mask is not None and len(self.mask) == len(rows) else rows

    def bytes_of(self, names: Collection[str]) -> int:
        """Bytes of all sums that some projections need; a survey must have seen them."""
        total = 0
        for name in names:
            (d_in, d_out), earlier = self.shapes[name], self.before.get(name)
            total += d_out**2 + (self.reads[name] == name) * d_in**2
            total += 0 if earlier is None else d_out**2 * (2 if earlier not in names else 1)
        return 8 * total

    def passes(self, room: float) -> Iterator[list[str]]:
        """The projections, from first block to last, in groups whose sums fit in that many bytes; at least one in each."""
        group: list[str] = []
        for place in sorted(self.places, key=lambda place: place.depth):
            if place.name in self.shapes:
                if group and self.bytes_of([*group, place.name]) > room:
                    yield group
                    group = []
                group.append(place.name)
        if group:
            yield group


def _accumulate(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
    if name in sums:
        sums[name].addmm_(left.T, right)
    else:
        sums[name] = left.T @ right
