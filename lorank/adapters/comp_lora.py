"""Comp-LoRA: a LoRA whose factors stay out of the leading directions of the frozen weight.

    y = W x + (α/r) B A x (+ b), U_kᵀ B = 0, A V_k = 0      A [r, d_in]   B [d_out, r]   W [d_out, d_in] = U S Vᵀ frozen

Saves: gradients, optimizer state.

U_k and V_k are the first k singular vectors of W. Gradients are projected before a step and factors after it, so the update B A never
enters the subspace, under any optimizer, and the k largest singular values of W + (α/r) B A stay those of W while the update is small.

Cost of a layer: r (d_in + d_out) trained parameters, and k (d_in + d_out) frozen numbers for the directions; operations are LoRA's, and
8 k r (d_in + d_out) more in a step. Merged, it is a dense layer.

Source: "Complementary Subspace Low-Rank Adaptation of Vision-Language Models for Few-Shot Classification", arXiv 2501.15040.

This is in the spirit of the paper, not its code, which is not known: it says that the update is in the orthogonal complement of the
principal components and has no parameters more. Which sides, k, and whether it is a parametrisation or a projection are not known to
us. Here `sides` and `keep` choose, and both factors are projected.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lorank.adapters.gated import Adapted, Adapter, GatedAdapter
from lorank.adapters.protected import Guard, leading, project_
from lorank.fields import Positive, Rank
from lorank.layers import like, loaded, scale_at
from lorank.method import Site, StepHook, check_table, rank_at

Sides = Literal["both", "output", "input"]


# ---- the layer


class CompLoRALinear(GatedAdapter):
    def __init__(self, dense: nn.Linear, rank: int, *, keep: int, sides: Sides, scale: float):
        super().__init__(dense, rank, scale=scale)
        k, new = min(keep, *dense.weight.shape), like(dense.weight)
        make = lambda d, wanted: nn.Parameter(torch.empty(d, k, **new), requires_grad=False) if wanted else None  # noqa: E731
        self.U = make(dense.out_features, sides != "input")
        self.V = make(dense.in_features, sides != "output")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.W.weight.is_meta:
            return
        found = [p for p in (self.U, self.V) if p is not None]
        if not all(map(loaded, found)):
            U, _, V = leading(self.W.weight, found[0].shape[1])
            for kept, value in ((self.U, U), (self.V, V)):
                if kept is not None:
                    kept.copy_(value)
        if not loaded(self.A.weight):
            self.project_weights()

    def trained(self) -> Any:
        return iter((self.A.weight, self.B.weight))

    def project_gradients(self) -> None:
        self._project(self.A.weight.grad, self.B.weight.grad)

    def project_weights(self) -> None:
        self._project(self.A.weight, self.B.weight)

    def _project(self, A: torch.Tensor | None, B: torch.Tensor | None) -> None:
        if self.U is not None:
            project_(B, self.U)
        if self.V is not None:
            project_(A, self.V, rows=True)


# ---- the method


@dataclass(frozen=True, kw_only=True)
class CompLoRA(Adapter):
    """LoRA outside the leading subspace; ``lorank.convert(model, CompLoRA(rank=16, keep=0.25))``."""

    name: ClassVar[str] = "comp-lora"
    layer: ClassVar[type[Adapted]] = CompLoRALinear

    keep: Rank = 0.25
    """k, singular directions of W that stay untouched: an integer, a fraction of the narrower side, or {pattern: either}."""
    sides: Sides = "both"
    """Where: of outputs (B), of inputs (A), or of both."""
    alpha: Positive = 32.0
    """The low-rank term is multiplied by α/r."""

    def check(self, sites: Any) -> None:
        super().check(sites)
        check_table(self.keep, sites, "keep")
        for site in sites:
            free = min([site.d_out] * (self.sides != "input") + [site.d_in] * (self.sides != "output"))
            if (k := rank_at(self.keep, site)) >= free:
                raise ValueError(f"keep must leave directions to train, so be below {free} at {site.name}, got {k}")

    def options(self, site: Site) -> dict[str, Any]:
        scale = scale_at(self.alpha, None, rank_at(self.rank, site))
        return {"keep": rank_at(self.keep, site), "sides": self.sides, "scale": scale}

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook:
        return Guard(optimizer, self.layers(model).values())  # type: ignore[arg-type]  # they are CompLoRALinear
