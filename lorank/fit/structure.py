"""What a structure is: the form in which `lorank.fit` writes a trained matrix, and the method that a model of that form has.

A structure gets matrices W [m, n] with a metric each (`Metric`): one at a time, or those together that share something (`gathered`).
What it finds for a matrix is a dictionary of tensors, which can be saved.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from lorank.analysis.batches import Batch
from lorank.fields import check_fields
from lorank.method import Method, Site

Found = dict[str, Tensor]
"""The tensors that stand for a matrix."""


class Metric(NamedTuple):
    """What decides how much an error counts."""

    R: Tensor | None = None
    """[n, n], lower triangular, R Rᵀ = XᵀX / size; None: the identity, every entry of the matrix counts alike."""
    rows: Tensor | None = None
    """Some of the inputs X [N, n], for a structure that asks for a `sample`."""
    size: float = 1.0
    """Mean of the diagonal of XᵀX."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """Base of all structures. Its fields are its settings, checked by their annotations (`lorank.fields`)."""

    name: ClassVar[str]
    """What `lorank.fit` and the command line call it."""
    usual: ClassVar[float] = 0.5
    """The budget unless one is given."""
    sample: ClassVar[int] = 0
    """How many inputs of a matrix it needs besides the metric, about; none can be had without text."""
    is_linear: ClassVar[bool] = True
    """Whether what stands for a matrix is a linear map."""
    has_spectrum: ClassVar[bool] = True
    """Whether its error is a tail of singular values, as policy "energy" needs."""
    needs_parent: ClassVar[bool] = False
    """Whether the fitted model is trained to give what the dense one gives, of which a copy is then kept; it needs text."""
    counts: ClassVar[str] = "factors"
    """What the budget is of, for messages and tables."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_text(self) -> bool:
        """Whether nothing can be fitted without text."""
        return self.sample > 0 or self.needs_parent

    @classmethod
    def making(cls, method: Method) -> "Structure | None":
        """The structure whose fitted model has that method, with its settings; None if this one does not make it."""
        return None

    def gathered(self, sites: Sequence[Site]) -> Sequence[Sequence[Site]]:
        """The matrices that are fitted together. Each is alone unless they share tensors; then their blocks are visited at once."""
        return [[site] for site in sites]

    def parameters(self, rank: int, d_in: int, d_out: int, members: int = 1) -> int:
        """Parameters of a projection of that rank, with its part of what so many members of a group share."""
        return rank * (d_in + d_out)

    def rank_within(self, room: float, d_in: int, d_out: int, members: int = 1) -> int:
        """The largest rank with at most so many parameters."""
        return math.floor(room / (d_in + d_out))

    def method(self, rank: int | dict[str, int]) -> Method:
        """The method of a model whose projections have these ranks, as in `lorank.fields.Rank`."""
        raise NotImplementedError

    def target(self, weight: Tensor) -> Tensor:
        """The matrix that the factors approximate, in double precision: the weight itself, or what another part of it lacks."""
        return weight.double()

    def targets(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """`target` of each matrix of a group."""
        return [self.target(weight) for weight in weights]

    def solve(self, weight: Tensor, metric: Metric, rank: int) -> Found:
        """The tensors of a weight [m, n]."""
        raise NotImplementedError

    def solve_together(
        self, weights: Sequence[Tensor], metrics: Sequence[Metric], ranks: Sequence[int]
    ) -> Sequence[Found]:
        """The tensors of each weight of a group. What the group shares is one tensor in all of them."""
        return [self.solve(*one) for one in zip(weights, metrics, ranks, strict=True)]

    def apply(self, found: Found, x: Tensor) -> Tensor:
        """Outputs [..., m] of the tensors for inputs [..., n], without a bias."""
        raise NotImplementedError

    def fill(self, layer: nn.Module, found: Found, bias: Tensor | None) -> None:
        """Copy the tensors and the dense layer's bias into the layer that `method` built."""
        raise NotImplementedError

    def before(self, model: nn.Module, data: Sequence[Batch], sites: Sequence[Site]) -> Self:
        """The structure with the settings that a look at the dense model decides; `data` is empty without text."""
        return self

    def after(self, model: nn.Module, parent: nn.Module, data: Sequence[Batch]) -> None:
        """What is done with the whole fitted model, in place, if the structure `needs_parent`, the dense one."""

    def settings(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def spectrum(target: Tensor, R: Tensor | None) -> Tensor:
    """Singular values, descending, of what the factors approximate, as the metric sees it."""
    return torch.linalg.svdvals(target if R is None else target @ R)


def as_matrix(structure: Structure, found: Mapping[str, Tensor], columns: int) -> Tensor:
    """The matrix [m, n] of a structure that is linear."""
    some = next(tensor for tensor in found.values() if tensor.is_floating_point())
    return structure.apply(dict(found), torch.eye(columns, dtype=some.dtype, device=some.device)).T
