"""CR-Net: cross-layer residuals. A projection's output is that of the block before, scaled, plus a low-rank change.

    Y_l = b(β_l) Y_{l-1} + B_l A_l X_l (+ c_l)   l = 2 .. L;  A_l [r, d_in]  B_l [d_out, r]  c_l [d_out]  β_l one number
    Y_1 = W X_1 (+ c)                            W [d_out, d_in], dense and trained; B_1 A_1 X_1 in the paper's ablation
    b(β) = sign(β) (|β| + 1e-6)                  sign(0) = 1: b is never zero, so that the recurrence can be inverted

Saves: compute, weights, gradients, optimizer state.

X_l [..., d_in] is the projection's usual input in block l. Y_l [..., d_out] is its raw output. Block l uses it as before
(rotary positions, attention, gate) and passes it to block l + 1 on a `lorank.tape.Tape`. A and B are linear: no activation.

Cost of one layer after the first, r = rank, n tokens: r (d_in + d_out) + 1 parameters; 2 n r (d_in + d_out) + 2 n d_out
floating-point operations forward. A low-rank first layer has neither the 1 nor the 2 n d_out. The backward pass also
needs Y_{l-1}, for ∂β. Under `lorank.keep_recurrence` a block keeps its input [n, d] and the seven z_l = A_l X_l [n, r];
every eighth block keeps its seven outputs too. The outputs in between are rebuilt from the last block to the first,
Y_{l-1} = (Y_l - B_l z_l - c_l) / b(β_l): one B product per projection and no A product. Each step back multiplies
rounding errors by 1/|b|. Where they would grow by more than 4 (in fp32: 128), an output is stored in between: with |b| =
1/2 in half precision, that of every third block.

Source: "CR-Net: Scaling Parameter-Efficient Training with Cross-Layer Low-Rank Structure", arXiv 2509.18993. The authors'
code could not be reached; equation and recomputation are taken from summaries of the paper.

Our choices where these are silent. A and B are drawn as in CoLA, W as N(0, 0.02²), and β = 1. A bias is part of the raw
output, so it is passed on. β stays in single precision in a model of half precision, and b Y + B A X is summed in single
precision: bfloat16 would round away the 1e-6, and every change of β below 0.4 %. The paper's recomputation also stores
the four inputs X_l of a block; here they are recomputed from the block's input, as in CoLA-M, for one more attention.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lorank.fields import Rank
from lorank.layers import LowRankLinear, like, linear
from lorank.method import Method, Published, Site, by_role, check_ranks, rank_at
from lorank.tape import ANCHORS, Tape, check_neighbours

EPS = 1e-6
DENSE_STD = 0.02
"""Standard deviation of W's entries."""


# ---- what `keep_recurrence` costs in a Llama of hidden size d and intermediate size d_ff


def recompute_flops(d: int, d_ff: int, r: int, n: int, layers: int, first_block: str = "dense") -> int:
    """FLOPs of recomputation in the backward pass of a sequence: L 4 n² d + (L - 1) 2 n r (5 d + 2 d_ff) + 2 n (4 d² + 2 d d_ff).

    These are attention in every block, the B products of every block but the first, and all W products of the first
    block but its last. If that is low-rank, its B products but the last, 2 n r (4 d + 2 d_ff), take their place.
    """
    factors, first = 2 * n * r * (5 * d + 2 * d_ff), 2 * n * (4 * d + 2 * d_ff) * (d if first_block == "dense" else r)
    return layers * 4 * n * n * d + (layers - 1) * factors + first


def kept_numbers(d: int, d_ff: int, r: int, n: int, layers: int) -> int:
    """Numbers that the blocks keep of a sequence for the backward pass: L n (d + 7 r), and n (5 d + 2 d_ff) for every eighth block."""
    return layers * n * (d + 7 * r) + math.ceil((layers - 1) / ANCHORS) * n * (5 * d + 2 * d_ff)


# ---- the mathematics


def bounded(beta: Tensor) -> Tensor:
    """b(β) = sign(β) (|β| + 1e-6) with sign(0) = 1; its derivative is 1 everywhere.

    >>> bounded(torch.tensor([-0.5, 0.0], dtype=torch.float64)).tolist()
    [-0.500001, 1e-06]
    """
    return torch.where(beta < 0, beta - EPS, beta + EPS)


def next_output(previous: Tensor, change: Tensor, b: Tensor) -> Tensor:
    """Y_l from Y_{l-1} and the low-rank change; summed in b's precision, returned in that of the change."""
    return (b * previous.to(b.device) + change).to(change.dtype)


def previous_output(y: Tensor, change: Tensor, b: Tensor) -> Tensor:
    """The inverse of `next_output` up to rounding: Y_{l-1} from Y_l, in b's precision."""
    return (y.to(b.device) - change.to(b.dtype)) / b


# ---- the layers


class CRNetDense(nn.Module):
    """The first layer of a chain, y = W x + c."""

    silent = ("W",)

    def __init__(self, d_in: int, d_out: int, *, tape: Tape, **options: Any):
        super().__init__()
        self.tape = tape
        self.W = linear(d_in, d_out, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.W.weight, std=DENSE_STD)
        if self.W.bias is not None:
            nn.init.zeros_(self.W.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.W(x)
        self.tape.put(0, y)
        return y

    def standalone(self) -> tuple[str, dict[str, Any]]:
        sizes = {"d_in": self.W.in_features, "d_out": self.W.out_features, "bias": self.W.bias is not None}
        return "ChainStart", sizes


class CRNetLowRank(LowRankLinear):
    """The first layer of a chain if it is low-rank too, y = B A x + c."""

    def __init__(self, d_in: int, d_out: int, rank: int, *, tape: Tape, **options: Any):
        super().__init__(d_in, d_out, rank, **options)
        self.tape = tape

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.tape.put(0, y)
        return y

    def standalone(self) -> tuple[str, dict[str, Any]]:
        return "LowRankStart", super().standalone()[1]


class CRNetLinear(LowRankLinear):
    """A later layer, y = b(β) y_previous + B A x + c; `depth` is its place in the chain, 1 or more."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        beta: float,
        tape: Tape,
        depth: int,
        learn_beta: bool = True,
        **options: Any,
    ):
        super().__init__(d_in, d_out, rank, **options)
        self.start = beta
        self.tape = tape
        self.depth = depth
        weight = self.A.weight
        # of shape [1], not []: it then decides the precision of b Y, and FSDP2 can shard it
        single = torch.promote_types(weight.dtype, torch.float32)
        self.beta = nn.Parameter(torch.full((1,), beta, device=weight.device, dtype=single), learn_beta)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.beta, self.start)

    def forward(self, x: Tensor) -> Tensor:
        change, b = self.B(self.A(x)), bounded(self.beta)
        previous = self.tape.take(self.depth, change.shape, lambda y: previous_output(y, change, b), self.slope)
        y = next_output(previous, change, b)
        self.tape.put(self.depth, y)
        return y

    def standalone(self) -> tuple[str, dict[str, Any]]:
        sizes = super().standalone()[1]
        return "ChainLink", {name: size for name, size in sizes.items() if name != "activation"}

    def slope(self) -> float:
        """|b(β)|; reading it from an accelerator waits for pending work."""
        return abs(self.start if isinstance(self.beta, FakeTensor) else self.beta.item()) + EPS

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CRNetLinear":
        """``model.to(torch.bfloat16)`` calls this: A and B change their type, β only its device."""
        if recurse:
            for child in self.children():
                child._apply(fn)

        def at_least_single(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < 4 else moved

        return super()._apply(at_least_single, recurse=False)


# ---- the method


@dataclass(frozen=True, kw_only=True)
class CRNet(Method):
    """CR-Net with its hyper-parameters.

    A projection is chained over the blocks in which it was chosen. These must be neighbours.
    """

    name: ClassVar[str] = "crnet"
    # We do not know the paper's ranks, which vary from block to block. These uniform ones fit the 43 M at which its 60m is
    # compared and the 583 M that it gives for 1b; that for 7b is from its memory measurement.
    published: ClassVar[Published] = {"60m": {"rank": 104}, "1b": {"rank": 448}, "7b": {"rank": 512}}

    rank: Rank = 0.25
    """Width of the bottlenecks: an integer, a fraction of the width, or {pattern: either}, for example by block
    ("layers.[0-3].": 0.2, ".*": 0.3): the paper's best models are wider in the middle."""
    beta: float = 1.0
    """Initial value of β in every layer."""
    learn_beta: bool = True
    """Whether β is trained; if not, it stays as it is, which is one of the paper's ablations."""
    first_block: Literal["dense", "low-rank"] = "dense"
    """What the first chained block is; "low-rank" is the paper's ablation (perplexity 19.68 instead of 18.95 at 350m)."""

    def check(self, sites: Sequence[Site]) -> None:
        stacks = by_role(sites).values()
        for stack in stacks:
            check_neighbours(stack, self.name)
            for one, other in itertools.pairwise(stack):
                _check_widths(one, other)
        check_ranks(self.rank, [site for stack in stacks for site in stack[self.first_block == "dense" :]])

    def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
        tape = Tape(sites[0].role, len(sites), dense_start=self.first_block == "dense")
        return [self._layer(site, tape, depth) for depth, site in enumerate(sites)]

    def _layer(self, site: Site, tape: Tape, depth: int) -> nn.Module:
        options = {"bias": site.linear.bias is not None, "tape": tape, **like(site.linear.weight)}
        if depth == 0 and self.first_block == "dense":
            return CRNetDense(site.d_in, site.d_out, **options)
        shape = site.d_in, site.d_out, rank_at(self.rank, site)
        if depth == 0:
            return CRNetLowRank(*shape, **options)
        return CRNetLinear(*shape, beta=self.beta, learn_beta=self.learn_beta, depth=depth, **options)

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        raise ValueError(
            f"{self.name} cannot be merged: a layer's output depends on the layer before, not on its input alone"
        )


def _check_widths(one: Site, other: Site) -> None:
    """Raise ValueError unless the second can add the first one's output to its own."""
    if other.d_out != one.d_out:
        raise ValueError(
            f"crnet chains {one.role} from block to block, but it is {one.d_out} wide at depth {one.depth} and {other.d_out} wide "
            f"at depth {other.depth}; exclude it"
        )
