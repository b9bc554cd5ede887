"""FedPGP: clients share a prompt, and each adds a personal term of low rank that it keeps.

    P_i = P + U_i V_i      P [c, d] shared   U_i [c, b]   V_i [b, d]   c vectors of width d   rank b
    ℓ = CE(P_i) + μ ℓ_c    ℓ_c = −log e^(cos(a, t)/τ) / (e^(cos(a, t)/τ) + e^(cos(t, t_i)/τ))

a, t and t_i are an encoder's features of the hand-written prompt, of P and of P_i: what is shared stays near what everybody knows, and
what is personal departs from it. All three matrices begin as N(0, 0.02²), so the personal term is not zero at first. The server averages P
alone. Without the personal term and with μ = 0 it is federated CoOp.

Sends in a round: c d numbers down, and as many up.

Source: Cui et al., "Harmonizing Generalization and Personalization in Federated Prompt Learning", ICML 2024, arXiv 2405.09771. Values of
their code: b = 4, τ = 0.5, μ = 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lorank.federated.rule import shares


class Prompt(NamedTuple):
    """What a client has. `shared` is all that it sends."""

    shared: Tensor
    """P [c, d]."""
    U: Tensor
    """[c, b]."""
    V: Tensor
    """[b, d]."""

    def whole(self) -> Tensor:
        """P_i = P + U V [c, d]."""
        return self.shared + self.U @ self.V


def begin(vectors: int, width: int, rank: int = 4, *, generator: torch.Generator) -> Prompt:
    """All three matrices from N(0, 0.02²)."""

    def normal(*shape: int) -> Tensor:
        return 0.02 * torch.randn(*shape, generator=generator)

    return Prompt(normal(vectors, width), normal(vectors, rank), normal(rank, width))


def contrast(written: Tensor, shared: Tensor, personal: Tensor, *, temperature: float = 0.5) -> Tensor:
    """ℓ_c, its mean over the rows of features a, t and t_i [k, d]."""
    near = F.cosine_similarity(shared, written, dim=-1)
    far = F.cosine_similarity(shared, personal, dim=-1)
    return F.softplus((far - near) / temperature).mean()


def fedpgp(before: Prompt, after: Sequence[Tensor], weights: Sequence[float]) -> Prompt:
    """A client's prompt for the next round: the mean of the shared parts [c, d] that all clients sent, and its own U and V."""
    parts = torch.stack([p * one for p, one in zip(shares(weights), after, strict=True)])
    return before._replace(shared=parts.sum(0))
