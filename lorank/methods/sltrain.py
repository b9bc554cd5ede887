"""SLTrain: sparse plus low rank. Every projection of a transformer block is a low-rank map plus a few trained entries.

    y = (s B A + S) x (+ b)     W = s B A + S     s = alpha / r
    x [..., d_in]   A [r, d_in]   B [d_out, r]   b [d_out]   S [d_out, d_in]: v [nnz] at the places I [nnz], 0 elsewhere

Saves: weights, gradients, optimizer state.

I holds nnz = ⌊density · d_out · d_in⌋ places. They are drawn once for each matrix, uniformly and without repetition, and
never change: sorted flat row-major indices in a buffer that is saved with the model. B starts at zero, so W = S at first.

Cost of one layer, r = rank: r (d_in + d_out) + nnz parameters, and 8 nnz bytes of indices. The forward FLOPs are those of
a dense layer plus 2 d_out d_in r for forming W. The backward pass forms W again and needs twice as much for the gradients
of A and B. Per call, a Llama block spends 8 d² r + 6 d d_ff r FLOPs more than a dense one forward and 24 d² r + 18 d d_ff r
more backward, however few its tokens are (so merge before serving). Kept for the backward pass are x, B, s A, v and I. W
and its gradient G, both [d_out, d_in], exist one layer at a time, two such matrices at most.

Source: Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", NeurIPS
2024, arXiv 2406.02214.

Departures from the authors' code. The backward pass is in this file, not in a C++ extension: same formulas, any device, one
graph under torch.compile, any checkpoint policy. Each support is drawn from `support_seed` and the projection's name, not
from the global generator, so that it does not depend on other draws. Biases start at zero. There is no trainable scale,
and no dropout, which theirs never applies.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorank.experts import LowRankExperts, grouped, with_bias
from lorank.fields import Fraction, Positive, Rank
from lorank.layers import Factor, autocast_dtype, like, loaded, scale_at
from lorank.method import Method, Published, Site, check_ranks, rank_at

# ---- the mathematics


def support_size(density: float, d_in: int, d_out: int) -> int:
    """nnz, rounded down for each matrix.

    >>> support_size(0.03, 512, 512), support_size(0.03, 512, 1376)
    (7864, 21135)
    """
    return math.floor(density * (d_out * d_in))


def model_values(d: int, d_ff: int, layers: int, density: float) -> int:
    """Trained entries of S in all seven projections of a Llama: Σ nnz, each matrix rounded down by itself.

    >>> model_values(512, 1376, 8, 0.03)
    758888
    """
    return layers * (4 * support_size(density, d, d) + 3 * support_size(density, d, d_ff))


def draw_support(d_in: int, d_out: int, nnz: int, seed: int) -> Tensor:
    """The places I [nnz]: the beginning of a random permutation of 0 .. d_out d_in - 1, sorted; on the CPU, int64."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(d_out * d_in, generator=generator, device="cpu")[:nnz].sort().values


def site_seed(support_seed: int, name: str) -> int:
    """A seed for each matrix of a model, the same in every process.

    >>> site_seed(0, "model.layers.0.mlp.up_proj")
    36091265102494767
    """
    return int.from_bytes(hashlib.blake2b(f"{support_seed} {name}".encode(), digest_size=7).digest(), "big")


def dense_weight(B: Tensor, A: Tensor, v: Tensor, support: Tensor) -> Tensor:
    """W = B A + S, [d_out, d_in]."""
    product = B @ A  # not changed in place, because a checkpoint policy may have kept it
    return product.flatten().index_add(0, support, v).view_as(product)


@torch.library.custom_op("lorank::not_before", mutates_args=())
def not_before(B: Tensor, dy: Tensor) -> Tensor:
    """A copy of B that seems to depend on dy. Otherwise a compiler sees that W is the same in forward and backward, and keeps it."""
    return B.clone()


@not_before.register_fake
def _(B: Tensor, dy: Tensor) -> Tensor:
    return torch.empty_like(B)


class SparsePlusLowRank(torch.autograd.Function):
    """y = x (B A + S)ᵀ without keeping W; the gradients are those of the paper's section 3. A is already multiplied by s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, A: Tensor, v: Tensor, support: Tensor) -> Tensor:
        ctx.save_for_backward(x, B, A, v, support)
        return F.linear(x, dense_weight(B, A, v, support))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, B, A, v, support = ctx.saved_tensors
        dx = dB = dA = dv = None
        if ctx.needs_input_grad[0]:
            later = not_before(B, dy) if torch.compiler.is_compiling() else B
            dx = dy @ dense_weight(later, A, v, support)  # W is freed before G is formed
        if any(ctx.needs_input_grad[1:]):
            G = dy.reshape(-1, B.shape[0]).T @ x.reshape(-1, A.shape[1])  # dW [d_out, d_in]
            dB, dA, dv = G @ A.T, B.T @ G, G.flatten()[support]
        return dx, dB, dA, dv, None


# ---- the layer


class SLTrainLinear(nn.Module):
    """y = x (s B A + S)ᵀ + b instead of a dense layer, with the support of S fixed by `seed`."""

    silent = ("B", "values")
    support: Tensor

    def __init__(
        self, d_in: int, d_out: int, rank: int, *, scale: float, nnz: int, seed: int, bias: bool = False, **new: Any
    ):
        super().__init__()
        self.scale, self.seed = scale, seed
        self.A = Factor(d_in, rank, bias=False, **new)
        self.B = Factor(rank, d_out, bias=bias, **new)
        self.values = nn.Parameter(torch.empty(nnz, **new))
        self.register_buffer("support", torch.empty(nnz, device=new.get("device"), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        d_in, d_out = self.A.in_features, self.B.out_features
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))  # within ± d_in^(-1/2)
        nn.init.zeros_(self.B.weight)
        nn.init.uniform_(self.values, -(d_in**-0.5), d_in**-0.5)
        if self.B.bias is not None:
            nn.init.zeros_(self.B.bias)
        if not self.support.is_meta and not loaded(self.support):
            self.support.copy_(draw_support(d_in, d_out, len(self.support), self.seed))

    def forward(self, x: Tensor) -> Tensor:
        (A, _), (B, bias) = self.A(), self.B()
        operands: tuple[Tensor, ...] = (x, B, self.scale * A, self.values)
        if (dtype := autocast_dtype(x)) is not None:
            operands = tuple(t.to(dtype) for t in operands)
        y = SparsePlusLowRank.apply(*operands, self.support)
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"d_in={self.A.in_features}, d_out={self.B.out_features}, rank={self.A.out_features}, "
            f"nnz={len(self.values)}, scale={self.scale:g}"
        )


class SLTrainExperts(LowRankExperts):
    """The same for each expert of a mixture: A [E, r, d_in], B [E, d_out, r], I [E nnz]; W is formed in forward and in backward."""

    silent = ("B", "bias", "values")
    support: Tensor

    def __init__(self, *sizes: int, scale: float, nnz: int, seed: int, **options: Any):
        super().__init__(*sizes, **options)
        self.scale, self.seed = scale, seed
        self.values = nn.Parameter(self.A.new_empty(len(self.A) * nnz))
        self.register_buffer("support", torch.empty(len(self.values), device=self.A.device, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        (experts, _, d_in), d_out = self.A.shape, self.B.shape[1]
        nn.init.uniform_(self.A, -(d_in**-0.5), d_in**-0.5)
        nn.init.uniform_(self.values, -(d_in**-0.5), d_in**-0.5)
        nn.init.zeros_(self.B)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if not self.support.is_meta and not loaded(self.support):
            seeds, size = (
                [site_seed(self.seed, str(e)) for e in range(experts)],
                (d_in, d_out, len(self.support) // experts),
            )
            self.support.copy_(torch.cat([draw_support(*size, s) + e * d_out * d_in for e, s in enumerate(seeds)]))

    def weight(self) -> Tensor:
        """s B A + S, [E, d_out, d_in]."""
        dtype = autocast_dtype(self.A) or self.A.dtype
        return dense_weight(self.B.to(dtype), self.scale * self.A.to(dtype), self.values.to(dtype), self.support)

    def forward(self, x: Tensor, ends: Tensor, owners: Tensor) -> Tensor:
        y = checkpoint(lambda x: grouped(x, self.weight(), ends), x, use_reentrant=False)
        return with_bias(y, self.bias, owners)


# ---- the method


@dataclass(frozen=True, kw_only=True)
class SLTrain(Method):
    """SLTrain with its hyper-parameters; ``lorank.convert(model, SLTrain(rank=128, alpha=32))``."""

    name: ClassVar[str] = "sltrain"
    experts: ClassVar[bool] = True
    # from the authors' scripts; for 7b the paper's main table has density 0.03
    published: ClassVar[Published] = {
        "60m": {"rank": 128, "alpha": 32.0},
        "130m": {"rank": 256, "alpha": 16.0},
        "350m": {"rank": 256, "alpha": 16.0},
        "1b": {"rank": 512, "alpha": 8.0},
        "7b": {"rank": 1024, "alpha": 8.0, "density": 0.05},
    }

    rank: Rank = 0.25
    """Width r of the factors: an integer, a fraction of the width, or {pattern: either}."""
    alpha: Positive = 32.0
    """The low-rank part is multiplied by alpha / r. The paper's: 32 (60M), 16 (130M, 350M), 8 (1B, 7B)."""
    scale: Positive | None = None
    """Multiplier of the low-rank term in place of α/r, so that one setting suits all ranks and widths; `alpha` then has no effect."""
    density: Fraction = 0.03
    """Part of a matrix's entries that S may fill; 0.05 in the authors' 7B script. With 0 the layer is B A."""
    support_seed: int = 0
    """Determines, together with the projections' names, which entries these are."""

    def check(self, sites: Sequence[Site]) -> None:
        check_ranks(self.rank, sites)

    def build(self, site: Site) -> nn.Module:
        rank = rank_at(self.rank, site)
        settings: dict[str, Any] = {
            "scale": scale_at(self.alpha, self.scale, rank),
            "nnz": support_size(self.density, site.d_in, site.d_out),
            "seed": site_seed(self.support_seed, site.name),
            "bias": site.linear.bias is not None,
            **like(site.linear.weight),
        }
        if site.experts:
            return SLTrainExperts(site.experts, site.d_in, site.d_out, rank, **settings)
        return SLTrainLinear(site.d_in, site.d_out, rank, **settings)

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        if isinstance(module, SLTrainExperts):
            return module.weight(), module.bias
        assert isinstance(module, SLTrainLinear)
        A, B = module.scale * module.A.weight, module.B.weight
        return dense_weight(B, A, module.values, module.support), module.B.bias
