"""MASA: the attention projections of all blocks are mixtures of a few matrices, their atoms, which the blocks share.

    y = W_l x (+ b_l)    W_l = Σ_s c_ls D_s    l = 1..L blocks, s = 1..S atoms, one dictionary per projection type

    x [..., d_in]   atoms D [S, d_out, d_in]   coefficients C [L, S]   b_l [d_out] (each block's own)

In training c_l is no free parameter: a small network reads an embedding of the block, c_l = MLP(e_l), e_l [32], widths
32 → 64 → 64 → S with GELU. `freeze_coefficients` evaluates it once and keeps C alone. Query, key, value and output
never share an atom; MLPs, norms and embeddings stay dense. The dictionaries hang at the root of the model's body, as
`lorank_atoms`, and layers refer to them: each tensor is registered, sharded, decayed and saved once.

Cost of one projection type: S d_in d_out + L S parameters instead of L d_in d_out, and L 32 + 6,272 + 65 S in place of
L S while the network is there. Each call of a layer spends 2 S d_in d_out FLOPs on W_l, and twice that backward, beside
the dense layer's. W_l is kept for backward unless the block is checkpointed, so MASA saves weights, gradients and
optimizer state, not activations. Decoding forms W_l for each token: `lorank.merge` first where that matters.

Source: Zhussip et al., "Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning", AAAI
2026, arXiv 2508.04581.

Choices where the paper's text is silent (we had neither its appendix nor code): all widths of the network and all initial values, which
make c_ls = 1/√S + N(0, 0.02²), D ~ N(0, 0.02²), so that W_l has an atom's variance. W_l is formed in the parameters' own
precision also under autocast. Departures: Matrix PCA treats all blocks as one group and drops the residual; the paper
groups blocks by drift and keeps a low-rank part of the whitened residual.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.conversion import convert, converted_with
from lorank.parametrization import Parametrization, Site

WIDTH, HIDDEN, STD = 32, 64, 0.02
GELU_POWER = 0.4252
"""E[GELU(z)²] for z ~ N(0, 1): what keeps a GELU network's signal at unit variance from layer to layer."""


# ---- the mathematics


def combine(coefficients: Tensor, atoms: Tensor) -> Tensor:
    """W = Σ_s c_s D_s: coefficients [S], atoms [S, d_out, d_in] -> [d_out, d_in]."""
    return (coefficients[None] @ atoms.flatten(1)).view(atoms.shape[1:])


def compression(blocks: int, atoms: int, shared: int) -> float:
    """Part of the attention's parameters that goes when `shared` of its four projections have atoms; C is not counted.

    >>> compression(12, 4, 3)
    0.5
    """
    return shared / 4 * (1 - atoms / blocks)


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` applied to one vector, as a sum of products: the last bits of a matrix-vector product depend on where in
    memory the weights lie, so that a loaded model would not repeat those of the saved one."""
    return (layer.weight * x).sum(-1) + layer.bias


def matrix_pca(weights: Tensor, atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """The dictionary nearest to given matrices in Frobenius norm (arXiv 2508.04581, Matrix PCA).

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
        raise ValueError(f"atoms={atoms}: {len(weights)} matrices span 1 to {len(weights)} atoms; choose one of these")
    flat = weights.flatten(1).to(torch.promote_types(weights.dtype, torch.float32))  # [L, d_out d_in]
    _, values, basis = torch.linalg.svd(flat, full_matrices=False)
    basis = basis[:atoms]
    found = basis.view(atoms, *weights.shape[1:]), flat @ basis.T
    return found[0].to(weights.dtype), found[1].to(weights.dtype), values[atoms:].square().sum()


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
        blocks, options = len(network.embedding), {"device": self.atoms.device, "dtype": self.atoms.dtype}
        self.coefficients = CoefficientTable(blocks, len(self.atoms), **options).train(network.training)
        self.coefficients.values.copy_(torch.stack([network(depth) for depth in range(blocks)]))

    @torch.no_grad()
    def fit(self, weights: Tensor) -> None:
        """Matrix PCA of weights [L, d_out, d_in]; there must be a table."""
        assert isinstance(self.coefficients, CoefficientTable)
        atoms, values, _ = matrix_pca(weights, len(self.atoms))
        self.atoms.copy_(atoms)
        self.coefficients.values.copy_(values)


class MASALinear(nn.Module):
    """y = W_l x + b_l; W_l comes from a dictionary that is registered elsewhere."""

    dictionary: Dictionary

    def __init__(self, dictionary: Dictionary, depth: int, bias: bool):
        super().__init__()
        atoms = dictionary.atoms
        object.__setattr__(self, "dictionary", dictionary)  # no submodule: the body owns it; copies and pickles follow
        self.depth = depth
        self.bias = nn.Parameter(torch.empty(atoms.shape[1], device=atoms.device, dtype=atoms.dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dictionary(self.depth), self.bias)

    def extra_repr(self) -> str:
        atoms, d_out, d_in = self.dictionary.atoms.shape
        return f"d_in={d_in}, d_out={d_out}, atoms={atoms}"


# ---- the method

PROJECTION = re.compile(
    r"(?:^|\.)(?:self_)?(?:attn|attention)\.(?:\w+\.)*"
    r"(?:(?P<query>q_proj|q_lin|query)|(?P<key>k_proj|k_lin|key)|(?P<value>v_proj|v_lin|value)"
    r"|(?P<output>o_proj|out_proj|out_lin|c_proj|dense))$"
)
"""Names that architectures give to the four projections of self-attention; cross-attention is not rewritten."""
VARIANTS = {"qkv": ("query", "key", "value"), "qkvo": ("query", "key", "value", "output")}
COEFFICIENTS, STARTS = ("network", "table"), ("random", "pca")
Model = TypeVar("Model", bound=nn.Module)


def projection_type(name: str) -> str | None:
    """ "query", "key", "value" or "output" by a module's full name; None for what is not self-attention.

    >>> projection_type("transformer.h.0.attn.c_attn.query"), projection_type("transformer.h.0.mlp.c_proj")
    ('query', None)
    """
    found = PROJECTION.search(name)
    return found and found.lastgroup


@dataclass(frozen=True, kw_only=True)
class MASA(Parametrization):
    """MASA with its hyper-parameters; ValueError for values out of range and for ones that exclude each other."""

    name: ClassVar[str] = "masa"

    atoms: int | float = 1 / 3
    """S: a number, or a fraction of the number of blocks (the paper's L/3), at least one."""
    variant: Literal["qkv", "qkvo"] = "qkvo"
    """Which projections are shared; "qkv" leaves the output projection dense and costs the paper less accuracy."""
    coefficients: Literal["network", "table"] = "network"
    """Where c_l comes from: the network, or a table C that is trained itself, with a depth-aware start."""
    start: Literal["random", "pca"] = "random"
    """ "pca" keeps the weights of the model that is converted, as well as S atoms can (with coefficients="table")."""

    def __post_init__(self) -> None:
        whole = isinstance(self.atoms, int) and not isinstance(self.atoms, bool) and self.atoms >= 1
        if not whole and not (isinstance(self.atoms, float) and 0 < self.atoms < 1):
            raise ValueError(f"atoms={self.atoms!r} is neither an integer >= 1 nor a fraction of the blocks in (0, 1)")
        for field, known in (("variant", VARIANTS), ("coefficients", COEFFICIENTS), ("start", STARTS)):
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"{field}={value!r} is none of {', '.join(known)}")
        if self.start == "pca" and self.coefficients != "table":
            raise ValueError("start='pca' finds coefficients that no network holds; add coefficients='table'")

    def count(self, blocks: int) -> int:
        """S for a stack of that many blocks."""
        return self.atoms if isinstance(self.atoms, int) else max(1, round(self.atoms * blocks))

    def wants(self, site: Site) -> bool:
        return projection_type(site.name) in VARIANTS[self.variant]

    def check(self, sites: Sequence[Site]) -> None:
        stacks: dict[str, list[nn.Linear]] = {}
        for site in sites:
            stacks.setdefault(site.role, []).append(site.linear)
        found = {projection_type(site.name) for site in sites}
        if lacking := [kind for kind in VARIANTS[self.variant] if kind not in found]:
            raise ValueError(
                f"masa shares {', '.join(VARIANTS[self.variant])} but finds no {' nor '.join(lacking)} among {', '.join(stacks)}; "
                "choose another variant, targets or architecture"
            )
        for role, linears in stacks.items():
            if len(kinds := {(*m.weight.shape, m.weight.dtype, m.weight.device) for m in linears}) > 1:
                raise ValueError(
                    f"{role} differs from block to block ({kinds}), so blocks cannot share its atoms; exclude those that differ"
                )
            if self.start == "pca" and self.count(len(linears)) > len(linears):
                raise ValueError(f"atoms={self.atoms}: PCA of {len(linears)} blocks gives no more than that; lower it")
        if many := [role for role, linears in stacks.items() if self.count(len(linears)) >= len(linears)]:
            warnings.warn(f"there are no fewer atoms than blocks in {', '.join(many)}; lower atoms", stacklevel=2)

    def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
        weight, blocks, pca = sites[0].linear.weight, len(sites), self.start == "pca"
        key = sites[0].role.replace(".*.", ".").replace(".", "_")
        options = {"device": weight.device, "dtype": weight.dtype}
        shared = Dictionary(key, blocks, weight.shape, self.count(blocks), self.coefficients, **options)
        layers = [MASALinear(shared, depth, site.linear.bias is not None) for depth, site in enumerate(sites)]
        if pca and not weight.is_meta:
            shared.fit(torch.stack([site.linear.weight for site in sites]))
            for layer, site in zip(layers, sites, strict=True):
                if layer.bias is not None:
                    layer.bias.data.copy_(site.linear.bias)
        return layers

    def finish(self, model: nn.Module) -> None:
        """Register the dictionaries once, on the body, so that a model with a head and one without have the same."""
        shared = {layer.dictionary.key: layer.dictionary for layer in model.modules() if isinstance(layer, MASALinear)}
        _body(model).lorank_atoms = nn.ModuleDict(shared)

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        assert isinstance(module, MASALinear)
        return module.dictionary(module.depth), module.bias

    def finalize(self, model: nn.Module) -> None:
        if self.coefficients == "network":
            freeze_coefficients(model)

    def undo(self, model: nn.Module) -> None:
        del _body(model).lorank_atoms

    @classmethod
    def from_dense(cls, model: Model, **fields: Any) -> Model:
        """Rewrite an existing model in place, keeping its weights as well as S atoms can (Matrix PCA); `fields` as of the
        class."""
        return convert(model, cls(**{"coefficients": "table", "start": "pca", **fields}))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """A model that is built again gets its values from a file: there is nothing to analyse."""
        return super().from_dict({**fields, "start": "random"})


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
