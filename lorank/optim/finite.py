"""Gradients are checked before they are used."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorank.optim.shards import all_finite, local


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """In single precision, squared or not."""
    if all(G.device.type == "cpu" and G.dtype == torch.float32 and G.is_contiguous() for G in gradients):
        return [torch.dot(G.view(-1), G.view(-1)) for G in gradients]  # the fastest there
    return [norm.float() for norm in torch._foreach_norm(gradients)]


def _largest_square(G: Tensor) -> Tensor:
    """In single precision at least, or not finite; as small as one can be, so that processes may add theirs."""
    if not G.numel():
        return torch.zeros((), dtype=torch.float64, device=G.device)
    largest = G.to(torch.promote_types(G.dtype, torch.float32)).abs().max()
    return torch.where(largest.square().isfinite(), torch.zeros_like(largest), largest.square()).double()


@torch.compiler.disable
def check_finite(gradients: Mapping[nn.Parameter, Tensor | None]) -> None:
    """Check gradients before they are used.

    Raises:
        FloatingPointError: an entry of one or its square is not finite, in all processes of a sharded run, whoever's part it is.
        ValueError: one is sparse.
    """
    watched = {p: local(G) for p, G in gradients.items() if G is not None}
    if any(G.is_sparse for G in watched.values()):
        raise ValueError(
            "gradients must be dense with low-rank optimizers, got a sparse one; use nn.Embedding(sparse=False)"
        )
    if not watched:
        return
    finite = all_finite(torch.stack(_norms(list(watched.values()))), watched)
    if finite.all():
        return
    doubtful = {p: G for (p, G), is_finite in zip(watched.items(), finite, strict=True) if not is_finite}
    finite = all_finite(torch.stack([_largest_square(G) for G in doubtful.values()]), doubtful)
    if not finite.all():  # else it was the sum of squares that is too large
        p = next(p for p, is_finite in zip(doubtful, finite, strict=True) if not is_finite)
        raise FloatingPointError(
            f"the gradient of a parameter of shape {tuple(p.shape)} is not finite; lower lr or clip gradients"
        )
