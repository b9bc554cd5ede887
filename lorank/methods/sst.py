"""SST: sparse spectral training. A weight lives as its full SVD: all singular values learn, and a few vector pairs at a time.

    y = U diag(S) V^T x (+ b)     x [..., d_in]   U [d_out, m]   S [m] >= 0   V [d_in, m]   m = min(d_in, d_out)

The dense weight W = U diag(S) V^T is gone, and nothing is truncated. S learns at every step. Of the m pairs (u_i, v_i)
only r = rank do, for `interval` steps (an iteration). Their gradients lack the factor S_i ("enhanced"), so that weak
directions move too; after each step they are scaled back to length one, and S is clipped at 0. Then r pairs are drawn
without replacement from p(i) = (1/m + S_i / sum S) / 2 and change places with the old ones, and the vectors' Adam moments
start from zero, under a short warm-up of the learning rate. After m/r iterations (a round) the SVD is taken again, because
vectors that learn do not stay orthogonal. Converting a dense model does not change what it computes.

Cost of one layer for n tokens: r (d_in + d_out) + m trained numbers, which alone have gradients and moments, but
m (d_in + d_out + 1) stored ones, up to twice the dense weight: SST saves optimizer state, not weights. Forward takes
2 n m (d_in + d_out) floating-point operations, backward 2 n (m + r) (d_in + d_out): 4/3 of dense for a square matrix at
small r. Its input and V^T x [n, m] are kept for backward.

Source: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", ICML 2025,
arXiv 2405.15481, as summaries of it report; neither its full text nor the authors' code was at hand. Not confirmed are
the Kaiming draw, 200 steps an iteration, m/r iterations a round and 20 steps of warm-up.

Choices where the summaries are silent. The moments of S wander with their values when pairs change places and are reset
with the SVD. Step counters are reset with the moments: under an old counter Adam's first step is three times too long.
m/r is rounded up. The run's own warm-up serves the first iteration. SVDs are taken one by one, which costs LAPACK no time
and spares memory. Weight decay of U and V acts on what is normalised next; W shrinks only if vectors (S) decay too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.optim import Adam, Optimizer

from lorank.fields import Rank
from lorank.method import Method, Published, Site, StepHook, check_table, rank_at, seeded_generator, warmup_cosine

# ---- the mathematics


def trained_numbers(d_in: int, d_out: int, r: int) -> int:
    """Of a matrix, those with gradients and moments: r pairs of vectors and all singular values.

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


def wide(tensor: Tensor) -> Tensor:
    """In single precision at least, as sums, norms and SVDs want it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def probabilities(S: Tensor) -> Tensor:
    """p(i) = (1/m + S_i / sum S) / 2 for S [m] >= 0, in double precision; uniform if S is zero.

    >>> probabilities(torch.tensor([3.0, 1.0]))
    tensor([0.6250, 0.3750], dtype=torch.float64)
    """
    S = S.detach().double()
    uniform = torch.full_like(S, 1 / len(S))
    return (uniform + (S / S.sum() if S.sum() > 0 else uniform)) / 2


def exchange(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> None:
    """Columns (or entries) i of `a` and j of `b` change places, in place; done twice it is undone."""
    a[..., i], b[..., j] = b[..., j], a[..., i]  # the right-hand sides are copies


# ---- the layer


class SSTLinear(nn.Module):
    """y = U diag(S) V^T x + b in place of a dense layer; `seed` and `key` (its name) decide which pairs learn first."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        bias: bool = False,
        enhanced: bool = True,
        seed: int = 0,
        key: str = "",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        m = min(d_in, d_out)
        new = lambda *shape: torch.empty(shape, device=device, dtype=dtype)  # noqa: E731
        self.d_in, self.d_out, self.rank, self.enhanced, self.seed, self.key = d_in, d_out, rank, enhanced, seed, key
        self.U_active, self.V_active = nn.Parameter(new(d_out, rank)), nn.Parameter(new(d_in, rank))
        self.U_frozen = nn.Parameter(new(d_out, m - rank), requires_grad=False)
        self.V_frozen = nn.Parameter(new(d_in, m - rank), requires_grad=False)
        self.S = nn.Parameter(new(m))  # active values first
        self.bias = nn.Parameter(new(d_out)) if bias else None
        self.index: Tensor
        self.register_buffer("index", torch.arange(m, device=device))  # which pair of the last SVD is at each place
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The factors of a weight drawn as nn.Linear draws it; what was loaded from a file stays."""
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.d_in**-0.5), self.d_in**-0.5)
        nn.init.constant_(self.S, -1.0)  # passes by what came from a file, which is never negative
        if not self.S.is_meta and self.S[0] < 0:
            weight = wide(self.S).new_empty(self.d_out, self.d_in)
            self.start_from(nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))

    def start_from(self, weight: Tensor) -> None:
        """Become the dense map `weight` [d_out, d_in], and draw the first active pairs."""
        self.decompose(weight)
        self.resample(seeded_generator(self.seed, 0, self.key))

    @torch.no_grad()
    def decompose(self, weight: Tensor) -> None:
        """Set the factors, in place, to the SVD of `weight`, the largest values active."""
        U, S, Vh = torch.linalg.svd(wide(weight), full_matrices=False)
        self.U_active.copy_(U[:, : self.rank])
        self.U_frozen.copy_(U[:, self.rank :])
        self.V_active.copy_(Vh[: self.rank].T)
        self.V_frozen.copy_(Vh[self.rank :].T)
        self.S.copy_(S)
        self.index.copy_(torch.arange(len(S)))

    def resample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the next active pairs and swap them in; returns the places exchanged, as `swap` takes them."""
        drawn = torch.zeros(len(self.S), dtype=torch.bool)
        drawn[torch.multinomial(probabilities(self.S.cpu()), self.rank, generator=generator)] = True
        leaving, entering = (~drawn[: self.rank]).nonzero()[:, 0], drawn[self.rank :].nonzero()[:, 0] + self.rank
        self.swap(leaving, entering)
        return leaving, entering

    @torch.no_grad()
    def swap(self, leaving: Tensor, entering: Tensor) -> None:
        """Exchange the pairs at places `leaving` (< rank) and `entering` (>= rank), in place; twice is not at all."""
        exchange(self.U_active, self.U_frozen, leaving, entering - self.rank)
        exchange(self.V_active, self.V_frozen, leaving, entering - self.rank)
        exchange(self.S, self.S, leaving, entering)
        exchange(self.index, self.index, leaving, entering)

    @torch.no_grad()
    def normalise(self) -> None:
        """Active vectors back to length one, singular values back to >= 0."""
        for vectors in (self.U_active, self.V_active):
            vectors.copy_(nn.functional.normalize(wide(vectors), dim=0))
        self.S.clamp_(min=0)

    def weight(self) -> Tensor:
        """U diag(S) V^T [d_out, d_in], in single precision at least."""
        U, V = torch.cat([self.U_active, self.U_frozen], 1), torch.cat([self.V_active, self.V_frozen], 1)
        return wide(U) * self.S @ wide(V).T

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.d_in)
        inputs: list[Tensor] = [flat, self.U_active, self.V_active]
        if torch.is_autocast_enabled(x.device.type):  # it ends before a Function's backward: types are settled here
            inputs = [tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in inputs]
        active = ActivePairs.apply(*inputs, self.S[: self.rank], self.enhanced)
        y = torch.addmm(active, flat @ self.V_frozen * self.S[self.rank :], self.U_frozen.T)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).view(*x.shape[:-1], self.d_out)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_out={self.d_out}, rank={self.rank} of {len(self.S)}, enhanced={self.enhanced}"


# ---- the method


@dataclass(frozen=True, kw_only=True)
class SST(Method):
    """SST with its hyper-parameters; ValueError for a rank, an interval or a warm-up that cannot be."""

    name: ClassVar[str] = "sst"
    # 130m and 1b (the paper's 1.3B) are Llamas in the paper; its 350m is an OPT of the same width
    published: ClassVar[Published] = {"130m": {"rank": 64}, "350m": {"rank": 64}, "1b": {"rank": 128}}

    rank: Rank = 0.125
    """Pairs that learn at a time: an integer, a fraction of the width (the paper: d/8 for widths up to 256, d/12 to d/32
    for language models), or {pattern: either}."""
    interval: int = 200
    """Steps of an iteration, after which other pairs are drawn (T3)."""
    restart_warmup_steps: int = 20
    """Steps in which the learning rate rises again at the start of an iteration; 0: none."""
    enhanced: bool = True
    """Gradients of the vectors without the factor S_i; False: the true ones."""
    seed: int = 0
    """Of the first draw, made with the layers; later draws follow the run's seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(
                f"interval={self.interval} is not a positive integer; give steps between draws, such as 200"
            )
        if not 0 <= self.restart_warmup_steps <= self.interval:
            raise ValueError(
                f"restart_warmup_steps={self.restart_warmup_steps} is not between 0 and interval={self.interval}: the "
                "learning rate would never be reached; lower it"
            )

    def check(self, sites: Sequence[Site]) -> None:
        check_table(self.rank, sites)
        for site in sites:
            if (rank := rank_at(self.rank, site)) > (m := min(site.d_in, site.d_out)):
                raise ValueError(
                    f"rank={rank} exceeds the {m} singular values of {site.role}; lower it there by a table"
                )

    def build(self, site: Site) -> nn.Module:
        weight, bias = site.linear.weight, site.linear.bias
        options = {"bias": bias is not None, "enhanced": self.enhanced, "seed": self.seed, "key": site.name}
        layer: Any = skip_init(
            SSTLinear,
            site.d_in,
            site.d_out,
            rank_at(self.rank, site),
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        if not weight.is_meta:
            layer.start_from(weight)
        if bias is not None:
            layer.bias.data.copy_(bias)
        return layer

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        assert isinstance(module, SSTLinear)
        return module.weight().to(module.S.dtype), module.bias

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook:
        if not isinstance(optimizer, Adam):
            raise ValueError(
                f"sst restarts Adam's moments between steps, which {type(optimizer).__name__} does not keep; take AdamW"
            )
        layers = [module for module in model.modules() if isinstance(module, SSTLinear)]
        return Resampling(optimizer, layers, self.interval, seed)

    def schedule(self, steps: int, warmup_steps: int, min_lr_ratio: float) -> Callable[[int], float]:
        """Cosine with warm-up, times a linear rise at the start of every iteration but the first."""

        def multiplier(step: int) -> float:
            again = step >= self.interval and step % self.interval < self.restart_warmup_steps
            rise = (step % self.interval + 1) / self.restart_warmup_steps if again else 1.0
            return rise * warmup_cosine(step, steps, warmup_steps, min_lr_ratio)

        return multiplier


# ---- between steps


class Resampling(StepHook):
    """SST's loop. Draws come after a step, when no gradient is pending, and depend on seed, iteration and layer alone:
    beyond model and optimizer there is only the step count to save."""

    def __init__(self, optimizer: Optimizer, layers: Sequence[SSTLinear], interval: int, seed: int):
        super().__init__(optimizer)
        self.layers, self.interval, self.seed = layers, interval, seed

    def before_step(self) -> None:
        if any(hasattr(layer.S, "device_mesh") for layer in self.layers):  # sharding may come after the hook
            raise ValueError("sst cannot exchange vectors that are sharded (FSDP2); train on one device or with DDP")

    @torch.no_grad()
    def after_step(self) -> None:
        for layer in self.layers:
            layer.normalise()
            if self.step % self.interval == 0:
                self._begin(layer, self.step // self.interval)

    def _begin(self, layer: SSTLinear, iteration: int) -> None:
        """The next iteration of a layer and, if the spectrum has been covered, its next round."""
        if iteration % math.ceil(len(layer.S) / layer.rank) == 0:
            layer.decompose(layer.weight())
            self._restart(layer.S)
        places = layer.resample(seeded_generator(self.seed, iteration, layer.key))
        for moment in self._state(layer.S):
            if moment.shape == layer.S.shape:  # all but the step counter
                exchange(moment, moment, *places)
        self._restart(layer.U_active)
        self._restart(layer.V_active)

    def _restart(self, parameter: Tensor) -> None:
        for value in self._state(parameter):
            value.zero_()

    def _state(self, parameter: Tensor) -> list[Tensor]:
        """What the optimizer keeps for a parameter: moments and step counter; nothing before its first step."""
        return [value for value in self.optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
