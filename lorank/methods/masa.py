"""MASA: the attention projections of all blocks are mixtures of a few matrices, their atoms, which the blocks share.

    y = W_l x (+ b_l)    W_l = Σ_s c_ls D_s (+ B_l A_l)    l = 1..L blocks, s = 1..S atoms, one dictionary per projection type

    x [..., d_in]   atoms D [S, d_out, d_in]   coefficients C [L, S]   A_l [r, d_in]   B_l [d_out, r]   b_l [d_out]

In training c_l is no free parameter: a small network reads an embedding of the block, c_l = MLP(e_l), e_l [32], widths
32 → 64 → 64 → S with GELU. `freeze_coefficients` evaluates it once and keeps C alone. Query, key, value and output
never share an atom; MLPs, norms and embeddings stay dense. `groups` cuts the stack of blocks into consecutive groups with
dictionaries of their own, and `residual_rank` gives each block its B_l A_l; by default there is one group and no residual.
A group with as many atoms as blocks, as one of a single block, gets no residual: its atoms reach every weight without one.
`MASA.from_dense` finds all of this for a trained model without training: Matrix PCA, see `lorank.fit.pca`. Dictionaries hang
at the root of the model's body, as `lorank_atoms`, and layers refer to them: each tensor is registered, sharded,
decayed and saved once.

Cost of one projection type and group of L blocks: S d_in d_out + L S + L r (d_in + d_out) parameters, r = 0 if S = L, instead of
L d_in d_out, and L 32 + 6,272 + 65 S in place of L S while the network is there. Each call of a layer on n tokens spends
2 S d_in d_out FLOPs on W_l and 2 n r (d_in + d_out) on the residual, and twice that backward, beside the dense layer's.
W_l is kept for backward unless the block is checkpointed, so MASA saves weights, gradients and optimizer state, not
activations. Decoding forms W_l for each token: `lorank.merge` first where that matters.

Source: Zhussip et al., "Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning", AAAI
2026, arXiv 2508.04581. The paper trains one group without a residual; both are from its section on pretrained models.

Choices where the paper's text is silent (we had neither its appendix nor code): all widths of the network and all initial
values, which make c_ls = 1/√S + N(0, 0.02²), D ~ N(0, 0.02²), B_l = 0 and A_l ~ N(0, 1/d_in), so that W_l has an atom's
variance; key and value get half the residual rank of query and output, where the paper says less. W_l is formed in the
parameters' own precision also under autocast.
"""

import warnings
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.architectures import projection_type
from lorank.fields import Rank
from lorank.layers import linear
from lorank.method import Method, Site, check_table, rank_at
from lorank.rewriting import converted_with

WIDTH, HIDDEN, STD = 32, 64, 0.02
GELU_POWER = 0.4252
"""E[GELU(z)²] for z ~ N(0, 1): what keeps a GELU network's signal at unit variance from layer to layer."""


# ---- the mathematics


def combine(coefficients: Tensor, atoms: Tensor) -> Tensor:
    """W = Σ_s c_s D_s: coefficients [S], atoms [S, d_out, d_in] -> [d_out, d_in]."""
    return (coefficients[None] @ atoms.flatten(1)).view(atoms.shape[1:])


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` applied to one vector, as a sum of products: the last bits of a matrix-vector product depend on where in
    memory the weights lie, so that a loaded model would not repeat those of the saved one."""
    return (layer.weight * x).sum(-1) + layer.bias


def depth_profile(blocks: int, atoms: int) -> Tensor:
    """Coefficients [L, S] of unit rows in which each atom serves the blocks around its own share of the depth."""
    place = (torch.arange(blocks) + 0.5)[:, None] * atoms / blocks - (torch.arange(atoms) + 0.5)
    return F.normalize(torch.exp(-place.square() / 2), dim=1)


# ---- the modules


class CoefficientNetwork(nn.Module):
    """c_l [S] of a block as a function of its trainable embedding."""

    def __init__(self, blocks: int, atoms: int, **options: Any):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(blocks, WIDTH, **options))
        self.first = nn.Linear(WIDTH, HIDDEN, **options)
        self.second = nn.Linear(HIDDEN, HIDDEN, **options)
        self.last = nn.Linear(HIDDEN, atoms, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding)
        power = HIDDEN * GELU_POWER  # expected squared length of what the second and the last layer read
        for layer, std in ((self.first, WIDTH**-0.5), (self.second, power**-0.5), (self.last, STD * power**-0.5)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.constant_(layer.bias, layer.out_features**-0.5 if layer is self.last else 0.0)

    def forward(self, depth: int) -> Tensor:
        hidden = F.gelu(affine(self.first, self.embedding[depth]))
        return affine(self.last, F.gelu(affine(self.second, hidden)))


class CoefficientTable(nn.Module):
    """c_l [S] of a block as row l of C [L, S]."""

    def __init__(self, blocks: int, atoms: int, **options: Any):
        super().__init__()
        self.values = nn.Parameter(torch.empty(blocks, atoms, **options))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        version = self.values._version
        nn.init.zeros_(self.values)
        if self.values._version != version:  # else transformers has stopped the draw: the values are those of a file
            self.values.copy_(depth_profile(*self.values.shape))

    def forward(self, depth: int) -> Tensor:
        return self.values[depth]


class Dictionary(nn.Module):
    """Atoms [S, d_out, d_in] and coefficients of one projection type; called with a depth, it gives W_l."""

    def __init__(self, key: str, blocks: int, shape: Sequence[int], atoms: int, coefficients: str, **options: Any):
        super().__init__()
        self.key = key
        self.atoms = nn.Parameter(torch.empty(atoms, *shape, **options))
        kind = CoefficientNetwork if coefficients == "network" else CoefficientTable
        self.coefficients: nn.Module = kind(blocks, atoms, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.atoms, std=STD)  # the coefficients draw themselves

    def forward(self, depth: int) -> Tensor:
        with torch.autocast(self.atoms.device.type, enabled=False):
            return combine(self.coefficients(depth), self.atoms)

    @torch.no_grad()
    def freeze(self) -> None:
        """Put a table of the network's values in its place."""
        network = self.coefficients
        assert isinstance(network, CoefficientNetwork)
        blocks = len(network.embedding)
        self.coefficients = CoefficientTable(blocks, len(self.atoms), **_like(self.atoms)).train(network.training)
        self.coefficients.values.copy_(torch.stack([network(depth) for depth in range(blocks)]))


class MASALinear(nn.Module):
    """y = W_l x + b_l. Of W_l only a residual B_l A_l is the layer's own; the rest comes from a dictionary registered elsewhere, in
    which the block is number `depth`."""

    dictionary: Dictionary

    def __init__(self, dictionary: Dictionary, depth: int, bias: bool, residual_rank: int = 0):
        super().__init__()
        (_, d_out, d_in), options = dictionary.atoms.shape, _like(dictionary.atoms)
        object.__setattr__(self, "dictionary", dictionary)  # no submodule: the body owns it; copies and pickles follow
        self.depth = depth
        self.bias = nn.Parameter(torch.empty(d_out, **options)) if bias else None
        self.A: Any = nn.Linear(d_in, residual_rank, bias=False, **options) if residual_rank else None
        self.B: Any = linear(residual_rank, d_out, bias=False, **options) if residual_rank else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.A is not None:
            nn.init.normal_(self.A.weight, std=self.A.in_features**-0.5)
            nn.init.zeros_(self.B.weight)

    def weight(self) -> Tensor:
        """W_l [d_out, d_in], residual included."""
        shared = self.dictionary(self.depth)
        return shared if self.A is None else shared + self.B.weight @ self.A.weight

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.dictionary(self.depth), self.bias)
        return y if self.A is None else y + self.B(self.A(x))

    def extra_repr(self) -> str:
        atoms, d_out, d_in = self.dictionary.atoms.shape
        residual = "" if self.A is None else f", residual_rank={self.A.out_features}"
        return f"d_in={d_in}, d_out={d_out}, atoms={atoms}{residual}"


def _like(tensor: Tensor) -> dict[str, Any]:
    return {"device": tensor.device, "dtype": tensor.dtype}


# ---- the method

VARIANTS = {"qkv": ("query", "key", "value"), "qkvo": ("query", "key", "value", "output")}
COEFFICIENTS = ("network", "table")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class MASA(Method):
    """MASA with its hyper-parameters; ValueError for values out of range."""

    name: ClassVar[str] = "masa"

    atoms: int | float = 1 / 3
    """S of each group: a number, or a fraction of the group's blocks (the paper's L/3); at least one, at most one per block."""
    variant: Literal["qkv", "qkvo"] = "qkvo"
    """Which projections are shared; "qkv" leaves the output projection dense and costs the paper less accuracy."""
    coefficients: Literal["network", "table"] = "network"
    """Where c_l comes from: the network, or a table C that is trained itself, with a depth-aware start."""
    groups: int | Sequence[int] = 1
    """Consecutive blocks with atoms of their own: the number of groups, as equal as can be, or the first block of each: (0, 4, 9)."""
    residual_rank: Rank | None = None
    """r, None for no residual: an integer or a fraction of the width, of which key and value get half; or a table {pattern: either},
    taken as it is. Of no effect in groups with as many atoms as blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = _is_whole(self.atoms) and self.atoms >= 1
        if not whole and not (isinstance(self.atoms, float) and 0 < self.atoms < 1):
            raise ValueError(f"atoms={self.atoms!r} is neither an integer >= 1 nor a fraction of the blocks in (0, 1)")
        for field, known in (("variant", VARIANTS), ("coefficients", COEFFICIENTS)):
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"{field}={value!r} is none of {', '.join(known)}")
        if isinstance(self.groups, int):
            if not _is_whole(self.groups) or self.groups < 1:
                raise ValueError(f"groups={self.groups!r} is not positive; give 1 for atoms that all blocks share")
        else:
            firsts = tuple(self.groups) if isinstance(self.groups, Sequence) else ()
            if not all(map(_is_whole, firsts)) or firsts[:1] != (0,) or firsts != tuple(sorted({*firsts})):
                what = "neither a number nor the first block of each group, ascending from 0"
                raise ValueError(f"groups={self.groups!r} is {what}")
            object.__setattr__(self, "groups", firsts)

    def count(self, blocks: int) -> int:
        """S of a group of that many blocks."""
        return min(self.atoms, blocks) if isinstance(self.atoms, int) else max(1, round(self.atoms * blocks))

    def rank_of(self, site: Site, blocks: int) -> int:
        """r at a site whose group has that many blocks; never more than its narrower side, and 0 where atoms are enough."""
        if self.residual_rank is None or self.count(blocks) >= blocks:
            return 0
        rank = min(rank_at(self.residual_rank, site), site.d_in, site.d_out)
        less = not isinstance(self.residual_rank, Mapping) and projection_type(site.name) in ("key", "value")
        return max(1, rank // 2) if less else rank

    def split(self, stack: Sequence[Site]) -> list[list[Site]]:
        """All depths of one projection, in groups; ValueError for a group without a block."""
        if isinstance(self.groups, int):
            found: list[list[Site]] = [[] for _ in range(self.groups)]
            for index, site in enumerate(stack):
                found[index * self.groups // len(stack)].append(site)
        else:
            found = [[] for _ in self.groups]
            for site in stack:
                found[bisect_right(self.groups, site.depth) - 1].append(site)
        if not all(found):
            blocks = f"the blocks {stack[0].depth} to {stack[-1].depth} of {stack[0].role}"
            raise ValueError(f"groups={self.groups}: of {blocks} none would be in group {found.index([])}; take fewer")
        return found

    def wants(self, site: Site) -> bool:
        return projection_type(site.name) in VARIANTS[self.variant]

    def check(self, sites: Sequence[Site]) -> None:
        stacks: dict[str, list[Site]] = {}
        for site in sites:
            stacks.setdefault(site.role, []).append(site)
        found = {projection_type(site.name) for site in sites}
        if lacking := [kind for kind in VARIANTS[self.variant] if kind not in found]:
            raise ValueError(
                f"masa shares {', '.join(VARIANTS[self.variant])} but finds no {' nor '.join(lacking)} among {', '.join(stacks)}; "
                "choose another variant, targets or architecture"
            )
        if self.residual_rank is not None:
            check_table(self.residual_rank, sites, "residual_rank")
        large: dict[str, list[str]] = {}
        for role, stack in stacks.items():
            if len(kinds := {(*m.weight.shape, m.weight.dtype, m.weight.device) for *_, m in stack}) > 1:
                raise ValueError(
                    f"{role} differs from block to block ({kinds}), so blocks cannot share its atoms; exclude those that differ"
                )
            if fault := self._no_smaller(stack):
                large.setdefault(fault, []).append(role)
        for fault, roles in large.items():
            warnings.warn(f"there are no fewer {fault.format(', '.join(roles))}", stacklevel=2)

    def _no_smaller(self, stack: Sequence[Site]) -> str | None:
        """What is as large as dense in all depths of one projection, {}, and what to change; None if they are smaller."""
        groups = self.split(stack)
        if all(self.count(len(group)) == len(group) for group in groups):  # which then have no residuals
            if len(stack) == 1:
                return "atoms than blocks in {}, which are in one block alone; exclude them"
            single = len(groups) == len(stack)
            return "atoms than blocks in {}" + (
                ", for each group is one block; take fewer groups" if single else "; lower atoms"
            )
        saved = len(stack) - sum(self.count(len(group)) for group in groups)  # in dense matrices, as what follows
        ranks = [(self.rank_of(site, len(group)), site.break_even_rank) for group in groups for site in group]
        if sum(rank / even for rank, even in ranks) < saved:
            return None
        enough = sum(min(rank, 1) / even for rank, even in ranks) < saved
        return "weights in atoms and residuals than dense in {}; " + ("lower" if enough else "drop") + " residual_rank"

    def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
        groups, layers = self.split(sites), []
        for number, group in enumerate(groups):
            weight, key = group[0].linear.weight, group[0].role.replace(".*.", ".").replace(".", "_")
            kind = f"{key}_{number}" if len(groups) > 1 else key, len(group), weight.shape, self.count(len(group))
            shared = Dictionary(*kind, self.coefficients, **_like(weight))
            for depth, site in enumerate(group):
                layers.append(MASALinear(shared, depth, site.linear.bias is not None, self.rank_of(site, len(group))))
        return layers

    def finish(self, model: nn.Module) -> None:
        """Register the dictionaries once, on the body, so that a model with a head and one without have the same."""
        shared = {layer.dictionary.key: layer.dictionary for layer in model.modules() if isinstance(layer, MASALinear)}
        _body(model).lorank_atoms = nn.ModuleDict(shared)

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        assert isinstance(module, MASALinear)
        return module.weight(), module.bias

    def finalize(self, model: nn.Module) -> None:
        if self.coefficients == "network":
            freeze_coefficients(model)

    def undo(self, model: nn.Module) -> None:
        del _body(model).lorank_atoms

    @classmethod
    def from_dense(cls, model: Model, *, data: Iterable[Tensor] | None = None, **fields: Any) -> Model:
        """Matrix PCA: rewrite an existing model in place, keeping its weights as well as it can; see `lorank.fit.pca.from_dense`.

        Args:
            data: batches of token ids [b, n], for a number of groups and for residuals.
            fields: as of the class, and `targets` and `exclude` as of `lorank.convert`.
        """
        from lorank.fit.pca import from_dense

        return from_dense(model, data=data, **fields)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _body(model: nn.Module) -> Any:
    return getattr(model, "base_model", model)


def freeze_coefficients(model: Model) -> Model:
    """After training: evaluate the coefficient networks of a MASA model once, in place, and keep the tables C alone.

    Outputs stay the same, in fp32 bit by bit, and so do they after saving and loading. Optimizers must be made afresh.

    Raises:
        ValueError: the model is no MASA model with coefficient networks.
    """
    recorded = converted_with(model)
    if recorded is None or recorded["method"] != MASA.name or recorded["arguments"]["coefficients"] != "network":
        raise ValueError(f"this {type(model).__name__} has no coefficient network to freeze; convert with MASA() first")
    for dictionary in _body(model).lorank_atoms.values():
        dictionary.freeze()
    recorded["arguments"]["coefficients"] = "table"
    return model
