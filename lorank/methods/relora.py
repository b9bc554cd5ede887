"""ReLoRA: a frozen dense weight plus factors that are merged into it and started again, so that small steps add up in rank.

    y = W x + (α/r) B A dropout(x) (+ b)      x [..., d_in]   A [r, d_in]   B [d_out, r]   W [d_out, d_in] frozen
    every K updates:   W <- W + (α/r) B A,    A <- Kaiming-uniform,    B <- 0                                     (1)

At each restart most of the factors' Adam moments, which belong to the old ones, are set to zero, and the learning rate
drops to 0 and climbs back to its cosine ("jagged cosine"). The merge follows the one update at rate 0, so factors are
merged as their cycle left them. With `warm_start` the run begins with updates of W itself and none of A and B; then W
freezes and gives up its optimizer state.

Cost of a layer: r (d_in + d_out) trained parameters, d_in d_out frozen ones; for n tokens 2 n (d_in d_out + r (d_in +
d_out)) operations forward; backward the first term once more and the second twice. Merged it is dense.

Source: Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", ICLR 2024, arXiv 2307.05695, and the
authors' repository Guitaricet/relora.

Departures from the authors' code. There A starts at 0 beside B = 0, so that until the first merge neither has a gradient
and only embeddings, head, norms and biases learn; here A is drawn as at a restart (`start="repo"` is theirs). Merging and
resetting the optimizer have one period. The warm start belongs to the run instead of a checkpoint. Our cosine counts from
the end of the warm start.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lorank.fields import Rank
from lorank.layers import linear, own_memory
from lorank.method import Method, Published, Site, StepHook, check_ranks, rank_at, seeded_generator, warmup_cosine

Reset = Literal["reset", "random", "magnitude"]
Start = Literal["paper", "repo"]


# ---- the mathematics


def jagged_cosine(step: int, steps: int, warmup: int, restart_warmup: int, cycle: int, floor: float) -> float:
    """Multiplier of the learning rate: warm-up, cosine to `floor`, and at each restart a drop to 0 and a linear climb.

    >>> [round(jagged_cosine(s, 15_000, 500, 100, 5_000, 0.1), 6) for s in (4_999, 5_000, 5_050, 5_100, 14_999)]
    [0.802615, 0.0, 0.397203, 0.794406, 0.1]
    """

    since = step % cycle
    if step >= cycle and since < restart_warmup:
        return since / restart_warmup * warmup_cosine(step - since + restart_warmup, steps, warmup, floor)
    return warmup_cosine(step, steps, warmup, floor)


@torch.no_grad()
def prune_(moment: Tensor, reset: Reset, ratio: float, generator: torch.Generator) -> None:
    """Zero a part of a moment in place: at random 99.9 % ("reset") or a `ratio`, or the smallest `ratio` of it."""
    if reset == "magnitude":
        size = moment.abs().float().flatten()
        count = round(ratio * size.numel())
        if count:
            moment.mul_(moment.abs() > size.kthvalue(count).values)
    else:
        kept = torch.rand(moment.shape, generator=generator) > (0.999 if reset == "reset" else ratio)
        moment.mul_(kept.to(moment.device))


# ---- the layer


class ReLoRALinear(nn.Module):
    """y = W x + scale B A dropout(x) + b, with the dense layer itself as W."""

    def __init__(self, dense: nn.Linear, rank: int, *, scale: float, dropout: float, start: Start, frozen: bool):
        super().__init__()
        like = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        self.scale, self.start = scale, start
        self.W = dense
        self.W.weight.requires_grad_(not frozen)
        self.A = nn.Linear(dense.in_features, rank, bias=False, **like)
        self.B = linear(rank, dense.out_features, bias=False, **like)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw A and zero B, as at the start; with a `generator` as at a restart, where A is never zero."""
        nn.init.zeros_(self.B.weight)
        if self.start == "repo" and generator is None:
            nn.init.zeros_(self.A.weight)
        else:
            nn.init.kaiming_uniform_(self.A.weight, a=5**0.5, generator=generator)

    def product(self) -> Tensor:
        """scale B A [d_out, d_in], in single precision or better."""
        wide = torch.promote_types(self.W.weight.dtype, torch.float32)
        return self.scale * (self.B.weight.to(wide) @ self.A.weight.to(wide))

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """(1), in place; A is drawn on the CPU, so that every device draws the same."""
        self.W.weight.add_(self.product())
        drawn = torch.empty(self.A.weight.shape)
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        self.A.weight.copy_(drawn)
        self.B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.W(x), self.B(self.A(self.dropout(x))), alpha=self.scale)

    def extra_repr(self) -> str:
        return (
            f"d_in={self.W.in_features}, d_out={self.W.out_features}, rank={self.A.out_features}, scale={self.scale:g}"
        )


# ---- the method


@dataclass(frozen=True, kw_only=True)
class ReLoRA(Method):
    """ReLoRA with its hyper-parameters; ValueError for names and numbers outside of what the fields say."""

    name: ClassVar[str] = "relora"
    # rank 128 everywhere, so that alpha/r is 1/4; the paper ends at 1.3B, our 1b
    published: ClassVar[Published] = {size: {"rank": 128} for size in ("60m", "130m", "350m", "1b")}

    rank: Rank = 0.25
    """Width of the factors: an integer (the authors' 128), a fraction of the width, or {pattern: either}."""
    alpha: float = 32.0
    """Factors count α/r."""
    dropout: float = 0.1
    """Of the factors' input while training."""
    cycle: int | None = None
    """K: updates between two restarts; at least 2, and a divisor of the run's steps after the warm start. None: a quarter
    of these, rounded up."""
    restart_warmup_steps: int | None = None
    """Updates in which the learning rate climbs back after a restart; None: 50, or half of shorter cycles."""
    reset: Reset = "reset"
    """What is zeroed of the factors' moments: 99.9 % at random, `reset_ratio` at random, or the smallest `reset_ratio`."""
    reset_ratio: float = 0.9
    """For "random" and "magnitude"."""
    warm_start: int = 0
    """Updates of full rank at the beginning."""
    warm_start_lr_ratio: float = 0.5
    """Learning rate of the warm start, as a part of the factors': they want twice the dense one."""
    start: Start = "paper"
    """First factors: "paper" A random, B = 0; "repo" both 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, names in (("reset", get_args(Reset)), ("start", get_args(Start))):
            if getattr(self, field) not in names:
                raise ValueError(f"{field}={getattr(self, field)!r} is none of {', '.join(names)}")
        for field in ("cycle", "restart_warmup_steps", "warm_start"):
            if not isinstance(getattr(self, field), int | None):
                raise ValueError(f"{field}={getattr(self, field)!r} is no whole number of updates")
        if self.cycle is not None and self.cycle < 2:
            raise ValueError(f"cycle={self.cycle} leaves no update between restarts; give at least 2")
        if (self.restart_warmup_steps or 0) < 0:
            raise ValueError(f"restart_warmup_steps={self.restart_warmup_steps} is negative")
        if not 0 <= self.dropout < 1 or not 0 <= self.reset_ratio <= 1:
            raise ValueError(f"dropout={self.dropout} or reset_ratio={self.reset_ratio} is not a fraction")
        if self.warm_start < 0 or not 0 < self.warm_start_lr_ratio < math.inf or not 0 < self.alpha < math.inf:
            raise ValueError(
                f"warm_start={self.warm_start} is negative, or warm_start_lr_ratio={self.warm_start_lr_ratio} or "
                f"alpha={self.alpha} not positive"
            )

    def check(self, sites: Sequence[Site]) -> None:
        check_ranks(self.rank, sites)

    def build(self, site: Site) -> nn.Module:
        rank = rank_at(self.rank, site)
        return ReLoRALinear(
            own_memory(site.linear),
            rank,
            scale=self.alpha / rank,
            dropout=self.dropout,
            start=self.start,
            frozen=self.warm_start == 0,
        )

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        assert isinstance(module, ReLoRALinear)
        weight = module.W.weight
        return (weight + module.product()).to(weight.dtype), module.W.bias

    def period(self, steps: int) -> int:
        """K in a run of so many steps; ValueError if those after the warm start are not whole cycles."""
        low_rank = steps - self.warm_start
        if low_rank < 3:
            raise ValueError(
                f"relora: steps={steps} leave too few after warm_start={self.warm_start}; give more of them"
            )
        if self.cycle is None:
            return max(2, math.ceil(low_rank / 4))  # the last one may be shorter
        if low_rank < 2 * self.cycle or low_rank % self.cycle:
            raise ValueError(
                f"relora: steps={steps} less warm_start={self.warm_start} are not several times cycle={self.cycle}; change "
                "one of the three"
            )
        return self.cycle

    def schedule(self, steps: int, warmup_steps: int, min_lr_ratio: float) -> Callable[[int], float]:
        cycle = self.period(steps)
        again = min(50, cycle // 2) if self.restart_warmup_steps is None else self.restart_warmup_steps
        for name, warmup in (("warmup_steps", warmup_steps), ("restart_warmup_steps", again)):
            if warmup > cycle:
                raise ValueError(f"relora: {name}={warmup} do not fit into cycle={cycle}; give fewer or longer cycles")

        def multiplier(step: int) -> float:
            if step < self.warm_start:
                return self.warm_start_lr_ratio * jagged_cosine(step, steps, warmup_steps, 0, steps + 1, min_lr_ratio)
            low_rank = steps - self.warm_start
            return jagged_cosine(step - self.warm_start, low_rank, warmup_steps, again, cycle, min_lr_ratio)

        return multiplier

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook:
        return ReLoRAHook(self, model, optimizer, self.period(steps), seed)


# ---- between steps


class ReLoRAHook(StepHook):
    """Ends the warm start, and restarts the factors after updates K + 1, 2 K + 1, ... that follow it.

    Raises ValueError for an optimizer that is no Adam, or a warm start in several processes.
    """

    def __init__(self, method: ReLoRA, model: nn.Module, optimizer: Optimizer, cycle: int, seed: int):
        if not isinstance(optimizer, Adam):
            raise ValueError(
                f"relora prunes the moments of Adam, which {type(optimizer).__name__} does not keep; take torch.optim.AdamW"
            )
        if method.warm_start and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "relora: warm_start freezes W in the middle of a run, which DDP does not allow; run it in one process"
            )
        super().__init__(optimizer)
        self.method, self.cycle, self.seed = method, cycle, seed
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, ReLoRALinear)}
        if method.warm_start:
            for layer in self.layers.values():
                for factor in (layer.A.weight, layer.B.weight):
                    factor.register_post_accumulate_grad_hook(self._idle)

    def _idle(self, factor: Tensor) -> None:
        """During the warm start factors have no gradient: neither clipping nor the optimizer sees them."""
        if self.step < self.method.warm_start:
            factor.grad = None

    def after_step(self) -> None:
        updates = self.step - self.method.warm_start
        if updates == 0:
            self._freeze()
        elif updates > self.cycle and updates % self.cycle == 1:
            for name, layer in self.layers.items():
                generator = seeded_generator(self.seed, self.step, name)
                layer.restart(generator)
                self._prune(layer, generator)

    def _prune(self, layer: ReLoRALinear, generator: torch.Generator) -> None:
        for factor in (layer.A.weight, layer.B.weight):
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in (state := self.optimizer.state[factor]):
                    prune_(state[moment], self.method.reset, self.method.reset_ratio, generator)

    def _freeze(self) -> None:
        for layer in self.layers.values():
            layer.W.weight.requires_grad_(False)
            layer.W.weight.grad = None
            self.optimizer.state.pop(layer.W.weight, None)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        if self.method.warm_start and self.step >= self.method.warm_start:
            self._freeze()
