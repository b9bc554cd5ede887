"""CoSpaDi: each matrix as a dictionary and sparse codes, learned on calibration text.

    W ≈ B A     min |(W − B A) Xᵀ|  with at most s = ⌊k / ρ⌋ entries in each row of B
    W [m, n]   A [k, n]   B [m, k]   X [tokens, n] the layer's inputs on calibration text

With R Rᵀ = XᵀX and T = W R the error is |T − B A'|, A' = A R: sparse coding of the rows of T in the atoms of A'. Two steps
alternate, and neither raises the error:

    codes       orthogonal matching pursuit: to each row of T the atom that is most correlated with what is left of it, s times, all
                entries solved for anew by least squares; a row keeps its old places if they are better
    dictionary  "ksvd": each atom in turn becomes the leading direction of what the rows that use it lack without it, with their entries
                "mod": all atoms at once by least squares, B fixed

A = A' R⁻¹ then has the same error on the text. Without text R = I. With `groups` the matrices W_l of a group of blocks share A: T is the
stack of the W_l R, and R Rᵀ = Σ_l X_lᵀX_l. The start is the k leading right singular vectors of T, where the
codes are each row's s largest coordinates. The fitted model is `lorank.SparseCodes`.

Cost of a layer: k n + s m parameters and m ⌈k / 8⌉ bytes for the places; at ρ = 2 k is above the rank of plain factors of equal size,
s below it. Fitting one takes `sweeps` × about (m k s² + m n k) operations in double precision.

Source: Shopkhoev et al., "CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning", arXiv 2509.22075.

Departures: a row's old places may stay, so that the error cannot rise; the start is the singular vectors, and the paper's is not known
to us; blocks are fitted in order, each behind the fitted ones; places are further bits, where the paper takes two bits from each
number; which blocks share a dictionary is the user's choice.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from lorank.factors import whitening
from lorank.fields import Bounds, Count, Whole
from lorank.fit.structure import Found, Metric, Structure
from lorank.method import Method, Site, by_role
from lorank.methods.sparse_codes import SparseCodes, SparseCodesLinear, dense_codes, entries, packed

AT_ONCE, IN_CACHE = 2**25, 2**20
"""Numbers that matching pursuit keeps for the rows that it codes together. On a CPU they stay in its cache: twice as fast."""


def solved(T: Tensor, A: Tensor, places: Tensor) -> Tensor:
    """Entries [m, s] that make |T − B A| least if row i of B has entries at places [m, s] only."""
    gram, onto = A @ A.mT, T @ A.mT
    chosen = gram[places[:, :, None], places[:, None, :]]  # [m, s, s]
    ridge = 1e-12 * torch.eye(places.shape[1], dtype=A.dtype, device=A.device)
    L = torch.linalg.cholesky_ex(chosen + ridge)[0]
    return torch.cholesky_solve(onto.gather(1, places)[..., None], L)[..., 0]


def pursue(T: Tensor, A: Tensor, s: int) -> Tensor:
    """Places [m, s] of the atoms, rows of A [k, n] of unit length, that orthogonal matching pursuit chooses for each row of T [m, n]."""
    gram, at_once = A @ A.mT, IN_CACHE if T.device.type == "cpu" else AT_ONCE
    rows = max(1, at_once // (s * len(A)))
    return torch.cat([_pursue(part @ A.mT, gram, s) for part in T.split(rows)])


def _pursue(left: Tensor, gram: Tensor, s: int) -> Tensor:
    """From correlations [m, k] of rows with the atoms, and those of the atoms with each other."""
    m, k = left.shape
    every = torch.arange(m, device=left.device)
    directions = left.new_zeros(m, s, k)  # of each chosen atom, less those before it: its correlations with all atoms
    taken = torch.zeros(m, k, dtype=torch.bool, device=left.device)
    places = torch.zeros(m, s, dtype=torch.int64, device=left.device)
    for i in range(s):
        j = left.abs().masked_fill(taken, -1.0).argmax(1)
        before = directions[:, :i]
        with_it = before[every, :, j]  # [m, i]
        length = (1 - with_it.square().sum(1)).clamp(min=1e-12).sqrt()
        new = (gram[j] - (with_it[:, None] @ before)[:, 0]) / length[:, None]
        left = left - (left[every, j] / length)[:, None] * new
        directions[:, i], places[:, i], taken[every, j] = new, j, True
    return places


def coded(T: Tensor, A: Tensor, s: int, old: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Places and entries [m, s] of B: those of matching pursuit, or for a row that they do not suit as well, the old places."""
    places = pursue(T, A, s)
    values = solved(T, A, places)
    if old is not None:
        before = solved(T, A, old)
        worse = _lacks(T, A, places, values) > _lacks(T, A, old, before)
        places, values = torch.where(worse, old, places), torch.where(worse, before, values)
    return places, values


def _dense(places: Tensor, values: Tensor, k: int) -> Tensor:
    return values.new_zeros(len(values), k).scatter(1, places, values)


def _lacks(T: Tensor, A: Tensor, places: Tensor, values: Tensor) -> Tensor:
    return (T - _dense(places, values, len(A)) @ A).norm(dim=1, keepdim=True)


def by_ksvd(T: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Atom after atom, one step of the power method: a ← Eᵀ b / |Eᵀ b|, b ← E a, where E is what the rows that use it lack without it."""
    A, B = A.clone(), B.clone()
    lack = T - B @ A
    for j in range(len(A)):
        users = B[:, j].nonzero()[:, 0]
        if not len(users):
            continue
        E = lack[users] + B[users, j, None] * A[j]
        a = B[users, j] @ E
        if a.norm() > 0:
            a = a / a.norm()
            b = E @ a
            A[j], B[users, j], lack[users] = a, b, E - b[:, None] * a
    return A, B


def by_mod(T: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """All atoms that are used at once, by least squares, and of unit length again; B takes their lengths."""
    used = B.square().sum(0) > 0
    A, B = A.clone(), B.clone()
    A[used] = torch.linalg.lstsq(B[:, used], T, driver="gelsd" if T.device.type == "cpu" else None).solution
    size = A.norm(dim=1).clamp(min=torch.finfo(A.dtype).tiny)
    return A / size[:, None], B * size


def learned(T: Tensor, k: int, s: int, sweeps: int, update: str) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms A [k, n], places and entries [m, s] that make |T − B A| small; T [m, n] in double precision."""
    Vh = torch.linalg.svd(T, full_matrices=False)[2]
    A = Vh[:k]
    if len(A) < k:  # more atoms than dimensions: longest rows, too
        longest = T.norm(dim=1).topk(k - len(A)).indices
        A = torch.cat([A, torch.nn.functional.normalize(T[longest], dim=1)])
    places, values = coded(T, A, s)
    move = by_ksvd if update == "ksvd" else by_mod
    for _ in range(sweeps):
        A, _ = move(T, A, _dense(places, values, k))
        places, values = coded(T, A, s, places)
    return A, places, values


def summed(metrics: Sequence[Metric]) -> Tensor | None:
    """R with R Rᵀ = Σ_l X_lᵀX_l up to a factor; None without text."""
    roots = [(metric.R, metric.size) for metric in metrics if metric.R is not None]
    if len(roots) < 2:
        return roots[0][0] if roots else None
    total = sum(size for _, size in roots)
    grams = [size / total * R @ R.mT for R, size in roots]
    return whitening(torch.stack(grams).sum(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseDictionary(Structure):
    """Atoms and sparse codes for each matrix; ``lorank.fit(model, "dictionary", batches, budget=0.5)``."""

    name: ClassVar[str] = "dictionary"
    has_spectrum: ClassVar[bool] = False
    counts: ClassVar[str] = "atoms and codes"

    ratio: Annotated[float, Bounds(least=1)] = 2.0
    """ρ = k / s, atoms for each one that a row uses."""
    sweeps: Whole = 20
    """How often codes and dictionary are improved; the paper's: 60."""
    update: Literal["ksvd", "mod"] = "ksvd"
    """How the dictionary is: atom after atom, or all at once."""
    groups: Count | Sequence[int] | None = None
    """Consecutive blocks that share the dictionary of a projection: how many groups, or the first block of each; None: no blocks do."""

    @classmethod
    def making(cls, method: Method) -> Structure | None:
        return cls(ratio=method.ratio, groups=method.groups) if isinstance(method, SparseCodes) else None

    def gathered(self, sites: Sequence[Site]) -> Sequence[Sequence[Site]]:
        codes = self.method(1)
        assert isinstance(codes, SparseCodes)
        return (
            [group for stack in by_role(sites).values() for group in codes.split(stack)]
            if self.groups
            else [[s] for s in sites]
        )

    def parameters(self, rank: int, d_in: int, d_out: int, members: int = 1) -> int:
        return round(rank * d_in / members) + entries(rank, self.ratio) * d_out

    def rank_within(self, room: float, d_in: int, d_out: int, members: int = 1) -> int:
        return math.floor(room / (d_in / members + d_out / self.ratio))

    def method(self, rank: int | dict[str, int]) -> Method:
        return SparseCodes(rank=rank, ratio=self.ratio, groups=self.groups)

    def solve_together(
        self, weights: Sequence[Tensor], metrics: Sequence[Metric], ranks: Sequence[int]
    ) -> Sequence[Found]:
        R, rank, dtype = summed(metrics), ranks[0], weights[0].dtype
        T = torch.cat(self.targets(weights))
        T = T if R is None else T @ R
        A, places, values = learned(T, rank, entries(rank, self.ratio), self.sweeps, self.update)
        places, order = places.sort(1)
        A = (A if R is None else torch.linalg.solve_triangular(R, A, upper=False, left=False)).to(dtype)
        rows = [len(weight) for weight in weights]
        codes = zip(values.gather(1, order).to(dtype).split(rows), packed(places, rank).split(rows), strict=True)
        return [{"A": A, "values": own.clone(), "bits": bits.clone()} for own, bits in codes]

    def apply(self, found: Found, x: Tensor) -> Tensor:
        return x @ found["A"].mT @ dense_codes(found["values"], found["bits"], len(found["A"])).mT

    @torch.no_grad()
    def fill(self, layer: nn.Module, found: Found, bias: Tensor | None) -> None:
        assert isinstance(layer, SparseCodesLinear)
        layer.A.weight.copy_(found["A"])
        layer.values.copy_(found["values"])
        layer.bits.copy_(found["bits"])
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
