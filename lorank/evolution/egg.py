"""EGG: a recurrent language model of bytes whose weights, states and sums are integers, before training, in it and after.

    u · Mᵀ     = clip( u Mᵀ // (16 ⌊√n⌋) )                          n = width of u; clip: to ±127; 16 stands for 1.0
    LN(x)      = clip( x w // max(Σ|x| // D, 1) )                    no mean, and the mean magnitude for the deviation
    GRU(x, s)  : f = clip(x · Wf + s · Uf + bf)                      f and h stand where others put sigmoid and tanh
                 h = clip(x · Wh + ((f + 127) s >> 8) · Uh + bh)
                 s ← s + ((f + 127) (h - s) >> 8),  which is also the output
    a layer    : x ← clip(x + GRU(LN x, s)),  x ← clip(x + (LN x · M1) · M2)
    logits     = LN x · head,  log₂ p(t) = logit_t / 16 - log₂ Σⱼ 2^(logit_j / 16)

    x, s, f, h [D]     Wf, Uf, Wh, Uh [D, D]     M1 [4D, D]     M2 [D, 4D]     head [256, D]     all int8

513 D + l (4 D + 12 D²) parameters. Byte 0 begins a document and sets all states to 0. A member of an EGGROLL population
(`lorank.evolution.integers`) adds (x · B) A s >> (4 + sig) before a product is divided, as `Noise` does here.

Source: Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv 2511.16652, appendix G, and their nano-egg.

Departures. Arithmetic runs on float32 tensors that hold integers: sums stay below 2²⁴, or are clipped anyway, so floor, product
and quotient are exact, and a float32 product is the fastest a CPU has. Where the magnitude table of nano-egg divides by 0 we
divide by 1. The loss of `forward` is the true one, of these logits; the integer likelihood, which is rounded in the model's
favour, is used for fitness only.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LIMIT = 127
ONE = 16
"""What stands for 1.0."""
DOCUMENT_START = 0


class Noise(NamedTuple):
    """The noise of one parameter for K pairs of members with R rows a pair, half of them of each member: int8 values."""

    A: Tensor  # [K, a], int32
    B: Tensor  # [K, b], float32; of a vector [K, a]
    sign: Tensor  # [R, 1], int32: of the member that a row belongs to
    shift: int

    def of_product(self, x: Tensor) -> Tensor:
        """(x · B) A s >> shift [K, R, a] of x [K, R, b]; products pass 2²⁴ here, so they are int32."""
        h = (x * self.B[:, None]).sum(-1, keepdim=True)
        return (h.int() * self.sign * self.A[:, None]) >> self.shift

    def of_vector(self) -> Tensor:
        """A B s >> shift [K, R, a]."""
        return (self.A * self.B.int())[:, None] * self.sign >> self.shift

    def of_lookup(self, at: Tensor) -> Tensor:
        """A[t] B s >> shift [K, R, b] at t [K, R]."""
        return self.A.gather(1, at)[:, :, None] * self.sign * self.B.int()[:, None] >> self.shift


Member = dict[nn.Parameter, Noise]


def signs(rows: int, device: torch.device | None = None) -> Tensor:
    """+1 for the first half of a pair's rows and -1 for the second: [rows, 1], int32."""
    return torch.ones(rows, 1, dtype=torch.int32, device=device).index_fill_(
        0, torch.arange(rows // 2, rows, device=device), -1
    )


def clip(x: Tensor) -> Tensor:
    return x.clamp(-LIMIT, LIMIT)


class Matrix(NamedTuple):
    """M [a, n] as float32, and the noise of the members that read it."""

    M: Tensor
    noise: Noise | None

    def product(self, x: Tensor) -> Tensor:
        """u · Mᵀ of x [K, R, n]."""
        y = F.linear(x.flatten(0, 1), self.M).view(*x.shape[:-1], -1)
        if self.noise is not None:
            y = y + self.noise.of_product(x)
        return clip((y / (ONE * math.isqrt(x.shape[-1]))).floor())

    def lookup(self, at: Tensor) -> Tensor:
        """M[t] at t [K, R]."""
        x = F.embedding(at, self.M)
        return x if self.noise is None else clip(x + self.noise.of_lookup(at))


def weights(module: nn.Module, noise: Member) -> dict[str, Any]:
    """A module's own parameters by name: a `Matrix`, or a vector [D], that of members [K, R, D]."""
    found: dict[str, Any] = {}
    for name, p in module.named_parameters(recurse=False):
        if p.ndim == 2:
            found[name] = Matrix(p.float(), noise.get(p))
        else:
            found[name] = clip(p + noise[p].of_vector()).float() if p in noise else p.float()
    return found


def layer_norm(x: Tensor, w: Tensor) -> Tensor:
    magnitude = (x.abs().sum(-1, keepdim=True) / x.shape[-1]).floor().clamp(min=1)
    return clip((x * w / magnitude).floor())


def gate(f: Tensor, x: Tensor) -> Tensor:
    """(f + 127) x >> 8."""
    return ((f + LIMIT) * x / 256).floor()


def layer(x: Tensor, s: Tensor, w: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """GRU and MLP, each behind a norm: x and state s [K, R, D]."""
    u = layer_norm(x, w["ln1"])
    f = clip(w["wf"].product(u) + w["uf"].product(s) + w["bf"])
    h = clip(w["wh"].product(u) + w["uh"].product(gate(f, s)) + w["bh"])
    s = s + gate(f, h - s)
    x = clip(x + s)
    u = layer_norm(x, w["ln2"])
    return clip(x + w["m2"].product(w["m1"].product(u))), s


def position(at: Tensor, states: list[Tensor], w: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Logits [K, R, 256] after bytes [K, R], and the states that they leave."""
    x = w["embedding"].lookup(at)
    going = (at != DOCUMENT_START)[:, :, None]
    left = []
    for s, own in zip(states, w["layers"], strict=True):
        x, s = layer(x, s * going, own)
        left.append(s)
    return w["head"].product(layer_norm(x, w["ln"])), left


def score(at: Tensor, target: Tensor, states: list[Tensor], w: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Integer log-likelihood [K, R] of the bytes after `at`, and the states."""
    logits, states = position(at, states, w)
    return log_likelihood(logits, target), states


EXP2 = [int(ONE * 2 ** (i / ONE)) for i in range(256)]


def log_likelihood(logits: Tensor, target: Tensor) -> Tensor:
    """In sixteenths of a bit, int32: (logit_t + 128) - int(16 log₂(Σ EXP2 / 16)), of logits [..., 256] and bytes [...]."""
    index = (logits + 128).int()
    table = torch.tensor(EXP2, dtype=torch.int32, device=logits.device)
    exponentials = table.index_select(0, index.flatten()).view(index.shape)
    total = (ONE * (exponentials.sum(-1, dtype=torch.int32).double() / ONE).log2()).int()
    return index.gather(-1, target[..., None])[..., 0] - total
