"""ReLoRA: a frozen dense weight plus factors that are merged into it and restarted, so that small steps add up in rank.

    y = W x + (α/r) B A dropout(x) (+ b)      x [..., d_in]   A [r, d_in]   B [d_out, r]   W [d_out, d_in] frozen
    every K updates:   W <- W + (α/r) B A,    A <- Kaiming-uniform,    B <- 0                                     (1)

Saves: gradients, optimizer state.

At each restart the optimizer's moments of the factors, which belong to the old ones, are set to zero. The learning
rate drops to 0 and climbs back to its cosine ("jagged cosine"). The merge follows the one update at rate 0, so factors are
merged as their cycle left them. With `warm_start` the run begins with updates of W itself and none of A and B; then W is
frozen and its optimizer state is dropped.

Cost of a layer: r (d_in + d_out) trained parameters, d_in d_out frozen ones; for n tokens 2 n (d_in d_out + r (d_in +
d_out)) operations forward; backward the first term once more and the second twice. Merged, it is a dense layer. If W has 16 bits,
what rounding takes from merges is kept too (`lorank.rounding`), another 2 d_in d_out bytes.

Source: Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", ICLR 2024, arXiv 2307.05695, and the
authors' repository Guitaricet/relora.

Departures from the authors' code. It sets 99.9 % of the moments to zero, each by another mask, and some of its first
moments survive where the second does not, so that an entry moves by lr m / eps; here all become zero or one mask serves
both (`reset_masks="repo"` is theirs). There A and B both start at 0, so that until the first merge neither has a gradient and
only embeddings, head, norms and biases learn; here A is drawn as at a restart (`start="repo"` is theirs). The warm start belongs to the
run instead of a checkpoint. Our cosine counts from the end of the warm start. Other optimizers than Adam will do: `lorank.moments` says which.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.fields import Bounds, Fraction, Positive, Rank, Whole
from lorank.layers import FrozenPlusLowRank, scale_at
from lorank.method import Method, Published, Site, StepHook, check_ranks, rank_at, seeded_generator, warmup_cosine
from lorank.moments import Prune, check_prunable, prune
from lorank.rounding import Rests

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


# ---- the layer


class ReLoRALinear(FrozenPlusLowRank):
    """y = W x + scale B A dropout(x) + b, with the dense layer itself as W."""

    edits_W = True  # at merges

    def __init__(self, dense: nn.Linear, rank: int, *, scale: float, dropout: float, start: Start, frozen: bool):
        super().__init__(dense, rank, scale=scale, dropout=dropout)
        self.W.weight.requires_grad_(not frozen)
        self.start = start
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.start == "paper":
            return super().reset_parameters()
        nn.init.zeros_(self.A.weight)
        nn.init.zeros_(self.B.weight)

    @torch.no_grad()
    def restart(self, generator: torch.Generator, rests: Rests, name: str = "") -> None:
        """(1), in place; A is drawn on the CPU, so that every device draws the same."""
        rests.store_(name, rests.exact(name, self.W.weight).add_(self.product()), self.W.weight)
        drawn = torch.empty(self.A.weight.shape)
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        self.A.weight.copy_(drawn)
        self.B.weight.zero_()


# ---- the method


@dataclass(frozen=True, kw_only=True)
class ReLoRA(Method):
    """ReLoRA with its hyper-parameters."""

    name: ClassVar[str] = "relora"
    keeps_outputs: ClassVar[bool] = True
    # rank 128 everywhere; the paper ends at 1.3B, our 1b
    published: ClassVar[Published] = {size: {"rank": 128} for size in ("60m", "130m", "250m", "350m", "1b")}
    soon: ClassVar[Mapping[str, Any]] = {"cycle": 2, "restart_warmup_steps": 1}

    rank: Rank = 0.25
    """Width of the factors: an integer (the authors' 128), a fraction of the width, or {pattern: either}."""
    alpha: Positive = 32.0
    """The low-rank term is multiplied by α/r."""
    scale: Positive | None = None
    """Multiplier of the low-rank term in place of α/r, so that one setting suits all ranks and widths; `alpha` then has no effect."""
    dropout: Annotated[float, Bounds(least=0, below=1)] = 0.1
    """Dropout of the factors' input in training."""
    cycle: Annotated[int, Bounds(least=2)] | None = None
    """K: updates between two restarts, a divisor of the steps after the warm start. None: a quarter of these."""
    merge_cycle: Annotated[int, Bounds(least=2)] | None = None
    """Updates between two merges, if these are not at the restarts of learning rate and moments."""
    restart_warmup_steps: Whole | None = None
    """Updates in which the learning rate climbs back after a restart. None: 50, or half of a shorter cycle."""
    reset: Prune = "zero"
    """What becomes zero in the factors' moments: all, `reset_ratio` of them at random, or the smallest `reset_ratio`."""
    reset_ratio: Fraction = 0.9
    """For "random" (the authors' default is 0.999) and "magnitude"."""
    reset_masks: Literal["one", "repo"] = "one"
    """One mask for all moments of a factor; or, as in the authors' code, one for each. This ruins runs: in one step entries of A
    grow a thousandfold."""
    warm_start: Whole = 0
    """Updates of full rank at the beginning."""
    warm_start_lr_ratio: Positive = 0.5
    """Learning rate of the warm start, as a part of that of the factors, which need twice the dense one."""
    start: Start = "paper"
    """Initial factors: "paper" draws A and sets B to 0; "repo" sets both to 0."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        if "reset_masks" not in fields:  # saved by version 0.1, which had a mask for each moment
            fields = {**fields, "reset_masks": "repo"}
            if fields.get("reset") == "reset":
                fields |= {"reset": "random", "reset_ratio": 0.999}
        return super().from_dict(fields)

    def check(self, sites: Sequence[Site]) -> None:
        check_ranks(self.rank, sites)

    def build(self, site: Site) -> nn.Module:
        rank = rank_at(self.rank, site)
        return ReLoRALinear(
            site.linear,
            rank,
            scale=scale_at(self.alpha, self.scale, rank),
            dropout=self.dropout,
            start=self.start,
            frozen=self.warm_start == 0,
        )

    def period(self, steps: int) -> int:
        """K in a run of that many steps; ValueError if the steps after the warm start are not whole cycles."""
        low_rank = steps - self.warm_start
        if low_rank < 3:
            raise ValueError(
                f"steps must be at least 3 more than warm_start={self.warm_start} with relora, got {steps}"
            )
        if self.merge_cycle is not None and self.merge_cycle >= low_rank:
            raise ValueError(f"merge_cycle must be less than the {low_rank} low-rank steps, got {self.merge_cycle}")
        if self.cycle is None:
            return max(2, math.ceil(low_rank / 4))  # the last one may be shorter
        if low_rank < 2 * self.cycle or low_rank % self.cycle:
            raise ValueError(
                f"steps minus warm_start must be a multiple of cycle={self.cycle} and at least two cycles with relora, got "
                f"steps={steps} and warm_start={self.warm_start}"
            )
        return self.cycle

    def schedule(self, steps: int, warmup_steps: int, min_lr_ratio: float) -> Callable[[int], float]:
        cycle = self.period(steps)
        again = min(50, cycle // 2) if self.restart_warmup_steps is None else self.restart_warmup_steps
        for name, warmup in (("warmup_steps", warmup_steps), ("restart_warmup_steps", again)):
            if warmup > cycle:
                raise ValueError(f"{name} must be at most cycle={cycle} with relora, got {warmup}")

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

    Among several processes W stays in the gradients that DDP sends, as zeros: DDP cannot give up a parameter in a run.
    """

    def __init__(self, method: ReLoRA, model: nn.Module, optimizer: Optimizer, cycle: int, seed: int):
        self.method, self.cycle, self.seed = method, cycle, seed
        self.merge_cycle = method.merge_cycle or cycle
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, ReLoRALinear)}
        super().__init__(optimizer, self.layers.values())
        self.together = torch.distributed.is_initialized()
        for layer in self.layers.values() if method.warm_start else ():
            for factor in (layer.A.weight, layer.B.weight):
                factor.register_hook(lambda g: torch.zeros_like(g) if self.warm else g)
            layer.W.weight.register_hook(lambda g: g if self.warm else torch.zeros_like(g))

    @property
    def warm(self) -> bool:
        """Whether the warm start lasts: W moves, and the factors have no gradient that clipping or the optimizer could see."""
        return self.step < self.method.warm_start

    def before_step(self) -> None:
        for layer in self.layers.values() if self.method.warm_start else ():
            for idle in (layer.A.weight, layer.B.weight) if self.warm else (layer.W.weight,):
                idle.grad = None

    def after_step(self) -> None:
        updates = self.step - self.method.warm_start
        merges, resets = (updates > K and updates % K == 1 for K in (self.merge_cycle, self.cycle))
        if updates == 0:
            self._freeze()
        for name, layer in self.layers.items() if updates == 1 or merges or resets else ():
            for factor in (layer.A.weight, layer.B.weight):  # at update 1 rather than at the restart
                check_prunable(self.optimizer, factor, self.method.reset)
            generator = seeded_generator(self.seed, self.step, name)
            if merges:
                layer.restart(generator, self.rests, name)
            if resets:
                self._prune(layer, generator)

    def _prune(self, layer: ReLoRALinear, generator: torch.Generator) -> None:
        for factor in (layer.A.weight, layer.B.weight):
            how, ratio = self.method.reset, self.method.reset_ratio
            prune(self.optimizer, factor, how, ratio, generator, together=self.method.reset_masks == "one")

    def _freeze(self) -> None:
        for layer in self.layers.values():
            layer.W.weight.requires_grad_(self.together)
            layer.W.weight.grad = None
            self.optimizer.state.pop(layer.W.weight, None)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        if self.method.warm_start and self.step >= self.method.warm_start:
            self._freeze()
