"""Votes: an int8 weight moves by one where the votes of EGGROLL's pairs are clear.

    Θ ← clip(Θ + (1 where Z > 0, else -1))  where  16 |Z| ≥ q ⌊√K⌋ 256,    q = ⌊16 Φ⁻¹(1 - α/2)⌋
    α = lr / ((2^fall - 1) t / 1000 + 1)

    Θ [a, b] int8     Z [a, b] int32: the votes of K pairs, see `lorank.evolution.integers`

Saves: weights, gradients, optimizer state, activations: all are integers, and there is no backward pass.

α is the fraction of the weights that would move if fitness were noise. It takes the place of a learning rate and falls
with the step t; the paper's best is lr = 1, fall = 4. At t = 0 it is then 1, q is 0 and all weights move.

Source: Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv 2511.16652, appendix H, and their nano-egg. Their
one flag is our fall where it is above 1, with lr = 1, and our lr where it is at most 1, with fall = 0.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.evolution.egg_model import EggConfig, EggForCausalLM
from lorank.fields import Bounds, Count, Fraction, check_value
from lorank.method import Method, Patterns

# ---- the mathematics


def falling(step: int, fall: float) -> float:
    """α after that many steps, as a part of lr.

    >>> round(falling(10, 4), 4), round(falling(999, 4), 5), falling(999, 0)
    (0.8696, 0.06256, 1.0)
    """
    return 1 / ((2**fall - 1) * step / 1000 + 1)


def threshold(alpha: float) -> int:
    """q.

    >>> [threshold(falling(step, 4)) for step in (0, 10, 100, 999)]
    [0, 2, 13, 29]
    """
    return int(16 * NormalDist().inv_cdf(1 - alpha / 2))


# ---- the optimizer


class VoteOptimizer(Optimizer):
    """Moves int8 weights by one where their votes, found in `.grad`, are clear; the learning rate is α.

    >>> p = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    >>> p.grad_dtype = torch.int32
    >>> p.grad = torch.tensor([10_000, -10_000, 100], dtype=torch.int32)
    >>> _ = VoteOptimizer([p], lr=0.4, pairs=64).step()
    >>> p.data
    tensor([ 1, -1,  0], dtype=torch.int8)
    """

    def __init__(self, params: Iterable[Any], *, lr: float, pairs: int):
        check_value("lr", lr, Fraction)
        check_value("pairs", pairs, Count)
        super().__init__(params, {"lr": lr, "pairs": pairs})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("step() must have no closure with votes; count the votes before step()")
        for group in self.param_groups:
            bound = threshold(group["lr"]) * int(group["pairs"] ** 0.5) * 256 if group["lr"] > 0 else 2**40
            for p in group["params"]:
                if p.grad is not None:
                    move = torch.where(p.grad > 0, 1, -1) * (16 * p.grad.long().abs() >= bound)
                    p.copy_((p + move).clamp_(-127, 127))
        return None


# ---- the method


@dataclass(frozen=True, kw_only=True)
class Votes(Method):
    """The optimizer of an EGG model: a weight moves by one where the votes of EGGROLL's pairs are clear."""

    name: ClassVar[str] = "votes"
    key: ClassVar[str] = "optimizer"
    model_type: ClassVar[str] = EggConfig.model_type
    """The only type of model whose weights it moves."""

    fall: Annotated[float, Bounds(least=0, most=64)] = 4.0
    """How fast α, the fraction of weights moved by noise alone, falls from lr: as 1 / ((2^fall - 1) t / 1000 + 1)."""

    def parameter_groups(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], targets: Patterns, exclude: Patterns
    ) -> list[dict[str, Any]]:
        if not isinstance(model, EggForCausalLM):
            raise ValueError(
                f"votes moves the integer weights of EGG, not those of {type(model).__name__.removeprefix('Lorank')}; use another "
                "optimizer, such as adamw"
            )
        return [{"params": list(model.parameters()), "weight_decay": 0.0, "pairs": model.voting_pairs}]

    def optimizer(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> VoteOptimizer:
        [group] = groups
        if group["pairs"] is None:
            raise ValueError("votes needs pairs of members that vote; make the gradient with eggroll first")
        if lr > 1:
            raise ValueError(
                f"lr must be a number from 0 to 1 with votes, the fraction of weights that noise alone moves, got {lr}; "
                "how fast it falls is the setting `fall`"
            )
        return VoteOptimizer(group["params"], lr=lr, pairs=group["pairs"])

    def state_bytes(self, p: Tensor, group: Mapping[str, Any]) -> int:
        return 0

    def schedule(self, steps: int, warmup_steps: int, min_lr_ratio: float) -> Callable[[int], float]:
        return lambda step: falling(step, self.fall)
