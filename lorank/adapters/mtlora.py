"""MTLoRA: an adapter that all tasks share, and a small one for each task where features become a task's own.

    y = W x + s (B_0 A_0 + B_t A_t) dropout(x) (+ b)     A_0 [r, d_in]  B_0 [d_out, r]     A_t [r_t, d_in]  B_t [d_out, r_t]

Saves: gradients, optimizer state.

t is the task that `lorank.set_context(model, t)` names, for all samples or for each; without one the shared adapter acts alone, as it
does for what feeds the blocks above. Only the last block of each stage has parts for tasks, and not in query, key and value; a model
without stages is one stage. The layers between stages are left alone. Merged after `set_context(model, t)`, the model is that of task t.

Cost of a layer: (r + Σ_t r_t)(d_in + d_out) trained parameters, or r (d_in + d_out); for n tokens 2 n (d_in d_out + (r + Σ_t r_t)(d_in +
d_out)) operations forward, as the blocks of all tasks are multiplied; backward the first term once more and the second twice.

Source: Agiza, Neseem and Reda, "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning", CVPR 2024, arXiv 2403.20320,
and the authors' repository.

Confirmed in the authors' code: r = 64, r_t = 4, s = 4, dropout 0.05 of the input, LoRA's start, and the placement. Departures. In their
first variant a task's stream has B_t A_t alone (`with_shared=False` here), and streams of all tasks run through a layer at once; here one
context is one stream, so an image that is wanted for several tasks is run once for each. Scales are not trained.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from lorank.adapters.blocks import BlockAdapter, Contextual
from lorank.adapters.gated import Adapted
from lorank.fields import Bounds, Count, Positive, Rank
from lorank.method import Site, rank_at

QKV = r"(^|[._])(q|k|v|qkv|query|key|value|c_attn)(_proj|_lin)?($|[._])|query_key_value|Wqkv"
"""Names of projections to queries, keys and values."""


# ---- the layer


class MTLoRALinear(BlockAdapter):
    """Block 0 is shared; block t + 1 is task t's, if the layer has any."""

    def __init__(self, *dense_and_ranks: Any, with_shared: bool, **options: Any):
        super().__init__(*dense_and_ranks, **options)
        self.with_shared = with_shared
        self.reset_parameters()

    def mixture(self) -> Tensor:
        """[1, one-hot(t)]; of a layer without parts for tasks, [1]."""
        task, tasks = self.context.value, len(self.ranks) - 1
        if not tasks:
            return torch.ones(1)
        if task is None:
            return torch.eye(tasks + 1)[0]
        chosen = nn.functional.one_hot(task, tasks).float()  # [T] or [batch, T]
        return nn.functional.pad(chosen, (1, 0), value=float(self.with_shared))


# ---- the method


@dataclass(frozen=True, kw_only=True)
class MTLoRA(Contextual):
    """A shared adapter and one for each task; ``lorank.convert(model, MTLoRA(tasks=4))``, then `lorank.set_context(model, task)`."""

    name: ClassVar[str] = "mtlora"
    layer: ClassVar[type[Adapted]] = MTLoRALinear

    rank: Rank = 64
    """r of the shared adapter: an integer, a fraction of the width, or {pattern: either}."""
    tasks: Count = 4
    """How many tasks there are."""
    task_rank: Count = 4
    """r_t of each task's own part."""
    with_shared: bool = True
    """Whether a task's own stream has the shared adapter too."""
    scale: Positive = 4.0
    """s."""
    dropout: Annotated[float, Bounds(least=0, below=1)] = 0.0
    """Dropout of the adapters' input in training; the authors take 0.05."""

    def wants(self, site: Site) -> bool:
        """Not the layer between two stages."""
        return "downsample" not in site.name

    def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
        options: dict[str, Any] = {"scale": self.scale, "dropout": self.dropout, "with_shared": self.with_shared}
        return [
            MTLoRALinear(site.linear, [rank_at(self.rank, site), *self.own(site, sites)], **options) for site in sites
        ]

    def own(self, site: Site, sites: Sequence[Site]) -> list[int]:
        """Ranks of the tasks' parts at one of the sites of a stack; none unless it is the last and no query, key or value."""
        special = site is sites[-1] and re.search(QKV, site.name) is None
        return [self.task_rank] * self.tasks if special else []

    def context(self, value: Any) -> Tensor:
        task = torch.as_tensor(value)
        if task.is_floating_point() or task.ndim > 1 or not bool(((task >= 0) & (task < self.tasks)).all()):
            raise ValueError(
                f"a task must be an integer from 0 to {self.tasks - 1}, or one for each sample, got {value}"
            )
        return task.long()
