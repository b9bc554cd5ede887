"""What processes that share a model send each other, in numbers per token and block in a forward pass; backward as many again.

    dense                    2 d          Megatron's cut: attention's output and the MLP's are summed
    between the layers       5 d + 2 f    the same cut of a low-rank model, as if its factors were layers: every projection's output
    at the bottleneck        7 r          `lorank.distributed.tensor_parallel`, and 2 for the norms

So this cut sends less than a dense model does if r < 2 d / 7. With several widths and ranks these are sums over the projections.

Source: Wang et al., "BOOST", MLSys 2026, arXiv 2512.12131.
"""

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from lorank.distributed.tensor_parallel import HEAD_NORMS, READERS, check
from lorank.layers import LowRankLinear
from lorank.sites import blocks


class Traffic(NamedTuple):
    processes: int
    dense: int | None
    """Of the dense model of that shape; None: its blocks are not a Llama's."""
    between: int | None = None
    """Of the model, cut between its layers; None: it is dense, or cannot be cut at the bottleneck."""
    cut: int | None = None
    """At the bottleneck, without the norms."""
    norms: int = 0
    parameters: int | None = None
    """Those that each process has."""
    refusal: str | None = None
    """Why it cannot be cut at the bottleneck over so many processes."""

    @property
    def pays(self) -> bool:
        """Whether a cut at the bottleneck sends fewer numbers than the dense model's."""
        return self.cut is not None and self.dense is not None and self.cut < self.dense


def traffic(model: PreTrainedModel, processes: int) -> Traffic:
    """What a model sends over that many processes. Its tensors may be on the meta device."""
    block = next((block for _, _, block in blocks(model)), None)
    layers: dict[str, Any] = {} if block is None else dict(block.named_modules())
    projections = [layers.get(name) for names in READERS.values() for name in names]
    if not all(isinstance(layer, nn.Linear | LowRankLinear) for layer in projections):
        return Traffic(processes, None, refusal=_refusal(model, processes))
    out = [layer.B.out_features if isinstance(layer, LowRankLinear) else layer.out_features for layer in projections]  # type: ignore[union-attr]
    dense = layers["self_attn.o_proj"], layers["mlp.down_proj"]
    found = Traffic(processes, sum(out[projections.index(layer)] for layer in dense))
    if not any(isinstance(layer, LowRankLinear) for layer in projections):
        return found
    refusal = _refusal(model, processes)
    if not all(isinstance(layer, LowRankLinear) for layer in projections) or (refusal and "two factors" in refusal):
        return found._replace(refusal=refusal)
    ranks = [layer.A.out_features for layer in projections]  # type: ignore[union-attr]
    norms = sum(bool(name.strip()) for name in READERS)
    return found._replace(
        between=sum(out), cut=sum(ranks), norms=norms, parameters=_held(model, processes), refusal=refusal
    )


def _refusal(model: nn.Module, processes: int) -> str | None:
    try:
        check(model, processes)
    except ValueError as error:
        return str(error)
    return None


def _held(model: PreTrainedModel, processes: int) -> int:
    """The parameters of a process that has most: a part of a width that does not divide may be larger than the others."""
    head: Any = model.get_output_embeddings()
    body: Any = model.base_model
    whole = {p for module in (head, body.norm) if module is not None for p in module.parameters()}
    whole |= {p for name, p in model.named_parameters() if any(f".{norm}." in name for norm in HEAD_NORMS)}
    split = {p: 0 if name.endswith(("B.weight", "B.bias")) else -1 for name, p in model.named_parameters()}
    part = lambda p, dim: -(-p.shape[dim] // processes) * (p.numel() // p.shape[dim])  # noqa: E731
    return sum(p.numel() if p in whole else part(p, dim) for p, dim in split.items())
