"""What a metric is made of: the inputs of a model's projections on calibration text, block by block.

    G = Σ XᵀX  [d_in, d_in]     R Rᵀ = G up to a factor, so that |(W − W̃) R| is the error of the outputs on that text

Blocks are visited in order. The projections of a block that is done give what their replacement computes, so each block is fitted to
the inputs that it will have. A visit runs the model up to the block and no further; in memory are the sums of one block, 8 d_in² bytes
for each different input. Blocks with matrices that are fitted together are visited together: within them the inputs are those of
the dense model.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorank.analysis.batches import Batch, without_cache
from lorank.analysis.streams import Streams
from lorank.factors import whitening
from lorank.fit.structure import Metric
from lorank.pretrained import positions_of
from lorank.sites import Place, blocks

Computes = Callable[[Tensor], Tensor]
"""From inputs [..., d_in] to outputs [..., d_out]."""


class Block(NamedTuple):
    """One block of a model with the projections in it that are fitted, or several that are visited together."""

    name: str
    module: nn.Module
    """The last block."""
    places: list[Place]


class _Enough(Exception):
    """The block has run; what follows it is not needed."""


def blocks_with(model: nn.Module, places: Sequence[Place]) -> list[Block]:
    """The blocks that hold these projections, in the model's order."""
    found = []
    for stack, depth, module in blocks(model):
        name = f"{stack}.{depth}"
        if inside := [place for place in places if place.name.startswith(f"{name}.")]:
            found.append(Block(name, module, inside))
    return found


def joined(chain: Sequence[Block], groups: Iterable[Collection[str]]) -> list[Block]:
    """The blocks, so that all projections of a group, given by name, are in the same one."""
    number = {place.name: i for i, block in enumerate(chain) for place in block.places}
    last = [*range(len(chain))]  # that is visited together with each block
    for group in groups:
        first, end = (choose(number[name] for name in group) for choose in (min, max))
        last[first] = max(last[first], end)
    found: list[Block] = []
    end = -1
    for i, block in enumerate(chain):
        if i <= end:
            before = found.pop()
            name = f"{before.name.partition(' to ')[0]} to {block.name}"
            block = Block(name, block.module, [*before.places, *block.places])
        found.append(block)
        end = max(end, last[i])
    return found


class Calibration:
    """The inputs of a model's blocks on some text. The model runs in evaluation mode, and is as before after each visit.

    Raises:
        ValueError: there are no batches, or the model cannot read one of them.
    """

    def __init__(self, model: nn.Module, data: Iterable[Tensor | Batch], sample: int = 0):
        self.model, self.sample = model, sample
        self.batches = [batch_of(model, batch) for batch in data]
        if not self.batches:
            raise ValueError("data must have at least one batch, got none")
        self.calls = self._survey()

    def visit(self, block: Block, computes: Mapping[str, Computes], behind: Sequence[Place]) -> dict[str, Metric]:
        """The metric of each projection of a block, while the projections `behind` give what `computes` says.

        Raises:
            ValueError: no text reaches a projection, or the activations are not finite.
        """
        streams, left = Streams(block.places, outputs=False), 0

        def stop(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise _Enough

        rows: dict[nn.Module, list[Tensor]] = {}
        share = -(-self.sample // len(self.batches))

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2)
            some = torch.linspace(0, len(x) - 1, min(share, len(x)), device=x.device).long()
            rows.setdefault(module, []).append(x[some].float())

        with (
            standing_in(behind, computes),
            streams.attached(),
            _before({place.module for place in block.places}, keep, share),
        ):
            for batch in self.batches:
                left = self.calls.get(block.module, 0)
                self._run(batch, lambda batch: streams.add(self.model, batch), {block.module: stop})
        if missing := [place.role.partition(".*.")[2] for place in block.places if place.name not in streams.reads]:
            raise ValueError(
                f"data must reach every projection, but none of it reaches those of {block.name}: {', '.join(missing)}; exclude them "
                f"(exclude={missing})"
            )
        for name, gram in streams.inputs.items():
            if not gram.isfinite().all():
                raise ValueError(f"the inputs of {name} must be finite numbers; use an earlier checkpoint")
        sizes = {name: gram.diagonal().mean().item() or 1.0 for name, gram in streams.inputs.items()}
        roots = {name: whitening(gram / sizes[name]) for name, gram in streams.inputs.items()}
        samples = {place.name: torch.cat(rows[place.module]) for place in block.places if place.module in rows}
        return {name: Metric(roots[reader], samples.get(name), sizes[reader]) for name, reader in streams.reads.items()}

    @torch.no_grad()
    def _run(self, batch: Batch, call: Callable[[Batch], None], hooks: Mapping[nn.Module, Callable[..., None]]) -> None:
        """Call the model on a batch, in evaluation mode, with these hooks on its modules."""
        device, training = next(self.model.parameters()).device, self.model.training
        handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
        self.model.eval()
        try:
            with contextlib.suppress(_Enough):
                call({name: tensor.to(device) for name, tensor in batch.items() if name != "labels"})
        finally:
            for handle in handles:
                handle.remove()
            self.model.train(training)

    def _survey(self) -> dict[nn.Module, int]:
        """How often a pass calls each block: models whose blocks share weights call one several times."""
        calls: dict[nn.Module, int] = {}

        def count(module: nn.Module, *_: Any) -> None:
            calls[module] = calls.get(module, 0) + 1

        shortest = min(self.batches, key=lambda batch: batch["input_ids"].numel())
        hooks = {block: count for _, _, block in blocks(self.model)}
        self._run(shortest, lambda batch: self.model(**batch, **without_cache(self.model)), hooks)
        return calls


@contextlib.contextmanager
def _before(modules: Iterable[nn.Module], hook: Callable[..., None], wanted: int) -> Iterator[None]:
    """A hook on what modules get, if any of it is wanted."""
    hooks = [module.register_forward_pre_hook(hook) for module in modules] if wanted else []
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@contextlib.contextmanager
def standing_in(places: Sequence[Place], computes: Mapping[str, Computes]) -> Iterator[None]:
    """While it lasts, these projections give what `computes` says, and their bias."""
    modules: dict[nn.Module, list[Place]] = {}
    for place in places:
        if place.name in computes:
            modules.setdefault(place.module, []).append(place)

    def replace(parts: list[Place], module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        bias = getattr(module, "bias", None)
        y = output.clone()
        rows = torch.arange(y.shape[-1], device=y.device)
        for place in parts:
            own = place.rows(rows)
            new = computes[place.name](args[0]).to(y.dtype)
            y[..., own] = new if bias is None else new + bias[own]
        return y

    hooks = [
        module.register_forward_hook(lambda module, args, output, parts=parts: replace(parts, module, args, output))
        for module, parts in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def batch_of(model: nn.Module, batch: Any) -> Batch:
    """A batch of token ids [b, n], or a dictionary with them under "input_ids", as a dictionary.

    Raises:
        ValueError: it is something else, or ids or positions that the model does not have.
    """
    whole: Batch = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    check_ids(model, whole.get("input_ids"))
    return whole


def check_ids(model: nn.Module, ids: Any) -> None:
    """Raises ValueError unless these are token ids that the model can read."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"data must be batches of token ids, tensors [b, n] of int64 or int32, got {got}")
    if not ids.numel():
        raise ValueError(f"data must be batches with tokens, got one of shape {list(ids.shape)}; leave it out")
    if isinstance(model, PreTrainedModel):
        if (positions := positions_of(model)) is not None and ids.shape[1] > positions:
            raise ValueError(
                f"data must be sequences of at most {positions} tokens, the model's positions, got {ids.shape[1]}; cut them"
            )
        rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= rows:
            wrong = least if least < 0 else most
            raise ValueError(
                f"data must be token ids from 0 to {rows - 1}, the model's vocabulary, got {wrong}; use the model's own tokenizer"
            )
