"""Layers of a model that was made with lorank, for machines without it. lorank writes this file next to the weights.

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("this/folder", trust_remote_code=True)

It needs torch and transformers. Licence: Apache-2.0. The end of the file has the model's own classes.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

ACTIVATIONS: dict[Any, Any] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, None: lambda z: z}


# ---- what a layer gives to the layer of the same projection in the next block


class Chain:
    """Outputs of one projection on their way from block to block. Outside a forward pass there are none."""

    def __init__(self) -> None:
        self.wanted: set[int] = set()
        self.waiting: dict[int, Tensor] = {}
        self.parts: dict[str, Chain] = {}


class Call:
    """A call of a block under activation checkpointing, which runs again in the backward pass, without the block before it."""

    def __init__(self) -> None:
        self.taken: dict[Place, Tensor] = {}
        self.again = False


CALLS: list[Call] = []


class Place:
    """A layer's place in a chain."""

    def __init__(self, chain: Chain, depth: int):
        self.chain, self.depth = chain, depth

    def part(self, name: str) -> "Place":
        return Place(self.chain.parts.setdefault(name, Chain()), self.depth)

    def will_take(self) -> None:
        self.chain.wanted.add(self.depth - 1)

    def put(self, y: Tensor) -> None:
        if self.depth in self.chain.wanted and not (CALLS and CALLS[-1].again):
            self.chain.waiting[self.depth] = y

    def take(self, x: Tensor) -> Tensor:
        """What the block before put, on the device of `x`."""
        call = CALLS[-1] if CALLS else None
        if call is not None and call.again:
            return call.taken[self]
        y = self.chain.waiting.pop(self.depth - 1, None)
        if y is None:
            raise RuntimeError(
                f"block {self.depth} finds no output of block {self.depth - 1}; blocks must run in order, once each, and activation "
                "checkpointing must be turned on by the whole model's gradient_checkpointing_enable"
            )
        if call is not None:
            call.taken[self] = y.detach().to(x.device).requires_grad_(y.requires_grad)
        return y.to(x.device)


def remembering(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A function such as torch.utils.checkpoint.checkpoint, for blocks whose layers are in chains. Reentrant checkpoints would lose
    the gradients from block to block, so they are not."""

    def run(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = Call()

        def noted(*args: Any, **kwargs: Any) -> Any:
            CALLS.append(call)
            try:
                return block(*args, **kwargs)
            finally:
                CALLS.pop()
                call.again = True

        return checkpoint(noted, *args, **{**kwargs, "use_reentrant": False})

    return run


class Chained:
    """Before a model's own class: activation checkpointing remembers what came from the block before."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = torch.utils.checkpoint.checkpoint, **others: Any
    ) -> None:
        own: Any = super()
        if any(hasattr(module, "place") for module in own.modules()):
            gradient_checkpointing_func = remembering(gradient_checkpointing_func)
        own._set_gradient_checkpointing(enable, gradient_checkpointing_func, **others)


# ---- the layers


class LowRank(nn.Module):
    """y = B s(A x) + b; s is the activation, or nothing."""

    def __init__(self, place: Place, d_in: int, d_out: int, rank: int, activation: str | None, bias: bool):
        super().__init__()
        self.A = nn.Linear(d_in, rank, bias=False)
        self.B = nn.Linear(rank, d_out, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.B(ACTIVATIONS[self.activation](self.A(x)))
        return y


class ChainStart(nn.Module):
    """y = W x + c, which the next block's layer adds to its own output."""

    def __init__(self, place: Place, d_in: int, d_out: int, bias: bool):
        super().__init__()
        self.place = place
        self.W = nn.Linear(d_in, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.W(x)
        self.place.put(y)
        return y


class LowRankStart(LowRank):
    """y = B A x + c, which the next block's layer adds to its own output."""

    def __init__(self, place: Place, **sizes: Any):
        super().__init__(place, **sizes)
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.place.put(y)
        return y


class ChainLink(LowRank):
    """y = b y_before + B A x + c with b = sign(beta) (|beta| + 1e-6), where y_before is the block's before."""

    def __init__(self, place: Place, **sizes: Any):
        super().__init__(place, activation=None, **sizes)
        self.place = place
        place.will_take()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        change = super().forward(x)
        beta = self.beta.float()
        b = torch.where(beta < 0, beta - 1e-6, beta + 1e-6)
        y: Tensor = (b * self.place.take(x) + change).to(change.dtype)
        self.place.put(y)
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

    def __init__(self, place: Place, rank: int, gate: str | None, norm: bool, **sizes: Any):
        super().__init__(place, rank=rank, **sizes)
        self.place, self.later = place, gate is not None
        if self.later:
            place.will_take()
        gates: dict[Any, Any] = {"tensor": TensorGate, "linear": lambda r: nn.Linear(r, r)}
        self.gate = gates.get(gate, lambda r: nn.Identity())(rank)
        self.norm = nn.LayerNorm(rank, eps=1e-6) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.A(x)
        if self.later:
            h = self.norm(h + self.gate(self.place.take(x))).to(h.dtype)
        z = ACTIVATIONS[self.activation](h)
        self.place.put(z)
        y: Tensor = self.B(z)
        return y


class Joined(nn.Module):
    """Several projections whose outputs the architecture expects in one tensor."""

    def __init__(self, place: Place, heads: int, parts: dict[str, Any]):
        super().__init__()
        self.heads = heads
        for name, (kind, sizes) in parts.items():
            self.add_module(name, KINDS[kind](place.part(name), **sizes))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x).unflatten(-1, (self.heads, -1)) for part in self.children()]
        return torch.cat(outputs, dim=-1).flatten(-2)


class Dense(nn.Linear):
    """A projection that stayed dense among others that did not."""

    def __init__(self, place: Place, d_in: int, d_out: int, bias: bool):
        super().__init__(d_in, d_out, bias=bias)


class Nothing(nn.Identity):
    """An activation that was moved into a projection."""

    def __init__(self, place: Place):
        super().__init__()


_KINDS = LowRank, ChainStart, LowRankStart, ChainLink, Latent, Joined, Dense, Nothing
KINDS: dict[str, Any] = {kind.__name__: kind for kind in _KINDS}


def put_layers(model: nn.Module, layers: dict[str, Any]) -> None:
    """Replace the modules of a dense model. `layers` has, for each name with ``*`` for the depth, pairs of depths and what
    to put there."""
    for pattern, groups in layers.items():
        chain = Chain()
        for depths, (kind, sizes) in groups:
            for depth in depths:
                parent, _, attribute = pattern.replace("*", str(depth)).rpartition(".")
                setattr(model.get_submodule(parent), attribute, KINDS[kind](Place(chain, depth), **sizes))
