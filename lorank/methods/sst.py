"""SST: sparse spectral training. A weight lives as its full SVD; all singular values learn, and a few vector pairs at a time.

    y = U diag(S) V^T x (+ b)     x [..., d_in]   U [d_out, m]   S [m] >= 0   V [d_in, m]   m = min(d_in, d_out)

Saves: gradients, optimizer state.

There is no dense weight W = U diag(S) V^T, and nothing is truncated. S learns at every step. Of the m pairs (u_i, v_i)
only r = rank do, for `interval` steps (an iteration). Their gradients lack the factor S_i ("enhanced"), so that weak
directions move too. After each step they are scaled back to length one, and S is clipped at 0. Then r pairs are drawn
without replacement from p(i) = ε/m + (1 - ε) S_i / sum S, ε = 1/2, and exchanged for the old ones, and the vectors'
moments start from zero, under a short warm-up of the learning rate. After m/r iterations (a round) the SVD is computed
again, because trained vectors do not stay orthogonal. A converted model computes what it did.

Cost of one layer for n tokens: r (d_in + d_out) + m trained numbers, which alone have gradients and moments, but
m (d_in + d_out + 1) stored ones, up to twice the dense weight. Forward needs 2 n m (d_in + d_out) operations, backward
2 n (m + r) (d_in + d_out): 4/3 of dense for a square matrix at small r. The input and V^T x [n, m] are kept for the backward
pass. If the factors have 16 bits, 2 d_in d_out bytes more keep what rounding takes from W at SVDs (`lorank.rounding`).

Source: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", ICML 2025,
arXiv 2405.15481, as summaries report it; we had neither its full text nor the authors' code. Not confirmed are the
Kaiming draw, 200 steps an iteration, m/r iterations a round and 20 steps of warm-up.

Choices where the summaries are silent. The moments of S move with their values when pairs are exchanged and are reset
with the SVD. Step counters are reset with the moments: under an old counter Adam's first step is three times too long.
The run's own warm-up serves the first iteration. Weight decay of U and V acts on what is normalised next; W shrinks only
if vectors (S) decay too. Any optimizer of whole parameters will do (`lorank.moments`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.fields import Count, Fraction, Rank, Whole
from lorank.layers import SpectralLinear, autocast_dtype, exchange, loaded, wide
from lorank.method import Method, Published, Site, StepHook, check_table, rank_at, seeded_generator, warmup_cosine
from lorank.moments import moments, restart

# ---- the mathematics


def trained_numbers(d_in: int, d_out: int, r: int) -> int:
    """Numbers of a matrix with gradients and moments: r pairs of vectors and all singular values.

    >>> trained_numbers(768, 768, 64)
    99072
    """
    return r * (d_in + d_out) + min(d_in, d_out)


class ActivePairs(torch.autograd.Function):
    """x [n, d_in], U [d_out, r], V [d_in, r], S [r] -> U diag(S) V^T x [n, d_out].

    With G = dY^T X, the gradient of W, backward gives G v_i for u_i and G^T u_i for v_i, the true gradients divided by
    S_i (`enhanced` False: the true ones). Those of S, u_i^T G v_i, and of x are exact. G itself is not formed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, V: Tensor, S: Tensor, enhanced: bool) -> Tensor:
        z = x @ V  # [n, r]
        ctx.save_for_backward(x, U, V, S, z)
        ctx.enhanced = enhanced
        return (z * S).to(z.dtype) @ U.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, U, V, S, z = ctx.saved_tensors
        p = dy @ U  # [n, r]
        dz = (p * S).to(p.dtype)
        dU = dy.T @ (z if ctx.enhanced else (z * S).to(z.dtype))
        dV = x.T @ (p if ctx.enhanced else dz)
        return dz @ V.T, dU, dV, wide(p * z).sum(0).to(S.dtype), None


def probabilities(S: Tensor, exploration: float = 0.5) -> Tensor:
    """p(i) = ε/m + (1 - ε) S_i / sum S > 0 for S [m] >= 0, in double precision; uniform if S is zero.

    >>> probabilities(torch.tensor([3.0, 1.0]))
    tensor([0.6250, 0.3750], dtype=torch.float64)
    """
    S = S.detach().double() if S.sum() > 0 else torch.ones_like(S, dtype=torch.float64)
    p = exploration / len(S) + (1 - exploration) * (S / S.sum())
    return p.clamp(min=1e-30)  # any number of pairs can be drawn


# ---- the layer


class SSTLinear(SpectralLinear):
    """y = U diag(S) V^T x + b instead of a dense layer; `seed` and `key` (its name) decide which pairs learn first."""

    def __init__(
        self, *sizes: int, enhanced: bool = True, exploration: float = 0.5, seed: int = 0, key: str = "", **options: Any
    ):
        super().__init__(*sizes, **options)
        self.enhanced, self.exploration, self.seed, self.key = enhanced, exploration, seed, key
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The factors of a weight drawn as nn.Linear draws it, unless they came from a file."""
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.d_in**-0.5), self.d_in**-0.5)
        factors = (self.U_active, self.U_frozen, self.S, self.V_active, self.V_frozen, self.index)
        if not self.S.is_meta and not all(loaded(factor) for factor in factors if factor.numel()):
            weight = wide(self.S).new_empty(self.d_out, self.d_in)
            self.start_from(nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))

    def start_from(self, weight: Tensor) -> None:
        """Become the dense map `weight` [d_out, d_in], and draw the first active pairs."""
        self.decompose(weight)
        self.resample(seeded_generator(self.seed, 0, self.key))

    def resample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the next active pairs and swap them in; returns the places exchanged, the arguments of `swap`."""
        drawn = torch.zeros(len(self.S), dtype=torch.bool)
        p = probabilities(self.S.cpu(), self.exploration)
        drawn[torch.multinomial(p, self.rank, generator=generator)] = True
        leaving, entering = (~drawn[: self.rank]).nonzero()[:, 0], drawn[self.rank :].nonzero()[:, 0] + self.rank
        self.swap(leaving, entering)
        return leaving, entering

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.d_in)
        inputs: list[Tensor] = [flat, self.U_active, self.V_active]
        if (dtype := autocast_dtype(x)) is not None:  # not in a Function's backward: cast here
            inputs = [tensor.to(dtype) for tensor in inputs]
        active = ActivePairs.apply(*inputs, self.S[: self.rank], self.enhanced)
        y = torch.addmm(active, flat @ self.V_frozen * self.S[self.rank :], self.U_frozen.T)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).view(*x.shape[:-1], self.d_out)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, enhanced={self.enhanced}"


# ---- the method


@dataclass(frozen=True, kw_only=True)
class SST(Method):
    """SST with its hyper-parameters."""

    name: ClassVar[str] = "sst"
    keeps_outputs: ClassVar[bool] = True
    # 130m and 1b (the paper's 1.3B) are Llamas in the paper; its 350m is an OPT of the same width
    published: ClassVar[Published] = {"130m": {"rank": 64}, "350m": {"rank": 64}, "1b": {"rank": 128}}
    soon: ClassVar[Mapping[str, Any]] = {"interval": 2, "restart_warmup_steps": 1}

    rank: Rank = 0.125
    """Pairs that learn at a time: an integer, a fraction of the width (the paper: d/8 to d/32), or {pattern: either}."""
    interval: Count = 200
    """Steps of an iteration, after which other pairs are drawn (T3)."""
    restart_warmup_steps: Whole = 20
    """Steps in which the learning rate rises again at the start of an iteration; 0: none."""
    iterations_per_round: Count | None = None
    """Iterations after which the SVD is computed again (T2). None: m/r, rounded up."""
    exploration: Fraction = 0.5
    """ε, the part of the draws that is uniform; with 0 they are in proportion to the singular values alone."""
    enhanced: bool = True
    """Gradients of the vectors without the factor S_i; False: the true ones."""
    normalise: bool = True
    """Whether trained vectors are scaled back to length one after each step. S is clipped at 0 in either case."""
    seed: int = 0
    """Seed of the first draw, made with the layers; later draws follow the run's seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart_warmup_steps > self.interval:
            raise ValueError(
                f"restart_warmup_steps must be at most interval={self.interval}, or the full learning rate is never reached, "
                f"got {self.restart_warmup_steps}"
            )

    def check(self, sites: Sequence[Site]) -> None:
        check_table(self.rank, sites)
        for site in sites:
            if (rank := rank_at(self.rank, site)) > (m := min(site.d_in, site.d_out)):
                raise ValueError(
                    f"rank must be at most {m}, the number of singular values of {site.role}, got {rank}; lower it or use a table"
                )

    def build(self, site: Site) -> nn.Module:
        weight, bias = site.linear.weight, site.linear.bias
        draws: Any = {"enhanced": self.enhanced, "exploration": self.exploration, "seed": self.seed, "key": site.name}
        options: Any = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
        layer: Any = SSTLinear(site.d_in, site.d_out, rank_at(self.rank, site), **draws, **options)
        layer.to_empty(device=weight.device)  # nothing is drawn
        if not weight.is_meta:
            layer.start_from(weight)
        if bias is not None:
            layer.bias.data.copy_(bias)
        return layer

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        assert isinstance(module, SSTLinear)
        return module.weight().to(module.S.dtype), module.bias

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook:
        return SSTHook(self, optimizer, [m for m in model.modules() if isinstance(m, SSTLinear)], seed)

    def schedule(self, steps: int, warmup_steps: int, min_lr_ratio: float) -> Callable[[int], float]:
        """Cosine with warm-up, times a linear rise at the start of every iteration but the first."""

        def multiplier(step: int) -> float:
            again = step >= self.interval and step % self.interval < self.restart_warmup_steps
            rise = (step % self.interval + 1) / self.restart_warmup_steps if again else 1.0
            return rise * warmup_cosine(step, steps, warmup_steps, min_lr_ratio)

        return multiplier


# ---- between steps


class SSTHook(StepHook):
    """SST's loop. Draws come when no gradient is pending, and need not be saved: seed, iteration and layer decide them."""

    def __init__(self, method: SST, optimizer: Optimizer, layers: Sequence[SSTLinear], seed: int):
        super().__init__(optimizer, layers)
        self.method, self.layers, self.seed = method, layers, seed

    @torch.no_grad()
    def after_step(self) -> None:
        for layer in self.layers:
            if self.method.normalise:
                layer.normalise()
            else:
                layer.S.clamp_(min=0)
            if self.step == 1:
                for moved in (layer.S, layer.U_active, layer.V_active):
                    moments(self.optimizer, moved)  # raises now rather than at the first exchange
            if self.step % self.method.interval == 0:
                self._begin(layer, self.step // self.method.interval)

    def _begin(self, layer: SSTLinear, iteration: int) -> None:
        """The next iteration of a layer and, if it is time, its next round."""
        if iteration % (self.method.iterations_per_round or math.ceil(len(layer.S) / layer.rank)) == 0:
            exact = self.rests.exact(layer.key, layer.weight())
            layer.decompose(exact)
            self.rests.settle(layer.key, exact, layer.weight(), layer.S.dtype)
            restart(self.optimizer, layer.S)
        places = layer.resample(seeded_generator(self.seed, iteration, layer.key))
        for moment in moments(self.optimizer, layer.S):
            exchange(moment, moment, *places)
        restart(self.optimizer, layer.U_active)
        restart(self.optimizer, layer.V_active)
