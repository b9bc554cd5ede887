"""MoRAM: ranks that score their own relevance, a few more of them for each task.

    y = W x + B (w ⊙ A x) (+ b)      x [..., d_in]   A [R, d_in]   B [d_out, R]   W [d_out, d_in] frozen   R = r · tasks
    s = A x / |A x|                                                                                             (1)
    w = softmax(s / τ) over the k largest s, else 0;  in evaluation also 0 where s < δ                          (2)
    next task:  r new rows of A, Kaiming-uniform, and columns of B, zero; all older ones are frozen              (3)

Saves: gradients, optimizer state.

There is no router: a rank answers where its own row of A does. s keeps its sign. In evaluation w is not made to sum to one again
after ranks below δ are dropped, so training and evaluation differ even for one token; that is the paper's rule, kept as it is.
New ranks change w, so a new task changes what the model computes, although the new columns of B are zero. The gate depends on the
input, so the adapter cannot be merged.

Cost of a layer: r (d_in + d_out) trained parameters, whatever the number of tasks, and as many frozen ones for each earlier task;
for n tokens 2 n (d_in d_out + R (d_in + d_out)) operations forward, as all ranks are multiplied; backward the first term once more
and the second twice, without the gradients of older factors.

Source: Lu et al., "Little By Little: Continual Learning via Incremental Mixture of Rank-1 Associative Memory Experts", ICML 2026, arXiv
2506.21035 (first called MoRA), and the authors' repository Artificer-AI-Lab/MoRAM.

Confirmed in the authors' code: (1) to (3), τ = 0.03 for language models and 0.01 for CLIP, k = max(r, 2), δ = 0.2, all projections.
Departures. The scale is 1, as in their code for CLIP; that for language models scales new columns of B alone. A zero A x gives equal
weights instead of a division by zero.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.adapters.gated import Adapted, Adapter, GatedAdapter, count_task, kept, spread
from lorank.fields import Count, NonNegative, Positive, Rank
from lorank.layers import like, linear, wide
from lorank.method import Site

LEAST = 1e-12
"""|A x| is at least this."""


# ---- the mathematics


def scores(z: Tensor) -> Tensor:
    """(1) for z = A x [..., R], in single precision or better."""
    z = wide(z)
    return z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp(min=LEAST)


def weights(s: Tensor, k: int, temperature: float, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """(2): w [..., k] and the ranks [..., k] that have it; those with s < `threshold` get 0, where that is positive."""
    top, chosen = kept(s, k, least=2)
    w = torch.softmax(top / temperature, dim=-1)
    return (w if threshold == 0 else w * (top >= threshold)), chosen


# ---- the layer


class Earlier(nn.Module):
    """The ranks of earlier tasks, frozen."""

    def __init__(self, A: Tensor, B: Tensor):
        super().__init__()
        self.A = nn.Linear(A.shape[1], len(A), bias=False, **like(A))
        self.B = linear(B.shape[1], len(B), bias=False, **like(B))
        for layer, value in ((self.A, A), (self.B, B)):
            layer.weight = nn.Parameter(value.detach().clone(), requires_grad=False)


class MoRAMLinear(GatedAdapter):
    follows_input = True

    def __init__(
        self, dense: nn.Linear, rank: int, *, tasks: int, top_k: int | None, temperature: float, threshold: float
    ):
        super().__init__(dense, rank)
        self.top_k, self.temperature, self.threshold = top_k or rank, temperature, threshold
        self.earlier: Earlier | None = None
        if tasks > 1:
            old = (tasks - 1) * rank
            self.earlier = Earlier(
                self.A.weight.new_zeros(old, self.A.in_features), self.B.weight.new_zeros(len(self.B.weight), old)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.earlier is not None:
            nn.init.zeros_(self.earlier.B.weight)
            nn.init.kaiming_uniform_(self.earlier.A.weight, a=5**0.5)

    def latent(self, x: Tensor) -> Tensor:
        return super().latent(x) if self.earlier is None else torch.cat([self.earlier.A(x), self.A(x)], dim=-1)

    def lifted(self, z: Tensor) -> Tensor:
        if self.earlier is None:
            return super().lifted(z)
        old = self.earlier.A.out_features
        return self.earlier.B(z[..., :old]) + super().lifted(z[..., old:])

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [R, d_in] and B [d_out, R] of all tasks, older ranks first."""
        layers: list[Any] = [self] if self.earlier is None else [self.earlier, self]
        return torch.cat([one.A.weight for one in layers]), torch.cat([one.B.weight for one in layers], dim=1)

    def gate(self, x: Tensor, z: Tensor) -> Tensor:
        threshold = 0.0 if self.training else self.threshold
        w, chosen = weights(scores(z), self.top_k, self.temperature, threshold)
        return spread(w, chosen, z.shape[-1])

    def trained(self) -> Any:
        return (p for p in (self.A.weight, self.B.weight))

    def next_task(self) -> bool:
        """(3), with the new ranks in the parameters that train."""
        self.earlier = Earlier(*self.factors()).train(self.training)
        nn.init.zeros_(self.B.weight)
        nn.init.kaiming_uniform_(self.A.weight, a=5**0.5)
        return True

    def extra_repr(self) -> str:
        older = 0 if self.earlier is None else self.earlier.A.out_features
        return f"{super().extra_repr()}, earlier={older}, top_k={self.top_k}"


# ---- the method


@dataclass(frozen=True, kw_only=True)
class MoRAM(Adapter):
    """A mixture of ranks that grows by task; ``lorank.convert(model, MoRAM(rank=8))``, then `lorank.next_task`."""

    name: ClassVar[str] = "moram"
    layer: ClassVar[type[Adapted]] = MoRAMLinear
    progress: ClassVar[tuple[str, ...]] = ("tasks",)

    rank: Rank = 8
    """r, ranks of one task: an integer (the authors' 8, and 16 for CLIP), a fraction of the width, or {pattern: either}."""
    top_k: Count | None = None
    """k: ranks for each token, at least 2 and at most as many as there are. None: r."""
    temperature: Positive = 0.03
    """τ; the authors take 0.01 for CLIP."""
    inference_threshold: NonNegative = 0.2
    """δ: in evaluation, ranks whose score is less count nothing; 0: none."""
    tasks: Count = 1
    """Tasks begun; `lorank.next_task` counts them."""

    def options(self, site: Site) -> dict[str, Any]:
        given = {"temperature": self.temperature, "threshold": self.inference_threshold}
        return {"tasks": self.tasks, "top_k": self.top_k, **given}

    def next_task(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        super().next_task(model, optimizer)
        count_task(model)
