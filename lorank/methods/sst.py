"""SST: sparse spectral training. Every weight lives as its full SVD; all singular values learn, a few vector pairs at a time.

    y = U diag(S) V^T x (+ b)     x [..., d_in]   U [d_out, m]   S [m] >= 0   V [d_in, m]   m = min(d_in, d_out)

The dense weight W = U diag(S) V^T is gone and nothing is truncated. S is trained at every step. Of the m pairs (u_i, v_i)
only r = rank are, for `interval` steps (an iteration); their gradients lack the factor S_i ("enhanced"), so that weak
directions move too, and after each step they are brought back to length one and S to >= 0. Then r pairs are drawn anew
without replacement, p(i) = (1/m + S_i / sum S) / 2, and change places with the old ones; the vectors' Adam moments start
from zero, under a short warm-up of the learning rate. After m/r iterations (a round) the SVD is taken again, because
vectors that learn do not stay orthogonal. A dense layer is converted without changing what it computes.

Cost of one layer for n tokens: r (d_in + d_out) + m trained numbers, which have gradients and moments, but
m (d_in + d_out + 1) stored ones, up to twice the dense weight: SST saves optimizer state, not weights. Forward takes
2 n m (d_in + d_out) floating-point operations, backward 2 n (m + r) (d_in + d_out), together 4/3 of dense for a square
matrix at small r. The input and V^T x [n, m] are kept for backward; no gradient of W is ever formed.

Source: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", ICML 2025,
arXiv 2405.15481. The authors' code could not be reached, so nothing here is taken from or compared with it.

Choices where the paper is silent. The moments of S wander with their values when pairs change places and are reset with
the SVD. Adam's step counters are reset with the moments: zero moments under an old counter make the first step three
times too long. m/r is rounded up, for each matrix. The run's own warm-up serves the first iteration. Weight decay of U
and V shrinks what is normalised next; it reaches the size of W only if it is told to decay vectors (S) as well.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import skip_init
from torch.optim import Adam, Optimizer

from lorank.parametrization import Parametrization, Rank, Site, StepHook, check_rank, check_table, rank_at

# ---- the mathematics


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type for sums, norms and SVDs: single precision at least."""
    return torch.promote_types(dtype, torch.float32)


class SpectralMap(torch.autograd.Function):
    """x, U, V, S, and the frozen columns of U and V -> U diag(S) V^T x, all m pairs; S holds the active values first.

    With G = dY^T X, the gradient of W, backward gives diag(U^T G V) for S and, for the active vectors, G v_i and G^T u_i,
    which are the true gradients divided by S_i; `enhanced` False gives the true ones. The gradient of x is exact.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, V: Tensor, S: Tensor, U_frozen: Tensor, V_frozen: Tensor, enhanced: bool
    ) -> Tensor:
        flat, r = x.reshape(-1, x.shape[-1]), U.shape[1]
        z, z_frozen = flat @ V, flat @ V_frozen  # [n, r], [n, m - r]
        y = torch.addmm((z * S[:r]).to(z.dtype) @ U.T, (z_frozen * S[r:]).to(z.dtype), U_frozen.T)
        ctx.save_for_backward(x, U, V, S, U_frozen, V_frozen, z, z_frozen)
        ctx.enhanced = enhanced
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, U, V, S, U_frozen, V_frozen, z, z_frozen = ctx.saved_tensors
        flat, dy, r = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), U.shape[1]
        p, p_frozen = dy @ U, dy @ U_frozen  # [n, r], [n, m - r]
        dz = (p * S[:r]).to(p.dtype)
        dx = torch.addmm(dz @ V.T, (p_frozen * S[r:]).to(p.dtype), V_frozen.T).view_as(x)
        total = wide(p.dtype)
        dS = torch.cat([(p * z).sum(0, dtype=total), (p_frozen * z_frozen).sum(0, dtype=total)]).to(S.dtype)
        dU = dy.T @ (z if ctx.enhanced else (z * S[:r]).to(z.dtype))
        dV = flat.T @ (p if ctx.enhanced else dz)
        return dx, dU, dV, dS, None, None, None


def probabilities(S: Tensor) -> Tensor:
    """p(i) = (1/m + S_i / sum S) / 2 for S [m] >= 0, in double precision; uniform where S is zero.

    >>> probabilities(torch.tensor([3.0, 1.0]))
    tensor([0.6250, 0.3750], dtype=torch.float64)
    """
    S = S.detach().double()
    uniform = torch.full_like(S, 1 / len(S))
    return (uniform + (S / S.sum() if S.sum() > 0 else uniform)) / 2


def generator(seed: int, iteration: int, key: str) -> torch.Generator:
    """Random numbers of one layer (`key`) in one iteration, whatever was drawn before and elsewhere."""
    digest = hashlib.sha256(f"{seed} {iteration} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def exchange(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> None:
    """Columns (or entries) i of `a` and j of `b` change places, in place; done twice it is undone."""
    a[..., i], b[..., j] = b[..., j], a[..., i]  # indexing by tensors copies, so both sides are read before either is set


# ---- the layer


class SSTLinear(nn.Module):
    """y = U diag(S) V^T x + b in place of a dense layer; `seed` and `key`, its name, decide which pairs learn first."""

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
        self.S = nn.Parameter(new(m))
        self.bias = nn.Parameter(new(d_out)) if bias else None
        self.index: Tensor
        self.register_buffer("index", torch.arange(m, device=device))  # the pair, in order of the SVD, at each place
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The SVD of a weight drawn as nn.Linear draws it; factors that were loaded from a file stay."""
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.d_in**-0.5), self.d_in**-0.5)
        nn.init.constant_(self.S, -1.0)  # no singular value is negative: this one was not loaded
        if self.S.is_meta or self.S[0] >= 0:
            return
        weight = torch.empty(self.d_out, self.d_in, device=self.S.device, dtype=wide(self.S.dtype))
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.start_from(weight)

    def start_from(self, weight: Tensor) -> None:
        """Become the dense map `weight` [d_out, d_in], with the first active pairs drawn."""
        self.decompose(weight)
        self.resample(generator(self.seed, 0, self.key))

    @torch.no_grad()
    def decompose(self, weight: Tensor) -> None:
        """Set the factors, in place, to the SVD of `weight`, the largest values active."""
        U, S, Vh = torch.linalg.svd(weight.to(wide(weight.dtype)), full_matrices=False)
        for whole, active, frozen in ((U, self.U_active, self.U_frozen), (Vh.T, self.V_active, self.V_frozen)):
            active.copy_(whole[:, : self.rank])
            frozen.copy_(whole[:, self.rank :])
        self.S.copy_(S)
        self.index.copy_(torch.arange(len(S)))

    @torch.no_grad()
    def resample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the next active pairs and swap them in; the places that were exchanged, (active, frozen)."""
        drawn = torch.zeros(len(self.S), dtype=torch.bool)
        drawn[torch.multinomial(probabilities(self.S.cpu()), self.rank, generator=generator)] = True
        leaving, entering = (~drawn[: self.rank]).nonzero()[:, 0], drawn[self.rank :].nonzero()[:, 0] + self.rank
        self.swap(leaving, entering)
        return leaving, entering

    @torch.no_grad()
    def swap(self, leaving: Tensor, entering: Tensor) -> None:
        """Exchange the pairs at places `leaving` (< rank) with those at `entering` (>= rank), in place; an involution."""
        exchange(self.U_active, self.U_frozen, leaving, entering - self.rank)
        exchange(self.V_active, self.V_frozen, leaving, entering - self.rank)
        exchange(self.S, self.S, leaving, entering)
        exchange(self.index, self.index, leaving, entering)

    @torch.no_grad()
    def normalise(self) -> None:
        """Active vectors back to length one, singular values back to >= 0."""
        for vectors in (self.U_active, self.V_active):
            vectors.copy_(nn.functional.normalize(vectors.to(wide(vectors.dtype)), dim=0))
        self.S.clamp_(min=0)

    def weight(self) -> Tensor:
        """U diag(S) V^T [d_out, d_in], single precision at least."""
        U, V = torch.cat([self.U_active, self.U_frozen], 1), torch.cat([self.V_active, self.V_frozen], 1)
        dtype = wide(self.S.dtype)
        return (U.to(dtype) * self.S) @ V.T.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        factors = [x, self.U_active, self.V_active, self.S, self.U_frozen, self.V_frozen]
        if torch.is_autocast_enabled(x.device.type):  # backward runs outside of autocast, so the types are settled here
            dtype = torch.get_autocast_dtype(x.device.type)
            factors = [factor if factor is self.S else factor.to(dtype) for factor in factors]
        y = SpectralMap.apply(*factors, self.enhanced)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_out={self.d_out}, rank={self.rank} of {len(self.S)}, enhanced={self.enhanced}"


# ---- the method


@dataclass(frozen=True, kw_only=True)
class SST(Parametrization):
    """SST with its hyper-parameters; ValueError for a rank or an interval that cannot be."""

    name: ClassVar[str] = "sst"

    rank: Rank = 0.125
    """Pairs that learn at a time: an integer, a fraction of the width, or {pattern: either}. The paper: d/8 at widths
    up to 256; 64/768 to 128/2048 for language models."""
    interval: int = 200
    """Steps of an iteration (the paper's T3), after which other pairs are drawn."""
    restart_warmup_steps: int = 20
    """Steps over which the learning rate rises again at the start of an iteration; 0: none."""
    enhanced: bool = True
    """Gradients of the vectors without the factor S_i; False: the true ones."""
    seed: int = 0
    """Of the first draw, made when a model is converted; later draws follow the run's seed."""

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if self.interval < 1:
            raise ValueError(f"interval={self.interval} is not positive; give the steps between two draws, such as 200")
        if not 0 <= self.restart_warmup_steps < self.interval:
            raise ValueError(
                f"restart_warmup_steps={self.restart_warmup_steps} is not in [0, interval={self.interval}); the learning rate "
                "would never be reached"
            )

    def check(self, sites: Sequence[Site]) -> None:
        check_table(self.rank, sites)
        for site in sites:
            if rank_at(self.rank, site) > min(site.d_in, site.d_out):
                raise ValueError(
                    f"rank={rank_at(self.rank, site)} exceeds the {min(site.d_in, site.d_out)} singular values of {site.role}; "
                    "lower it, or give a fraction or a table"
                )

    def build(self, site: Site) -> nn.Module:
        dense = site.linear
        layer = skip_init(
            SSTLinear,
            site.d_in,
            site.d_out,
            rank_at(self.rank, site),
            bias=dense.bias is not None,
            enhanced=self.enhanced,
            seed=self.seed,
            key=site.name,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        if not dense.weight.is_meta:
            layer.start_from(dense.weight)
            if dense.bias is not None:
                layer.bias.data.copy_(dense.bias)
        return layer

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        assert isinstance(module, SSTLinear)
        return module.weight().to(module.S.dtype), module.bias

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook:
        if not isinstance(optimizer, Adam):
            raise ValueError(
                f"sst resets the moments of Adam between steps, which {type(optimizer).__name__} does not keep; "
                "use torch.optim.AdamW"
            )
        layers = [module for module in model.modules() if isinstance(module, SSTLinear)]
        if any(isinstance(layer.S, DTensor) for layer in layers):
            raise ValueError("sst cannot exchange vectors that are sharded (FSDP2); use one device or DDP")
        return Resampling(optimizer, layers, self.interval, seed)

    def schedule(self, steps: int, warmup_steps: int, min_lr_ratio: float) -> Callable[[int], float]:
        """Cosine with warm-up, as without a method, times a linear rise at the start of every iteration but the first."""

        def multiplier(step: int) -> float:
            if step < warmup_steps:
                cosine = step / warmup_steps
            else:
                progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
                cosine = min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
            if step < self.interval or not self.restart_warmup_steps:
                return cosine
            return cosine * min(1.0, (step % self.interval + 1) / self.restart_warmup_steps)

        return multiplier


# ---- between steps


class Resampling(StepHook):
    """SST's loop. Draws are made after a step, when no gradient is pending, and depend on seed, iteration and layer
    alone: the step count is all there is to remember."""

    def __init__(self, optimizer: Optimizer, layers: Sequence[SSTLinear], interval: int, seed: int):
        super().__init__(optimizer)
        self.layers, self.interval, self.seed = layers, interval, seed

    @torch.no_grad()
    def after_step(self) -> None:
        for layer in self.layers:
            layer.normalise()
            if self.step % self.interval == 0:
                self._begin(layer, self.step // self.interval)

    def _begin(self, layer: SSTLinear, iteration: int) -> None:
        """The next iteration of a layer and, every m/r of them, a new round."""
        if iteration % math.ceil(len(layer.S) / layer.rank) == 0:
            layer.decompose(layer.weight())
            for state in self._state(layer.S):
                state.zero_()
        leaving, entering = layer.resample(generator(self.seed, iteration, layer.key))
        for moment in self._state(layer.S):
            if moment.shape == layer.S.shape:  # not the step counter
                exchange(moment, moment, leaving, entering)
        for vectors in (layer.U_active, layer.V_active):
            for state in self._state(vectors):
                state.zero_()

    def _state(self, parameter: Tensor) -> list[Tensor]:
        """The optimizer's tensors for a parameter: moments and step counter; none before its first step."""
        return [value for value in self.optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
