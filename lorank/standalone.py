"""Layers of a model that was made with lorank, for machines without it. lorank writes this file next to the weights.

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("this/folder", trust_remote_code=True)

It needs torch and transformers. Licence: Apache-2.0. The end of the file has the model's own classes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[Any, Any] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, None: lambda z: z}


class LowRank(nn.Module):
    """y = B s(A x) + b; s is the activation, or nothing."""

    def __init__(self, chain: Any, d_in: int, d_out: int, rank: int, activation: str | None, bias: bool):
        super().__init__()
        self.A = nn.Linear(d_in, rank, bias=False)
        self.B = nn.Linear(rank, d_out, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.B(ACTIVATIONS[self.activation](self.A(x)))
        return y


class ChainStart(nn.Module):
    """y = W x + c, which the next block's layer adds to its own output."""

    def __init__(self, chain: Any, d_in: int, d_out: int, bias: bool):
        super().__init__()
        self.chain = chain
        self.W = nn.Linear(d_in, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        self.chain["y"] = self.W(x)
        y: Tensor = self.chain["y"]
        return y


class LowRankStart(LowRank):
    """y = B A x + c, which the next block's layer adds to its own output."""

    def __init__(self, chain: Any, **sizes: Any):
        super().__init__(chain, **sizes)
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.chain["y"] = y
        return y


class ChainLink(LowRank):
    """y = b y_before + B A x + c with b = sign(beta) (|beta| + 1e-6), where y_before is the block's before."""

    def __init__(self, chain: Any, **sizes: Any):
        super().__init__(chain, activation=None, **sizes)
        self.chain = chain
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        change = super().forward(x)
        beta = self.beta.float()
        b = torch.where(beta < 0, beta - 1e-6, beta + 1e-6)
        y: Tensor = (b * self.chain["y"] + change).to(change.dtype)
        self.chain["y"] = y
        return y


class TensorGate(nn.Module):
    """(G1 x G2) z, a Kronecker product of [a, a] and [b, b]."""

    def __init__(self, rank: int):
        super().__init__()
        a = next(a for a in range(math.isqrt(rank), 0, -1) if rank % a == 0)
        self.G1 = nn.Parameter(torch.empty(a, a))
        self.G2 = nn.Parameter(torch.empty(rank // a, rank // a))

    def forward(self, z: Tensor) -> Tensor:
        return (self.G1 @ F.linear(z.unflatten(-1, (len(self.G1), len(self.G2))), self.G2)).flatten(-2)


class Latent(LowRank):
    """y = B z + b with z = s(norm(A x + gate(z_before))), where z_before is the block's before; the first block has no gate."""

    def __init__(self, chain: Any, rank: int, gate: str | None, norm: bool, **sizes: Any):
        super().__init__(chain, rank=rank, **sizes)
        self.chain, self.later = chain, gate is not None
        gates: dict[Any, Any] = {"tensor": TensorGate, "linear": lambda r: nn.Linear(r, r)}
        self.gate = gates.get(gate, lambda r: nn.Identity())(rank)
        self.norm = nn.LayerNorm(rank, eps=1e-6) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.A(x)
        if self.later:
            h = self.norm(h + self.gate(self.chain["z"])).to(h.dtype)
        self.chain["z"] = ACTIVATIONS[self.activation](h)
        y: Tensor = self.B(self.chain["z"])
        return y


class Joined(nn.Module):
    """Several projections whose outputs the architecture expects in one tensor."""

    def __init__(self, chain: Any, heads: int, parts: dict[str, Any]):
        super().__init__()
        self.heads = heads
        for name, (kind, sizes) in parts.items():
            self.add_module(name, KINDS[kind](chain.setdefault(name, {}), **sizes))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x).unflatten(-1, (self.heads, -1)) for part in self.children()]
        return torch.cat(outputs, dim=-1).flatten(-2)


class Dense(nn.Linear):
    """A projection that stayed dense among others that did not."""

    def __init__(self, chain: Any, d_in: int, d_out: int, bias: bool):
        super().__init__(d_in, d_out, bias=bias)


class Nothing(nn.Identity):
    """An activation that was moved into a projection."""

    def __init__(self, chain: Any):
        super().__init__()


_KINDS = LowRank, ChainStart, LowRankStart, ChainLink, Latent, Joined, Dense, Nothing
KINDS: dict[str, Any] = {kind.__name__: kind for kind in _KINDS}


def put_layers(model: nn.Module, layers: dict[str, Any]) -> None:
    """Replace the modules of a dense model. `layers` has, for each name with ``*`` for the depth, pairs of depths and what
    to put there."""
    for pattern, groups in layers.items():
        chain: dict[str, Any] = {}
        for depths, (kind, sizes) in groups:
            for depth in depths:
                parent, _, attribute = pattern.replace("*", str(depth)).rpartition(".")
                setattr(model.get_submodule(parent), attribute, KINDS[kind](chain, **sizes))
