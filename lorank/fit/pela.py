"""PELA: two factors for each matrix, a third of its size, and two terms of a loss that keep a healed model near its parent.

    W ≈ B A,  r = ⌊m n / c (m + n)⌋,  c = 3     W [m, n]   B [m, r]   A [r, n]

The factors are those of the SVD, √Σ in each (`lorank.fit.svd`). Then the model, the student, is trained on its task with the dense
parent as a frozen teacher, and to the loss are added

    features       λ / L · Σ_l mean (h_l − h'_l)²            h_l, h'_l [batch, n, d] the outputs of block l of student and teacher
    perturbation   1 / N · Σ_i (max |B_i A_i − W_i| − ε)²    over the N matrices that became factors, ε = 1e-3

The authors use λ = 0.1 for ALBEF and 1 for DeiT and Swin.

Cost: r (m + n) parameters in each layer; in training one forward pass of the teacher for each batch, and a product of 2 m n r operations
for each matrix, one at a time.

Source: Guo et al., "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", arXiv 2310.10700.

Departures: with calibration text the factors are the best for the layers' outputs; without it they are the authors'. They leave heads
of fewer than ten outputs dense; here all heads stay dense.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorank.fit.svd import SVD
from lorank.layers import LowRankLinear
from lorank.sites import find_sites

EPSILON = 1e-3


def features(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over blocks of the mean squared difference of their outputs [batch, n, d]; no gradient goes to the teacher.

    With transformers: ``model(**batch, output_hidden_states=True).hidden_states[1:]`` of both; the last is after the final norm.

    Raises:
        ValueError: there are no outputs, or not as many of one as of the other.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"features must be outputs of the same blocks of student and teacher, got {len(student)} and {len(teacher)}"
        )
    pairs = zip(student, teacher, strict=True)
    return torch.stack([nn.functional.mse_loss(mine, its.detach()) for mine, its in pairs]).mean()


def perturbation(model: nn.Module, parent: nn.Module, epsilon: float = EPSILON) -> Tensor:
    """Mean over the matrices with factors of (max |B A − W| − ε)², where W are those of the dense parent.

    Raises:
        ValueError: the model has no factors, or factors in a place where the parent has no matrix.
    """
    dense = {site.name: site.linear.weight.detach() for site in find_sites(parent)}
    factors = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    if not factors:
        raise ValueError("model must have factors, got one without; fit it with lorank.fit first")
    if missing := [name for name in factors if name not in dense]:
        raise ValueError(f"parent must be the dense model that was fitted, but it lacks {missing[0]}")
    terms = [
        ((layer.B.weight @ layer.A.weight - dense[name]).abs().max() - epsilon).square()
        for name, layer in factors.items()
    ]
    return torch.stack(terms).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PELA(SVD):
    """The factors with which PELA begins; ``lorank.fit(model, "pela")`` keeps a third of the parameters."""

    name: ClassVar[str] = "pela"
    usual: ClassVar[float] = 1 / 3
