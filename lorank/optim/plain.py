"""The optimizers without a subspace: each gives some of the parameters, or all of them, to a rule of lorank/optim/rules.py."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from lorank.fields import Bounds, NonNegative
from lorank.method import Patterns
from lorank.optim.driver import ByGroups
from lorank.optim.groups import hidden_matrices, with_lengths
from lorank.optim.muon import SCALES, Scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(ByGroups):
    """The optimizer of every method that does not bring its own: torch's, unless weights are rounded by chance."""

    name: ClassVar[str] = "adamw"

    @classmethod
    def answers(cls) -> frozenset[str]:
        """None: a method that brings its own optimizer takes this one's place."""
        return frozenset()

    def optimizer(self, groups: Iterable[Any], **settings: Any) -> Any:
        """Settings are those of torch's."""
        if self.stochastic_rounding:
            return super().optimizer(groups, **settings)
        return torch.optim.AdamW(groups, fused=True, **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(ByGroups):
    """Muon for hidden matrices, AdamW for embeddings, head, norms and biases, as one optimizer.

    Updates are scaled to AdamW's root mean square (arXiv 2502.16982), so that one learning rate, weight decay and schedule
    serve both. In groups of your own, ``{"params": ..., "rule": "muon"}`` names its matrices.

    Args:
        scaling: length of an update of a matrix [m, n], in a low-rank model of each factor: "kimi" 0.2 √max(m, n), which is
            AdamW's; "kj" √max(1, m/n); "dion" √(m/n); or "none", 1. All but the first need another learning rate than AdamW.
        adamw_lr: learning rate of what AdamW moves; None: the same.
        expert_matrices: move the experts of a mixture, [E, m, n], as E matrices; False leaves them to AdamW.

    >>> import torch
    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4, bias=False))
    >>> groups = [{"params": model[1].weight, "rule": "muon"}, {"params": model[0].weight}]
    >>> optimizer = Muon().optimizer(groups, lr=0.01)
    >>> model(torch.arange(10)).square().mean().backward()
    >>> optimizer.step()
    >>> [sorted(optimizer.state[p]) for p in model.parameters()]
    [['exp_avg', 'exp_avg_sq', 'step'], ['momentum_buffer']]
    """

    name: ClassVar[str] = "muon"
    once: ClassVar[Mapping[str, Any]] = {"expert_matrices": False}

    momentum: Annotated[float, Bounds(least=0, below=1)] = 0.95
    scaling: Scale = "kimi"
    adamw_lr: NonNegative | None = None
    expert_matrices: bool = True

    @property
    def sources(self) -> tuple[str, ...]:
        return ("lorank.optim.muon",)

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        if group.get("rule") == "muon":
            return super().settings({"momentum": self.momentum, "scaling": self.scaling, **group})
        return super().settings(group if self.adamw_lr is None else {"lr": self.adamw_lr, **group})

    def parameter_groups(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], targets: Patterns, exclude: Patterns
    ) -> list[dict[str, Any]]:
        hidden, found = hidden_matrices(model, experts=self.expert_matrices), []
        for group in groups:
            for rule, wanted in (("muon", True), ("adamw", False)):
                if some := [p for p in group["params"] if (p in hidden) == wanted]:
                    made = [{**group, "params": some, "rule": rule}]
                    found += with_lengths(model, made, SCALES[self.scaling]) if wanted else made
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(ByGroups):
    """torch's Adafactor for all parameters."""

    name: ClassVar[str] = "adafactor"

    @property
    def sources(self) -> tuple[str, ...]:
        return ("lorank.optim.adafactor",)

    def rule_for(self, group: Mapping[str, Any]) -> str:
        return "adafactor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW8bit(ByGroups):
    """AdamW of bitsandbytes, whose moments of tensors from 4,096 numbers on have a byte each, with a scale per 256."""

    name: ClassVar[str] = "adamw-8bit"

    @property
    def sources(self) -> tuple[str, ...]:
        return ("lorank.optim.adamw_8bit",)

    def rule_for(self, group: Mapping[str, Any]) -> str:
        return "adamw-8bit"
