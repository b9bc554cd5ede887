"""Matrices that blocks share: atoms, and each block's coefficients from a table or a small network.

W_l = Σ_s c_ls D_s        l = 1..L blocks, s = 1..S atoms        D [S, d_out, d_in]   C [L, S]
"""

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.layers import like, loaded, wide
from lorank.method import Site

STD = 0.02
WIDTHS = 32, 64
"""Of an embedding and of the two hidden layers of a coefficient network, unless others are asked for."""
GELU_POWER = 0.4252
"""E[GELU(z)²] for z ~ N(0, 1), which keeps a GELU network's signal at unit variance from layer to layer."""


# ---- the mathematics


def combine(coefficients: Tensor, atoms: Tensor) -> Tensor:
    """W = Σ_s c_s D_s: coefficients [S], atoms [S, d_out, d_in] -> [d_out, d_in]."""
    return (coefficients[None] @ atoms.flatten(1)).view(atoms.shape[1:])


def depth_profile(blocks: int, atoms: int) -> Tensor:
    """Coefficients [L, S] with rows of unit length, in which each atom serves the blocks around its own share of the depth."""
    place = (torch.arange(blocks) + 0.5)[:, None] * atoms / blocks - (torch.arange(atoms) + 0.5)
    return F.normalize(torch.exp(-place.square() / 2), dim=1)


def group_numbers(depths: Sequence[int], groups: int | Sequence[int]) -> list[int]:
    """The group of each depth, from 0: of that many consecutive groups, as equal as can be, or of those that begin at these depths.

    >>> group_numbers([0, 1, 2, 3, 4], 2), group_numbers([0, 1, 2, 3, 4], (0, 4))
    ([0, 0, 0, 1, 1], [0, 0, 0, 0, 1])
    """
    if isinstance(groups, int):
        order = sorted(set(depths))
        return [order.index(depth) * groups // len(order) for depth in depths]
    return [bisect_right(groups, depth) - 1 for depth in depths]


def in_groups(stack: Sequence[Site], groups: int | Sequence[int]) -> list[list[Site]]:
    """The sites of one projection in `groups` of consecutive blocks; ValueError if a group has no block."""
    found: list[list[Site]] = [[] for _ in (range(groups) if isinstance(groups, int) else groups)]
    for site, number in zip(stack, group_numbers([site.depth for site in stack], groups), strict=True):
        found[number].append(site)
    if not all(found):
        blocks = f"blocks {stack[0].depth} to {stack[-1].depth} of {stack[0].role}"
        raise ValueError(f"each group must contain at least one of the {blocks}, got groups={groups}; use fewer groups")
    return found


def first_blocks(groups: Any) -> Any:
    """A setting of groups, with the first block of each as a tuple; ValueError if these do not ascend from 0."""
    if not isinstance(groups, Sequence):
        return groups
    if tuple(groups) != tuple(sorted({0, *groups})):
        raise ValueError(f"groups must ascend from 0, the first block of each group, got {groups!r}")
    return tuple(groups)


def matrix_pca(weights: Tensor, atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """The dictionary nearest to given matrices in Frobenius norm (arXiv 2508.04581, eq. 4).

    Args:
        weights: W [L, d_out, d_in].
        atoms: S, from 1 to L.

    Returns:
        D [S, d_out, d_in], orthonormal (tr(D_i^T D_j) = δ_ij); C [L, S] with c_ls = tr(D_s^T W_l); and the squared error
        Σ_l |W_l - Σ_s c_ls D_s|², which is the sum of the discarded eigenvalues of the Gram matrix [L, L].

    Raises:
        ValueError: more atoms than matrices, or none.
    """
    if not 1 <= atoms <= len(weights):
        raise ValueError(f"atoms must be from 1 to {len(weights)}, the number of matrices, got {atoms}")
    flat = wide(weights.flatten(1))  # [L, d_out d_in]
    _, values, basis = torch.linalg.svd(flat, full_matrices=False)
    basis = basis[:atoms]
    found = basis.view(atoms, *weights.shape[1:]), flat @ basis.T
    return found[0].to(weights.dtype), found[1].to(weights.dtype), values[atoms:].square().sum()


# ---- the modules


class Affine(nn.Linear):
    """W x + b of one vector x [d_in], as a sum of products. The last bits of a matrix-vector product depend on where in
    memory the weights are, so that a loaded model would differ from the saved one."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum(-1) + self.bias


class CoefficientNetwork(nn.Module):
    """c_l [S] of a block as a function of its trainable embedding; `widths` e and w of the embedding and the hidden layers."""

    def __init__(self, blocks: int, atoms: int, widths: tuple[int, int] = WIDTHS, **options: Any):
        super().__init__()
        e, w = widths
        self.embedding = nn.Parameter(torch.empty(blocks, e, **options))
        self.first = Affine(e, w, **options)
        self.second = Affine(w, w, **options)
        self.last = Affine(w, atoms, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding)
        e, w = self.first.in_features, self.first.out_features
        power = w * GELU_POWER  # expected squared length of the input of the second and the last layer
        for layer, std in ((self.first, e**-0.5), (self.second, power**-0.5), (self.last, STD * power**-0.5)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.constant_(layer.bias, layer.out_features**-0.5 if layer is self.last else 0.0)

    def forward(self, depth: int) -> Tensor:
        return self.last(F.gelu(self.second(F.gelu(self.first(self.embedding[depth])))))


class CoefficientTable(nn.Module):
    """c_l [S] of a block as row l of C [L, S]."""

    def __init__(self, blocks: int, atoms: int, **options: Any):
        super().__init__()
        self.values = nn.Parameter(torch.empty(blocks, atoms, **options))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if not loaded(self.values):
            self.values.copy_(depth_profile(*self.values.shape))

    def forward(self, depth: int) -> Tensor:
        return self.values[depth]


class Dictionary(nn.Module):
    """Atoms [S, d_out, d_in] and coefficients of the matrices that share them; called with a matrix's number, it gives W_l."""

    def __init__(
        self,
        key: str,
        blocks: int,
        shape: Sequence[int],
        atoms: int,
        coefficients: str,
        widths: tuple[int, int] = WIDTHS,
        **options: Any,
    ):
        super().__init__()
        self.key = key
        self.atoms = nn.Parameter(torch.empty(atoms, *shape, **options))
        self.coefficients: nn.Module = (
            CoefficientNetwork(blocks, atoms, widths, **options)
            if coefficients == "network"
            else CoefficientTable(blocks, atoms, **options)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.atoms, std=STD)  # the coefficients draw themselves

    def forward(self, depth: int) -> Tensor:
        kind = self.atoms.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return combine(self.coefficients(depth), self.atoms)

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the network by a table of its values."""
        network = self.coefficients
        assert isinstance(network, CoefficientNetwork)
        blocks = len(network.embedding)
        self.coefficients = CoefficientTable(blocks, len(self.atoms), **like(self.atoms)).train(network.training)
        self.coefficients.values.copy_(torch.stack([network(depth) for depth in range(blocks)]))
