"""A dictionary and sparse codes: two factors of which the second has few entries in each row, chosen row by row.

    y = B A x (+ b), s of k entries in a row of B     x [..., d_in]   A [k, d_in]   B [d_out, k], s = ⌊k / ρ⌋, 0 elsewhere   b [d_out]

Saves: weights, gradients, optimizer state.

The rows of A are k atoms, and each output adds s of them, so that outputs lie in different subspaces of dimension s, where plain
factors have one subspace for all. It is the form in which `lorank.fit(model, "dictionary")` writes trained weights. The places are
drawn once and never change: a buffer of one bit for each entry of B, which is saved with the model.

With `groups` the blocks of a group share the atoms of a projection, and each has its own codes. The shared atoms are registered once,
at the root of the model's body, as `lorank_atoms`.

Cost of one layer, k = rank: k d_in + s d_out parameters, and d_out ⌈k / 8⌉ bytes of places; of k d_in its part, where atoms are shared.
The forward FLOPs are those of plain factors of rank k. B is formed in each call, d_out k entries, and kept for the backward pass.

Source: Shopkhoev et al., "CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning", arXiv 2509.22075.

Departures: the paper compresses trained models and trains nothing; the initial values are ours. B and A x are multiplied as dense
matrices, because no kernel for such codes is public.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorank.dictionary import first_blocks, in_groups
from lorank.fields import Bounds, Count, Rank
from lorank.layers import entry_std, like, loaded
from lorank.method import Method, Site, by_role, check_table, rank_at, seeded_generator
from lorank.sites import body_of

# ---- the mathematics


def entries(atoms: int, ratio: float) -> int:
    """s, entries in a row of B.

    >>> entries(2184, 2.0)
    1092
    """
    return max(1, math.floor(atoms / ratio))


def packed(places: Tensor, atoms: int) -> Tensor:
    """Places [m, s] as bits [m, ⌈k / 8⌉], the first in the lowest bit of a byte."""
    bits = torch.zeros(len(places), -(-atoms // 8) * 8, dtype=torch.uint8, device=places.device)
    bits.scatter_(1, places, 1)
    return (bits.view(len(bits), -1, 8) << _shifts(bits)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, atoms: int) -> Tensor:
    """Where B has entries, [m, k]."""
    return ((bits[..., None] >> _shifts(bits)) & 1).bool().flatten(1)[:, :atoms]


def _shifts(bits: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=bits.device)


def dense_codes(values: Tensor, bits: Tensor, atoms: int) -> Tensor:
    """B [m, k] from its entries [m, s], those of a row in the order of their places."""
    here = unpacked(bits, atoms)
    order = (here.cumsum(1) - 1).clamp(min=0, max=values.shape[1] - 1)
    return values.gather(1, order) * here


# ---- the layer


class SparseCodesLinear(nn.Module):
    """y = B A x + b with `per_row` entries in each row of B; A is its own, or of the group that has `key`."""

    A: nn.Linear
    bits: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        per_row: int,
        *,
        bias: bool = False,
        shared: nn.Linear | None = None,
        key: str | None = None,
        **new: Any,
    ):
        super().__init__()
        self.key = key
        if shared is None:
            self.A = nn.Linear(d_in, rank, bias=False, **new)
        else:
            object.__setattr__(self, "A", shared)  # not a submodule: the body owns it
        self.values = nn.Parameter(torch.empty(d_out, per_row, **new))
        self.bias = nn.Parameter(torch.empty(d_out, **new)) if bias else None
        self.register_buffer("bits", torch.empty(d_out, -(-rank // 8), dtype=torch.uint8, device=new.get("device")))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        (rank, d_in), (d_out, per_row) = self.A.weight.shape, self.values.shape
        std = entry_std(d_in, d_out, per_row)
        nn.init.normal_(self.A.weight, std=std)
        nn.init.normal_(self.values, std=std)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(d_out**-0.5), d_out**-0.5)
        if not self.bits.is_meta and not loaded(self.bits):
            generator = seeded_generator("sparse-codes", d_in, d_out)
            drawn = torch.rand(d_out, rank, generator=generator, device="cpu").argsort(1)[:, :per_row]
            self.bits.copy_(packed(drawn, rank))

    def codes(self) -> Tensor:
        """B [d_out, k]."""
        return dense_codes(self.values, self.bits, self.A.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.A(x), self.codes(), self.bias)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the dense layer that computes the same."""
        return self.codes() @ self.A.weight, self.bias

    def extra_repr(self) -> str:
        d_out, per_row = self.values.shape
        return f"d_in={self.A.in_features}, d_out={d_out}, rank={self.A.out_features}, per_row={per_row}"


# ---- the method


@dataclass(frozen=True, kw_only=True)
class SparseCodes(Method):
    """A dictionary and sparse codes with their sizes; ``lorank.fit(model, "dictionary")`` makes them from trained weights."""

    name: ClassVar[str] = "sparse-codes"

    rank: Rank = 0.25
    """Atoms k, width of the bottleneck: an integer, a fraction of the width, or {pattern: either}."""
    ratio: Annotated[float, Bounds(least=1)] = 2.0
    """ρ = k / s: how many atoms there are for each one that an output uses. With 1 the layer is B A."""
    groups: Count | Sequence[int] | None = None
    """Consecutive blocks that share the atoms of a projection: the number of groups, or the first block of each; None: no blocks do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "groups", first_blocks(self.groups))

    def split(self, stack: Sequence[Site]) -> list[list[Site]]:
        """The sites of one projection in groups that share atoms; ValueError if a group has no block."""
        return [[site] for site in stack] if self.groups is None else in_groups(stack, self.groups)

    def check(self, sites: Sequence[Site]) -> None:
        check_table(self.rank, sites)
        beyond = []
        for group in [group for stack in by_role(sites).values() for group in self.split(stack)]:
            first = group[0]
            if len({(site.d_in, rank_at(self.rank, site)) for site in group}) > 1:
                raise ValueError(
                    f"{first.role} must have the same inputs and rank in all blocks that share atoms; use other groups, or none"
                )
            k = rank_at(self.rank, first)
            if k * first.d_in / len(group) + entries(k, self.ratio) * first.d_out >= first.d_in * first.d_out:
                beyond.append(f"{first.role} (rank {k})")
        if beyond:
            listed = ", ".join(dict.fromkeys(beyond))
            warnings.warn(f"the factors are not smaller than the dense layer in {listed}; lower the rank", stacklevel=2)

    def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
        layers = []
        for number, group in enumerate(self.split(sites)):
            shared, key = None, None
            if self.groups is not None:
                first, rank = group[0], rank_at(self.rank, group[0])
                key = f"{first.role.replace('*.', '').replace('.', '_')}_{number}"
                shared = nn.Linear(first.d_in, rank, bias=False, **like(first.linear.weight))
            layers += [self.build(site, shared=shared, key=key) for site in group]
        return layers

    def build(self, site: Site, **sharing: Any) -> nn.Module:
        rank = rank_at(self.rank, site)
        options: dict[str, Any] = {"bias": site.linear.bias is not None, **like(site.linear.weight), **sharing}
        return SparseCodesLinear(site.d_in, site.d_out, rank, entries(rank, self.ratio), **options)

    def finish(self, model: nn.Module) -> None:
        """Register shared atoms once, on the body, so that a model with a head and one without have the same."""
        if self.groups is not None:
            layers = [layer for layer in model.modules() if isinstance(layer, SparseCodesLinear)]
            body_of(model).lorank_atoms = nn.ModuleDict({layer.key: layer.A for layer in layers if layer.key})

    def undo(self, model: nn.Module) -> None:
        if self.groups is not None:
            del body_of(model).lorank_atoms
