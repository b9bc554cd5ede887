"""SwitchLoRA: a frozen dense weight and factors whose vectors are exchanged, a few a step, for others of a large pool.

    y = W x + (1/r) B A x (+ b)            x [..., d_in]   A [r, d_in]   B [d_out, r]   W [d_out, d_in] frozen

W starts as W_0 - (1/r) B A, so the model starts as the dense one, W_0. Rows of A come from a pool C_A [c, d_in] and
columns of B from C_B [c, d_out], c = min(d_in, d_out). Exchanging row a_i for candidate c_j keeps the function:

    W <- W + (1/r) B[:, i] (a_i - c_j)^T,   C_A[old j] <- a_i,   A[i] <- c_j

and likewise for B. The counterpart, column i of B, loses its Adam moments and step counter, which belong to the old
a_i, and is frozen for five updates; c_j keeps the moments of a_i, for its gradient depends on the counterpart alone.
At step s of T about r θ(s) / 40 vectors of each factor are exchanged, with θ falling to 0.3 at T / 10.

Cost of a layer: r (d_in + d_out) trained parameters and d_in d_out frozen ones, beside c (d_in + d_out) numbers of the
pools, in host memory unless told otherwise. For n tokens 2 n d_in d_out operations more than low-rank forward and as
many backward; k exchanges of a factor cost 2 k d_in d_out, once a step. `lorank.merge` gives W + (1/r) B A.

Source: "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information", arXiv 2406.06564, and the authors'
repository asfsdsf/SwitchLoRA.

Departures from the authors' code. All projections of the blocks are converted, whatever their names; a bias is trained.
Pools and choices come from seeded generators, so that a run can be resumed. Vectors are chosen by the pointers in
discontinuous mode, too; only their successors are drawn. Not here: the LoRA-style start, the raised learning rate
after exchanges (off in theirs). A layer with r = 1 or r >= c exchanges nothing.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.layers import linear
from lorank.optim.adamw import VectorAdamW, vector_state
from lorank.parametrization import Parametrization, Rank, Site, StepHook, check_rank, check_ranks, rank_at

Frequency = Literal["exponential", "z"]
Mode = Literal["continuous", "discontinuous"]


# ---- the mathematics


def entry_std(d_in: int, d_out: int, rank: int) -> tuple[float, float]:
    """Standard deviations of A's and B's entries: those of (1/r) B A get Kaiming's (3 d_in)^(-1/2), and B dA and dB A
    are of equal size.

    >>> [round(std, 6) for std in entry_std(1024, 2736, 256)]
    [0.607515, 0.475174]
    """
    gain = 3**-0.5  # of a leaky ReLU with slope √5
    return (d_out**0.5 * rank / d_in**1.5) ** 0.25 * gain**0.5, (rank / (d_in * d_out) ** 0.5) ** 0.25 * gain**0.5


def theta(step: int, steps: int, ratio: float, frequency: Frequency) -> float:
    """How often vectors are exchanged at a step, as a fraction of the highest frequency.

    >>> round(theta(3999, 40_000, 0.1, "exponential"), 6), theta(4000, 40_000, 0.1, "z")
    (0.3, 0.5)
    """
    turn = ratio * steps
    if frequency == "exponential":
        return max(0.3 ** ((step + 1) / turn), 1e-8)
    return 0.5 - 0.5 * math.tanh(5 * (step - turn) / turn)  # 1 - 1 / (1 + exp(-(10 / turn) (step - turn)))


@torch.no_grad()
def exchange_(W: Tensor, vectors: Tensor, partners: Tensor, rows: Tensor, new: Tensor) -> None:
    """vectors[rows] <- new, in place, with W + (1/r) partners^T vectors as before.

    W [p, q], vectors [r, q], partners [r, p], rows [k], new [k, q]; for columns of B, all but `rows` transposed.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    difference = vectors[rows].to(wide) - new.to(wide)  # [k, q]
    W.add_(partners[rows].to(wide).T @ difference, alpha=1 / len(vectors))
    vectors[rows] = new


def generator(*seeds: object) -> torch.Generator:
    """A generator of its own for everything that is drawn, so that nothing of it needs to be saved."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---- the layer


class SwitchLoRALinear(nn.Module):
    """y = W x + (1/r) B A x + b; `dense` becomes W, and what is taken out of its weight keeps the function."""

    def __init__(self, dense: nn.Linear, rank: int):
        super().__init__()
        weight = dense.weight
        self.W = dense
        self.A = nn.Linear(dense.in_features, rank, bias=False, device=weight.device, dtype=weight.dtype)
        self.B = linear(rank, dense.out_features, bias=False, device=weight.device, dtype=weight.dtype)
        weight.requires_grad_(False)
        self._draw()
        self._take_out()

    def reset_parameters(self) -> None:
        """Draw A and B and take their product out of W, which is expected to be the dense W_0."""
        self._draw()
        if not getattr(self.W.weight, "_is_hf_initialized", False):  # transformers' mark: from a file, already without
            self._take_out()

    def _draw(self) -> None:
        stds = entry_std(self.W.in_features, self.W.out_features, self.A.out_features)
        for factor, std in zip((self.A, self.B), stds, strict=True):
            nn.init.uniform_(factor.weight, -(3**0.5) * std, 3**0.5 * std)

    @torch.no_grad()
    def _take_out(self) -> None:
        self.W.weight.sub_(self.product())

    def product(self) -> Tensor:
        """(1/r) B A [d_out, d_in], at least in single precision."""
        wide = torch.promote_types(self.W.weight.dtype, torch.float32)
        return self.B.weight.to(wide) @ self.A.weight.to(wide) / self.A.out_features

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.W(x), self.B(self.A(x)), alpha=1 / self.A.out_features)


# ---- the method


@dataclass(frozen=True, kw_only=True)
class SwitchLoRA(Parametrization):
    """SwitchLoRA with its hyper-parameters; ``lorank.convert(model, SwitchLoRA(rank=256))``.

    Raises ValueError for a rank or ratio that is not positive, negative freeze_steps, an interval below twice
    freeze_steps, and unknown names.
    """

    name: ClassVar[str] = "switchlora"
    adamw: ClassVar[type[Optimizer] | None] = VectorAdamW

    rank: Rank = 0.25
    """Vectors of each factor: an integer, a fraction of the width (the paper's d/4), or {pattern: either}."""
    interval: float = 40
    """Steps between two exchanges of one position while the frequency is highest; at first r / interval are exchanged."""
    ratio: float = 0.1
    """Fraction of the run after which the frequency is down to 0.3 ("exponential") or half ("z") of the highest."""
    frequency: Frequency = "exponential"
    """How it falls: 0.3^((s+1) / (ratio T)), or a sigmoid in the shape of a Z."""
    mode: Mode = "continuous"
    """Which candidates come next: all in turn, or drawn from those not in use."""
    freeze_steps: int = 5
    """Updates for which the counterpart of an exchanged vector rests."""
    offload: bool = True
    """Keep the pools in host memory; otherwise they are on the layer's device."""

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if self.frequency not in get_args(Frequency):
            raise ValueError(f"frequency={self.frequency!r} is none of {', '.join(get_args(Frequency))}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} is none of {', '.join(get_args(Mode))}")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio} is not positive; the authors' is 0.1")
        if self.freeze_steps < 0:
            raise ValueError(f"freeze_steps={self.freeze_steps} is negative; the authors' is 5, none is 0")
        if not max(1, 2 * self.freeze_steps) <= self.interval < math.inf:
            raise ValueError(
                f"interval={self.interval} is below {max(1, 2 * self.freeze_steps)}, twice freeze_steps={self.freeze_steps} "
                "and at least 1: vectors would be exchanged before they have trained; raise it or freeze for fewer steps"
            )

    def check(self, sites: Sequence[Site]) -> None:
        check_ranks(self.rank, sites)

    def build(self, site: Site) -> nn.Module:
        return SwitchLoRALinear(_own(site.linear), rank_at(self.rank, site))

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        assert isinstance(module, SwitchLoRALinear)
        weight = module.W.weight
        return (weight + module.product()).to(weight.dtype), module.W.bias

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook:
        return SwitchLoRAHook(self, model, optimizer, steps=steps, seed=seed)


def _own(dense: nn.Linear) -> nn.Linear:
    """The layer with memory of its own: parts of a fused matrix are views, which may not be written to a file."""
    for name, value in list(dense.named_parameters()):
        if not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes:
            copied = value.detach().clone(memory_format=torch.contiguous_format)
            setattr(dense, name, nn.Parameter(copied, requires_grad=value.requires_grad))
    return dense


# ---- between steps


class Pool(NamedTuple):
    """Of one factor, whose vectors count as rows [r, width]: its candidates, and what became of those in use."""

    candidates: Tensor
    """[c, width]; what one in use has learned is noted when it is put away."""
    selected: Tensor
    """[r], the candidate that each vector is."""
    pointer: Tensor
    """The vector to be exchanged next."""
    frozen: Tensor
    """[r], updates for which each vector still rests."""

    def exchange(self, rows: Tensor, vectors: Tensor, draw: torch.Generator | None) -> Tensor:
        """Put the vectors at `rows` away and hand out others: the candidates next in turn or, with `draw`, any."""
        c, r = len(self.candidates), len(self.selected)
        self.candidates[self.selected[rows]] = vectors.to(self.candidates.device)
        chosen = (self.selected[rows[0] - 1] + 1 + torch.arange(len(rows))) % c
        if draw is not None:
            chosen = torch.multinomial(torch.ones(c).index_fill_(0, self.selected, 0), len(rows), generator=draw)
        self.selected[rows] = chosen
        self.pointer.copy_((rows[-1] + 1) % r)
        return self.candidates[chosen].to(vectors.device)


class SwitchLoRAHook(StepHook):
    """Before each step: exchange vectors of A, then of B, and hold those still whose counterpart is new."""

    def __init__(self, method: SwitchLoRA, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int):
        self.method, self.steps, self.seed = method, steps, seed
        layers = {name: module for name, module in model.named_modules() if isinstance(module, SwitchLoRALinear)}
        _check_optimizer(optimizer, layers)
        super().__init__(optimizer)
        self.layers = {n: layer for n, layer in layers.items() if layer.A.out_features < min(layer.W.weight.shape)}
        self.pools = {name: self._pools(name, layer) for name, layer in self.layers.items()}

    def _pools(self, name: str, layer: SwitchLoRALinear) -> tuple[Pool, Pool]:
        def pool(factor: str, weight: Tensor, std: float, start: int) -> Pool:
            (r, width), bound = weight.shape, 3**0.5 * std
            draw = generator(self.seed, name, factor)
            candidates = torch.empty(c, width, device="cpu").uniform_(-bound, bound, generator=draw)
            candidates = candidates.to("cpu" if self.method.offload else weight.device, weight.dtype)
            selected = torch.arange(c - r, c).roll(start)  # the last is before the pointer: the first is next
            return Pool(candidates, selected, torch.tensor(start), torch.zeros(r, dtype=torch.int64))

        c, r = min(layer.W.weight.shape), layer.A.out_features
        std_A, std_B = entry_std(layer.W.in_features, layer.W.out_features, r)
        return pool("A", layer.A.weight, std_A, 0), pool("B", layer.B.weight.T, std_B, r // 2)

    @torch.no_grad()
    def before_step(self) -> None:
        draw = generator(self.seed, self.step)
        for name, layer in self.layers.items():
            count = self._count(*self.pools[name], draw)
            for factor in (0, 1) if count else ():
                self._exchange(layer, self.pools[name], factor, count, draw)
            for factor, weight in enumerate((layer.A.weight, layer.B.weight)):
                frozen = self.pools[name][factor].frozen
                if weight.grad is not None and frozen.any():
                    weight.grad.transpose(0, factor)[(frozen > 0).to(weight.device)] = 0
                frozen.sub_(1).clamp_(min=0)

    def _count(self, a: Pool, b: Pool, draw: torch.Generator) -> int:
        """How many vectors to exchange: r θ / interval, rounded at random, and no more than there is room for."""
        r, c = len(a.selected), len(a.candidates)
        mean = r / self.method.interval * theta(self.step, self.steps, self.method.ratio, self.method.frequency)
        count = math.floor(mean + torch.rand((), generator=draw).item())
        # behind A's pointer lie the frozen columns of B, which B's pointer must not reach, and the other way round
        for leader, follower in ((a, b), (b, a)):
            behind = leader.pointer - (follower.frozen > 0).sum()
            count = min(count, int((behind - follower.pointer) % r))
        return count if self.method.mode == "continuous" else min(count, c - r)

    def _exchange(
        self, layer: SwitchLoRALinear, pools: tuple[Pool, Pool], factor: int, count: int, draw: torch.Generator
    ) -> None:
        """`count` rows of A (`factor` 0) or columns of B (1)."""
        both = (layer.A.weight, layer.B.weight.T)  # both [r, ...]
        pool, vectors, partners = pools[factor], both[factor], both[1 - factor]
        rows = (pool.pointer + torch.arange(count)) % len(vectors)
        here = rows.to(vectors.device)
        new = pool.exchange(rows, vectors[here], None if self.method.mode == "continuous" else draw)
        exchange_(layer.W.weight.transpose(0, factor), vectors, partners, here, new)
        pools[1 - factor].frozen[rows] = self.method.freeze_steps
        counterpart = layer.A.weight if factor else layer.B.weight
        shape = (len(vectors), 1) if factor else (1, len(vectors))
        for value in vector_state(self.optimizer, counterpart, shape).values():
            value.transpose(0, 1 - factor)[here] = 0

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{factor}.{field}": value
            for name, pools in self.pools.items()
            for factor, pool in zip("AB", pools, strict=True)
            for field, value in pool._asdict().items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), **self._tensors()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        for name, value in self._tensors().items():
            value.copy_(state[name])


def _check_optimizer(optimizer: Optimizer, layers: Mapping[str, SwitchLoRALinear]) -> None:
    if not isinstance(optimizer, VectorAdamW):
        raise ValueError(
            f"switchlora resets single vectors in an optimizer's state, which {type(optimizer).__name__} cannot; take "
            "lorank.optim.adamw.VectorAdamW"
        )
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        for factor in (layer.A.weight, layer.B.weight):
            if id(factor) not in moved:
                raise ValueError(
                    f"the optimizer lacks the factors of {name}; give it all parameters that require gradients"
                )
            if hasattr(factor, "device_mesh"):
                raise ValueError(
                    f"the factors of {name} are sharded, and switchlora exchanges whole vectors of them; replicate them (DDP)"
                )
