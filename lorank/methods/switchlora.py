"""SwitchLoRA: a frozen dense weight plus factors; at each step a few of their vectors are exchanged for others from a pool.

    y = W x + (α/r) B A dropout(x) (+ b)   x [..., d_in]   A [r, d_in]   B [d_out, r]   W [d_out, d_in] frozen   α = 1

Saves: gradients, optimizer state.

W starts as W_0 - (1/r) B A, so that the model starts as the dense one, W_0. Rows of A come from a pool C_A [c, d_in],
columns of B from C_B [c, d_out], c = min(d_in, d_out). Exchanging row a_i of A for candidate c_j keeps the function:

    W <- W + (1/r) B[:, i] (a_i - c_j)^T,   C_A[old j] <- a_i,   A[i] <- c_j                                       (1)

and likewise for B. The counterpart, column i of B, loses its Adam moments and step counter, which belong to the old a_i,
and is not updated for five steps. c_j keeps the moments of a_i, because its gradient depends on the counterpart alone. At
step s of T about r θ(s) / 40 vectors of each factor are exchanged, and θ falls to 0.3 by T / 10.

Cost of a layer: r (d_in + d_out) trained parameters and d_in d_out frozen ones; pools of c (d_in + d_out) numbers, in
host memory. For n tokens 2 n (d_in d_out + r (d_in + d_out)) operations forward; backward the first term once more,
the second twice. Exchanging k vectors of a factor costs 2 k d_in d_out, once a step. Merged, it is dense, W + (1/r) B A.
If W has 16 bits, what rounding takes at exchanges is kept too (`lorank.rounding`), another 2 d_in d_out bytes.

Source: "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information", arXiv 2406.06564; asfsdsf/SwitchLoRA.

Departures from the authors' code. All projections are converted, whatever their names; biases train. Seeded generators
draw pools and choices, so a run resumes exactly. In discontinuous mode only the successors are drawn. No
higher learning rate to make up for frozen steps (off in theirs). A layer with r = 1 or r >= c exchanges nothing.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.fields import Bounds, Positive, Rank, Whole
from lorank.layers import FrozenPlusLowRank, loaded, wide
from lorank.method import Method, Published, Site, StepHook, check_ranks, rank_at, seeded_generator
from lorank.optim.adamw import VectorAdamW, check_factors, reset_vectors
from lorank.pools import Pool, room, tensors_of

Frequency = Literal["exponential", "z"]
Start = Literal["paper", "lora"]


# ---- the mathematics


def entry_stds(d_in: int, d_out: int, rank: int) -> tuple[float, float]:
    """Standard deviations of the entries of A and of B. Those of (1/r) B A have 1 / sqrt(3 d_in), as Kaiming's do, and
    the authors' ratio (d_out / d_in)^(1/4) makes B dA and dB A equally large.

    >>> [round(std, 6) for std in entry_stds(1024, 2736, 256)]
    [0.607515, 0.475174]
    """
    gain = 3**-0.5  # of a leaky ReLU of slope sqrt(5)
    return (d_out**0.5 * rank / d_in**1.5) ** 0.25 * gain**0.5, (rank / (d_in * d_out) ** 0.5) ** 0.25 * gain**0.5


def draw_(tensor: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill with uniform numbers of mean 0 and a standard deviation."""
    return nn.init.uniform_(tensor, -(3**0.5) * std, 3**0.5 * std, generator)


def theta(step: int, steps: int, ratio: float, frequency: Frequency) -> float:
    """How often vectors are exchanged at a step, as a fraction of the highest frequency.

    >>> round(theta(3999, 40_000, 0.1, "exponential"), 6), theta(4000, 40_000, 0.1, "z")
    (0.3, 0.5)
    """
    end = ratio * steps
    if frequency == "exponential":
        return max(0.3 ** ((step + 1) / end), 1e-8)
    return 0.5 - 0.5 * math.tanh(5 * (step - end) / end)  # = 1 - 1 / (1 + exp(-(10 / end) (step - end)))


@torch.no_grad()
def exchange_(W: Tensor, vectors: Tensor, partners: Tensor, rows: Tensor, new: Tensor, alpha: float = 1.0) -> None:
    """(1) for several rows, in place: vectors[rows] <- new, and W + (α/r) partners^T vectors stays the same.

    W [p, q], vectors [r, q], partners [r, p], rows [k], new [k, q]: W, A, B^T; or, to exchange columns of B, W^T, B^T, A.
    """
    difference = wide(vectors[rows]) - wide(new)  # [k, q]
    W.add_(wide(partners[rows]).T @ difference, alpha=alpha / len(vectors))
    vectors[rows] = new


# ---- the layer


class SwitchLoRALinear(FrozenPlusLowRank):
    """y = W x + (α/r) B A dropout(x) + b, where `dense` becomes W and the sum starts as the dense layer."""

    edits_W = True

    def __init__(
        self, dense: nn.Linear, rank: int, *, alpha: float = 1.0, dropout: float = 0.0, start: Start = "paper"
    ):
        super().__init__(dense, rank, scale=alpha / rank, dropout=dropout)
        self.alpha, self.start = alpha, start
        self._start(subtract=True)

    def reset_parameters(self) -> None:
        """Draw A and B and subtract (α/r) B A from W, which must hold the dense W_0 unless it came from a file."""
        self._start(subtract=not loaded(self.W.weight))

    @torch.no_grad()
    def _start(self, *, subtract: bool) -> None:
        draw_(self.A.weight, self.entry_stds[0])
        draw_(self.B.weight, self.entry_stds[1])
        if subtract:
            self.W.weight.sub_(self.product())

    @property
    def entry_stds(self) -> tuple[float, float]:
        if self.start == "lora":
            return (3 * self.W.in_features) ** -0.5, 0.0  # Kaiming's with slope sqrt(5)
        return entry_stds(self.W.in_features, self.W.out_features, self.A.out_features)

    def product(self) -> Tensor:
        """(α/r) B A [d_out, d_in], in single precision or better, divided, not multiplied by a rounded α/r."""
        return wide(self.B.weight) @ wide(self.A.weight) / (self.A.out_features / self.alpha)


# ---- the method


@dataclass(frozen=True, kw_only=True)
class SwitchLoRA(Method):
    """SwitchLoRA with its hyper-parameters."""

    name: ClassVar[str] = "switchlora"
    adamw: ClassVar[type[Optimizer] | None] = VectorAdamW
    keeps_outputs: ClassVar[bool] = True
    published: ClassVar[Published] = {"350m": {"rank": 256}, "1b": {"rank": 512}}  # 1b: 1.3B; others are not known
    soon: ClassVar[Mapping[str, Any]] = {"interval": 2, "freeze_steps": 1}

    rank: Rank = 0.25
    """Vectors of each factor: an integer, a fraction of the width (the paper's d/4), or {pattern: either}."""
    alpha: Positive = 1.0
    """The low-rank term is multiplied by α/r."""
    scale: Positive | None = None
    """Its multiplier in place of α/r, so that one setting suits all ranks and widths."""
    dropout: Annotated[float, Bounds(least=0, below=1)] = 0.0
    """Dropout of the factors' input in training."""
    start: Start = "paper"
    """Initial factors and candidates: both drawn ("paper"), or A as Kaiming's and B zero ("lora", the original LoRA start)."""
    interval: Annotated[float, Bounds(least=1)] = 40
    """Steps between two exchanges of one vector at the highest frequency; at least 2 freeze_steps."""
    ratio: Positive = 0.1
    """Fraction of the run after which the frequency has fallen to 0.3 ("exponential") or half ("z") of the highest."""
    frequency: Frequency = "exponential"
    """How it falls: as 0.3^((s + 1) / (ratio T)), or in the shape of a Z, a falling sigmoid around ratio T."""
    mode: Literal["continuous", "discontinuous"] = "continuous"
    """Which candidates come next: all in turn, or any that are not in use, at random."""
    freeze_steps: Whole = 5
    """Updates for which the counterpart of an exchanged vector is frozen."""
    offload: bool = True
    """Pools in host memory; otherwise on their layer's device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval < 2 * self.freeze_steps:
            raise ValueError(f"interval must be at least twice freeze_steps={self.freeze_steps}, got {self.interval}")

    def check(self, sites: Sequence[Site]) -> None:
        check_ranks(self.rank, sites)

    def build(self, site: Site) -> nn.Module:
        rank = rank_at(self.rank, site)
        alpha = self.alpha if self.scale is None else self.scale * rank
        return SwitchLoRALinear(site.linear, rank, alpha=alpha, dropout=self.dropout, start=self.start)

    def optimizer(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> Optimizer:
        """AdamW that counts the steps of each vector, because those of exchanged ones start from zero."""
        return VectorAdamW(groups, lr=lr, betas=betas, eps=eps)

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook:
        return SwitchLoRAHook(self, model, optimizer, steps=steps, seed=seed)


# ---- between steps


class SwitchLoRAHook(StepHook):
    """Before each step: exchange vectors of A, then of B, and freeze those whose counterpart is new; ValueError for an
    optimizer that is not a `VectorAdamW` or lacks the factors."""

    def __init__(self, method: SwitchLoRA, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int):
        self.method, self.steps, self.seed = method, steps, seed
        layers = {name: module for name, module in model.named_modules() if isinstance(module, SwitchLoRALinear)}
        check_factors(optimizer, {n: (layer.A.weight, layer.B.weight) for n, layer in layers.items()})
        super().__init__(optimizer, layers.values())
        self.layers = {n: layer for n, layer in layers.items() if layer.A.out_features < min(layer.W.weight.shape)}
        self.pools = {name: self._pools(name, layer) for name, layer in self.layers.items()}

    def _pools(self, name: str, layer: SwitchLoRALinear) -> Sequence[Pool]:
        def candidates(factor: str, weight: Tensor, width: int, std: float) -> Tensor:
            drawn = torch.empty(min(layer.W.weight.shape), width, device="cpu")
            draw_(drawn, std, seeded_generator(self.seed, name, factor))
            return drawn.to("cpu" if self.method.offload else weight.device, weight.dtype)

        A, B, (std_A, std_B) = layer.A.weight, layer.B.weight, layer.entry_stds
        return Pool(A, 0, candidates("A", A, len(A.T), std_A)), Pool(B, 1, candidates("B", B, len(B), std_B))

    @torch.no_grad()
    def before_step(self) -> None:
        draw = seeded_generator(self.seed, self.step)
        for name, (a, b) in self.pools.items():
            if count := self._count(a, b, draw):
                layer = self.layers[name]
                W = self.rests.exact(name, layer.W.weight)
                self._exchange(W, a, b, layer.alpha, count, draw)
                self._exchange(W.T, b, a, layer.alpha, count, draw)
                self.rests.store_(name, W, layer.W.weight)
            a.hold()
            b.hold()

    @torch.no_grad()
    def after_step(self) -> None:
        for pool in itertools.chain(*self.pools.values()):
            pool.put_back()

    def _count(self, a: Pool, b: Pool, draw: torch.Generator) -> int:
        """How many vectors to exchange: r θ / interval, rounded at random, limited by the room there is."""
        r, c = len(a.selected), len(a.candidates)
        mean = r / self.method.interval * theta(self.step, self.steps, self.method.ratio, self.method.frequency)
        count = math.floor(mean + torch.rand((), generator=draw).item())
        return min(count, room(a, b)) if self.method.mode == "continuous" else min(count, room(a, b), c - r)

    def _exchange(self, W: Tensor, pool: Pool, partner: Pool, alpha: float, count: int, draw: torch.Generator) -> None:
        rows = (pool.pointer + torch.arange(count)) % len(pool.selected)
        here = rows.to(W.device)
        new = pool.swap(rows, pool.vectors[here], draw if self.method.mode == "discontinuous" else None)
        exchange_(W, pool.vectors, partner.vectors, here, new, alpha)
        partner.frozen[rows] = self.method.freeze_steps
        reset_vectors(self.optimizer, partner.weight, partner.dim, here)

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), **tensors_of(self.pools)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        for name, tensor in tensors_of(self.pools).items():
            tensor.copy_(state[name])
