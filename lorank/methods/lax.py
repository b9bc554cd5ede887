"""LaX: the bottleneck of a layer also gets what the same projection of the block before had in its own.

    z_1 = σ(A_1 x_1)                                     the first block, with neither gate nor norm
    z_l = σ(LayerNorm(A_l x_l + G_l(z_{l-1})))           l = 2 .. L
    y_l = B_l z_l (+ b_l)

    A_l [r, d_in]   B_l [d_out, r]   z_l [..., r]        G, the gate:
    "identity"   G(z) = z
    "linear"     G(z) = W z + c            W [r, r]   c [r]
    "tensor"     G(z) = (G₁ ⊗ G₂) z        G₁ [a, a]   G₂ [b, b],   a b = r,   a ≤ b as close to each other as possible

An option of `cola`, `cola-m` and `low-rank`, whose σ is the identity: ``CoLA(carry="tensor")``. The chain is one of each projection,
from query to query and from down to down. What is carried is z, after norm and activation, so it sums over all blocks before. It
stays with its token: a cache of keys and values needs nothing more.

Cost of one layer after the first, for n tokens: 2 r parameters for the norm; the tensor gate a² + b², and 2 n r (a + b)
floating-point operations forward; the linear one r² + r and 2 n r². For the backward pass a few more tensors [n, r] are kept, or,
with checkpointed blocks, z_{l-1} alone.

Source: "LaX: Boosting Low-Rank Training of Foundation Models via Latent Crossing", NeurIPS 2025, arXiv 2505.21732. The gates'
initial values, the ε of the norm and what is carried are facts from the authors' code for vision transformers; that for language
models is not published, so CoLA's recipe holds.

Our choices. Weight decay pulls at the gates' matrices and not at their bias or at the norm, as everywhere. Muon and other rules for
projections leave gates to AdamW. The experts of a mixture pass nothing on, because each block sends them other tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.fields import Rank
from lorank.layers import ACTIVATIONS, Gate, LowRankLinear, like
from lorank.method import Site, by_role, rank_at
from lorank.tape import Tape, check_neighbours

Carry = Literal["none", "identity", "tensor", "linear"]
EPS = 1e-6


# ---- gates


def split(rank: int) -> tuple[int, int]:
    """a and b of the tensor gate.

    >>> [split(r) for r in (128, 256, 12, 7)]
    [(8, 16), (16, 16), (3, 4), (1, 7)]
    """
    a = next(a for a in range(math.isqrt(rank), 0, -1) if rank % a == 0)
    return a, rank // a


class LinearGate(Gate):
    """G(z) = W z + c."""

    def __init__(self, rank: int, **options: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, rank, **options))
        self.bias = nn.Parameter(torch.empty(rank, **options))

    def draw(self) -> None:
        """As ``nn.Linear``."""
        bound = len(self.bias) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight, self.bias)


class TensorGate(Gate):
    """G(z) = (G₁ ⊗ G₂) z, computed as G₁ Z G₂ᵀ with the numbers of z in the rows of Z [a, b]."""

    def __init__(self, rank: int, **options: Any):
        super().__init__()
        a, b = split(rank)
        self.G1 = nn.Parameter(torch.empty(a, a, **options))
        self.G2 = nn.Parameter(torch.empty(b, b, **options))

    def draw(self) -> None:
        """Kaiming-uniform: variance 2/a and 2/b."""
        nn.init.kaiming_uniform_(self.G1)
        nn.init.kaiming_uniform_(self.G2)

    def forward(self, z: Tensor) -> Tensor:
        Z = z.unflatten(-1, (len(self.G1), len(self.G2)))
        return (self.G1 @ F.linear(Z, self.G2)).flatten(-2)


GATES: dict[str, type[Gate]] = {"linear": LinearGate, "tensor": TensorGate}


# ---- the layer


class LaXLinear(LowRankLinear):
    """One layer of a chain; `depth` is its place there, and only those after the first have a gate and a norm."""

    def __init__(
        self, d_in: int, d_out: int, rank: int, *, carry: Carry, norm: bool, tape: Tape, depth: int, **options: Any
    ):
        super().__init__(d_in, d_out, rank, **options)
        self.carry, self.tape, self.depth = carry, tape, depth
        new, later = like(self.A.weight), depth > 0
        self.gate = GATES[carry](rank, **new) if later and carry in GATES else None
        self.norm = nn.LayerNorm(rank, eps=EPS, **new) if later and norm else None
        if self.gate is not None:
            self.gate.draw()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.gate is not None:
            self.gate.draw()
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        h = self.A(x)  # before the gate, so that backward ends with A, as sharded blocks expect
        if self.depth:
            before = self.tape.take(self.depth, h.shape).to(h.device)
            h = h + (before if self.gate is None else self.gate(before))
            h = h if self.norm is None else self.norm(h).to(h.dtype)
        z = h if self.activation is None else ACTIVATIONS[self.activation](h)
        self.tape.put(self.depth, z)
        return self.B(z)

    def standalone(self) -> tuple[str, dict[str, Any]]:
        gate = self.carry if self.depth else None
        return "Latent", {**super().standalone()[1], "gate": gate, "norm": self.norm is not None}

    def extra_repr(self) -> str:
        if not self.depth:
            return super().extra_repr()
        return f"{super().extra_repr()}, carry={self.carry}" + ("" if self.norm is not None else ", norm=False")


# ---- for the methods with the option


def build_chain(method: Any, sites: Sequence[Site]) -> list[nn.Module]:
    """The layers of a stack by `method.build`, which gets what a `LaXLinear` needs of the chain, or nothing if there is none."""
    if method.carry == "none" or sites[0].experts:
        return [method.build(site) for site in sites]
    link = {
        "carry": method.carry,
        "norm": method.carry_norm,
        "tape": Tape(sites[0].role, len(sites), dense_start=False),
    }
    return [method.build(site, depth=depth, **link) for depth, site in enumerate(sites)]


def check_settings(carry: Carry, norm: bool) -> None:
    """Raises ValueError for a norm that would be left out of nothing."""
    if carry == "none" and not norm:
        raise ValueError("carry must be 'identity', 'tensor' or 'linear' with carry_norm=False, got 'none'")


def check_chains(carry: Carry, rank: Rank, sites: Sequence[Site]) -> None:
    """Raises ValueError unless each projection can be chained: in neighbouring blocks, at one rank, and at least one in two."""
    if carry == "none":
        return
    stacks: Mapping[str, Sequence[Site]] = by_role([site for site in sites if not site.experts])
    if all(len(stack) < 2 for stack in stacks.values()):
        raise ValueError(
            f"carry={carry!r} needs a projection in two blocks, to pass its bottleneck from one to the next, but the chosen "
            "projections are in one block, or are experts; choose more, or use carry='none'"
        )
    for role, stack in stacks.items():
        check_neighbours(stack, "carry")
        ranks = [rank_at(rank, site) for site in stack]
        other = next((i for i, r in enumerate(ranks) if r != ranks[0]), None)
        if other is not None:
            raise ValueError(
                f"carry={carry!r} needs one rank for {role} in all blocks, got {ranks[0]} at depth {stack[0].depth} and "
                f"{ranks[other]} at depth {stack[other].depth}; give equal ranks, or exclude it"
            )


def refuse_to_merge(name: str, carry: Carry) -> None:
    """Raises ValueError if layers have a chain."""
    if carry != "none":
        raise ValueError(
            f"{name} cannot be merged: with carry={carry!r} a layer's output depends on the bottleneck of the block before, not "
            "on its input alone"
        )
