"""Matrix PCA as a structure: attention's matrices as mixtures of atoms that blocks share, and a low-rank residual for each.

    W_l ≈ Σ_s c_ls D_s + B_l A_l     W_l [m, n]   D [S, m, n]   c_l [S]   A_l [r, n]   B_l [m, r]

Atoms and coefficients are those of `lorank.matrix_pca`, from the weights alone. The residual is the best of its rank for the outputs
on calibration text, as in `lorank.fit.svd`. All blocks of a group are fitted at once, to inputs that come through the groups before it.
A number of `groups` above one is cut where blocks change most what the model predicts, as in `lorank.fit.pca`, if there is text and
a model that predicts; else in equal groups. No group is so short that its atoms would be as many as its matrices. The fitted
model is `lorank.MASA`.

Cost of L matrices that share S atoms: S m n + L S + L r (m + n) parameters. `atoms` says how many there are, and what they leave of
the budget goes to residuals. MLPs stay dense.

Source: Zhussip et al., "Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning", arXiv 2508.04581.

Departures: as in `lorank.fit.pca`, whose `fit_masa` has all settings of MASA; how many atoms and how much rank is our choice, because we
have not seen the paper's appendix.
"""

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from lorank.analysis.batches import Batch
from lorank.dictionary import CoefficientTable, combine, matrix_pca
from lorank.factors import nearest
from lorank.fields import Bounds, Count
from lorank.fit.pca import calibrate
from lorank.fit.structure import Found, Metric, Structure
from lorank.loss import head_of
from lorank.method import Method, Site
from lorank.methods.masa import MASA, MASALinear


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixPCA(Structure):
    """Shared atoms and residuals; ``lorank.fit(model, "masa", batches, budget=0.5)``."""

    name: ClassVar[str] = "masa"
    counts: ClassVar[str] = "atoms, coefficients and residuals"

    atoms: Count | Annotated[float, Bounds(above=0, below=1)] = 1 / 3
    """S of each dictionary: a number, or a fraction of the matrices that share it."""
    variant: Literal["qkv", "qkvo"] = "qkvo"
    """Which projections of attention are written so."""
    groups: Count | Sequence[int] = 1
    """Consecutive blocks with their own atoms: how many groups, or the first block of each."""

    def method(self, rank: int | dict[str, int]) -> Method:
        ranks = rank if isinstance(rank, dict) else {".": rank}  # of a number, key and value would get half
        fields = dataclasses.asdict(self)
        return MASA(coefficients="table", residual_rank=ranks, **fields)

    def before(self, model: nn.Module, data: Sequence[Batch], sites: Sequence[Site]) -> Self:
        found = self
        if isinstance(self.groups, int) and self.groups > 1 and data and head_of(model) is not None:
            drift = calibrate(model, [batch["input_ids"] for batch in data], {s.name for s in sites}, inputs=False)[0]
            found = dataclasses.replace(self, groups=self._cuts(drift.tolist()))
        for group in found.gathered(sites):
            if (atoms := self._atoms(len(group))) >= len(group):
                raise ValueError(
                    f"atoms must be fewer than the {len(group)} matrices that share them, got {atoms}; use fewer atoms or groups"
                )
        return found

    def _cuts(self, drift: Sequence[float]) -> tuple[int, ...]:
        """First blocks of at most so many groups: before the blocks of largest drift that leave groups with fewer atoms than blocks."""
        assert isinstance(self.groups, int)
        firsts = [0]
        for block in sorted(range(1, len(drift) + 1), key=lambda block: -drift[block - 1]):
            tried = sorted([*firsts, block])
            sizes = [end - first for first, end in pairwise([*tried, len(drift) + 1])]
            if len(firsts) < self.groups and all(self._atoms(size) < size for size in sizes):
                firsts = tried
        return tuple(firsts)

    def gathered(self, sites: Sequence[Site]) -> Sequence[Sequence[Site]]:
        masa = self.method(1)
        assert isinstance(masa, MASA)
        return [group for stack in masa.stacks(sites) for group in masa.split(stack)]

    def _atoms(self, members: int) -> int:
        return MASA(atoms=self.atoms).count(members)

    def parameters(self, rank: int, d_in: int, d_out: int, members: int = 1) -> int:
        atoms = self._atoms(members)
        return round(atoms * d_in * d_out / members) + atoms + rank * (d_in + d_out)

    def rank_within(self, room: float, d_in: int, d_out: int, members: int = 1) -> int:
        return math.floor((room - self.parameters(0, d_in, d_out, members)) / (d_in + d_out))

    def targets(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return self._split(weights)[2]

    def _split(self, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Atoms [S, m, n], coefficients [L, S], and what they lack of each weight, in double precision."""
        whole = torch.stack([weight.double() for weight in weights])
        atoms, table, _ = matrix_pca(whole, self._atoms(len(weights)))
        return atoms, table, [weight - combine(c, atoms) for weight, c in zip(whole, table, strict=True)]

    def solve_together(
        self, weights: Sequence[Tensor], metrics: Sequence[Metric], ranks: Sequence[int]
    ) -> Sequence[Found]:
        atoms, table, lacks = self._split(weights)
        shared, found = atoms.to(weights[0].dtype), []
        for row, lack, metric, rank in zip(table, lacks, metrics, ranks, strict=True):
            B, A = nearest(lack, rank, metric.R)
            own = {"coefficients": row.clone(), "B": B, "A": A}
            found.append({"atoms": shared, **{key: one.to(shared.dtype) for key, one in own.items()}})
        return found

    def apply(self, found: Found, x: Tensor) -> Tensor:
        mixed = combine(found["coefficients"], found["atoms"])
        return x @ mixed.mT + x @ found["A"].mT @ found["B"].mT

    @torch.no_grad()
    def fill(self, layer: nn.Module, found: Found, bias: Tensor | None) -> None:
        assert isinstance(layer, MASALinear) and isinstance(layer.dictionary.coefficients, CoefficientTable)
        layer.dictionary.atoms.copy_(found["atoms"])
        layer.dictionary.coefficients.values[layer.depth].copy_(found["coefficients"])
        layer.A.weight.copy_(found["A"])
        layer.B.weight.copy_(found["B"])
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
