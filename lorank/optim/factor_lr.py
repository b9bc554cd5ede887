"""Structure-aware learning rates: each factor of a low-rank map moves the output as much as the dense map would.

    lr of a factor = lr · d_in / (k nᵢ) · w₀/w         k = 2 factors, factor i with nᵢ inputs, in detail:

    A [r, d_in]    lr · 1/2 · w₀/w                     B [d_out, r]    lr · d_in / (2 r) · w₀/w
    other matrices and the head    lr · w₀/w           norms, biases, scalars    lr

    w the model's width     w₀ the width at which lr was tuned; no w₀ leaves out the last factor

By AdamW's steps, which have entries of about lr, a factor adds about lr nᵢ to its output in the direction of its input. The rule
makes the sum over both factors that of the dense layer, half from each, at every width and rank.

Under Muon, whose updates are orthonormal, a factor [m, n] adds what its spectral norm lets through. There the rule is an
update of spectral norm lr · 0.2 √w₀ · √(m/n) / k. It takes the place of the usual 0.2 √max(m, n), which it equals for a
dense square matrix of the width w₀ = w (k = 1); the two are never multiplied.

Saves: the search for a learning rate.

That of a small model is right for a large one.

Cost: as AdamW's or Muon's. Decay goes by lr times weight decay, so it follows the multiplier too, unless `constant_decay`.

Source: Qiu et al., "Compute Better Spent: Replacing Dense Layers with Structured Matrices", arXiv 2406.06248.

Departures. In the authors' code the input layer has a tenth of lr; here that is `input_lr`, 1 by default, because it is not about
factors. Nothing is published for a non-linearity between the factors (CoLA) or for Muon: the second rule is our own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lorank.fields import Count, Positive
from lorank.loss import head_of
from lorank.method import Patterns
from lorank.optim.driver import ByGroups
from lorank.optim.groups import hidden_matrices, input_embeddings, transposed
from lorank.optim.pairs import draw, pairs


def multiplier(d_in: int, inputs: int, factors: int, dense: float = 1.0) -> float:
    """Of lr by AdamW, for one of `factors` factors, with `inputs` inputs, of a map with d_in; `dense` is w₀/w.

    >>> multiplier(1376, 1376, 2), multiplier(1376, 128, 2), multiplier(512, 512, 1)
    (0.5, 5.375, 1.0)
    """
    return d_in / (factors * inputs) * dense


def muon_multiplier(m: int, n: int, factors: int, base: int) -> float:
    """Of lr by Muon, for a factor [m, n] whose update has the length 0.2 √max(m, n).

    >>> muon_multiplier(512, 512, 1, 512), muon_multiplier(128, 512, 2, 512), muon_multiplier(512, 128, 2, 512)
    (1.0, 0.25, 1.0)
    """
    return (base * m / n / max(m, n)) ** 0.5 / factors


def factor_stds(d_in: int, d_out: int, rank: int) -> tuple[float, float]:
    """Standard deviations of A and B at the start: each is n^(-1/2) min(1, √(m/n)) for a factor [m, n].

    >>> [round(std, 4) for std in factor_stds(512, 512, 128)]
    [0.0221, 0.0884]
    """
    std = lambda m, n: n**-0.5 * min(1.0, (m / n) ** 0.5)  # noqa: E731
    return std(rank, d_in), std(d_out, rank)


def initialise(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw all factors of a model anew with the standard deviations of `factor_stds`, in place, before training."""
    draw(model, factor_stds, generator)


def width_of(model: nn.Module) -> int:
    """w, of the token embeddings; ValueError if there are none."""
    weight = getattr(input_embeddings(model), "weight", None)
    if weight is None:
        raise ValueError(
            "the model must have input embeddings, whose width is the model's, got none; leave out base_width"
        )
    return weight.shape[1]


@dataclass(frozen=True, kw_only=True)
class FactorLR(ByGroups):
    """AdamW or Muon with a learning rate for each factor; ``lorank.optimizer(model, FactorLR(), lr=3e-3)``.

    The rate of a group is its ``lr``, which schedules may set, times its ``lr_multiplier``.
    """

    name: ClassVar[str] = "factor-lr"

    rule: Literal["adamw", "muon"] = "adamw"
    base_width: Count | None = None
    """w₀, width of the model at which lr was tuned; None: this one's."""
    input_lr: Positive = 1.0
    """Multiplier of the embeddings, and of a head that is tied to them."""
    constant_decay: bool = False
    """Divide weight decay by the multiplier, so that each step shrinks all weights alike."""

    def rule_for(self, group: Mapping[str, Any]) -> str:
        return "adamw"

    def parameter_groups(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], targets: Patterns, exclude: Patterns
    ) -> list[dict[str, Any]]:
        """One group for each rule, weight decay and multiplier."""
        hidden, multipliers = hidden_matrices(model), self.multipliers(model)
        found: list[dict[str, Any]] = []
        for group in groups:
            for p in group["params"]:
                rule, times = self.rule if p in hidden else "adamw", multipliers.get(p, 1.0)
                decay = group["weight_decay"] / (times if self.constant_decay else 1.0)
                new = {**group, "weight_decay": decay, "rule": rule, "lr_multiplier": times}
                same = next((one for one in found if {**one, "params": None} == {**new, "params": None}), None)
                if same is None:
                    found.append(same := {**new, "params": []})
                same["params"].append(p)
        return found

    def multipliers(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """Of all parameters that have another than 1."""
        muon = self.rule == "muon"
        width = width_of(model) if muon or self.base_width else 1
        base = self.base_width or width
        head = head_of(model)
        found = {p: base / width for p in ([] if head is None else head.parameters()) if p.ndim > 1}
        turned = transposed(model)
        for p in hidden_matrices(model):
            m, n = p.shape[-2:]
            m, n = (n, m) if p in turned else (m, n)
            found[p] = muon_multiplier(m, n, 1, base) if muon else base / width
        for pair in pairs(model):
            for W in (pair.A, pair.B):
                m, n = W.shape[-2:]
                found[W] = muon_multiplier(m, n, 2, base) if muon else multiplier(pair.d_in, n, 2, base / width)
            if isinstance(values := getattr(pair.module, "values", None), nn.Parameter):
                found[values] = base / width  # entries of a sparse matrix (SLTrain)
        embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
        found |= {p: self.input_lr for module in embeddings for p in module.parameters()}
        return {p: times for p, times in found.items() if times != 1.0}
