"""MASA: the attention projections of all blocks are mixtures of a few matrices, the atoms, which the blocks share.

    W_l = Σ_s c_ls D_s (+ B_l A_l)    y = W_l x (+ b_l)    l = 1..L blocks, s = 1..S atoms, one dictionary per projection type

    x [..., d_in]   atoms D [S, d_out, d_in]   coefficients C [L, S]   A_l [r, d_in]   B_l [d_out, r]   b_l [d_out]

Saves: weights, gradients, optimizer state.

In training c_l is not a free parameter: a small network reads an embedding of the block, c_l = MLP(e_l), e_l [e], widths
e → w → w → S with GELU. `freeze_coefficients` evaluates it once and keeps C alone. Query, key, value and output share no
atom, unless `common_dictionary` makes one dictionary of all L projections of a block and all blocks (L then counts
matrices, each with its own e_l); MLPs, norms and embeddings stay dense. `groups` cuts the stack of blocks into
consecutive groups, each with its own dictionaries, and `residual_rank` gives each block its B_l A_l. A dictionary with as
many atoms as matrices has no residual, because its atoms already reach every weight. `lorank.fit_masa` finds all of this
for a trained model without training: Matrix PCA, see `lorank.fit.pca`. Dictionaries are registered once at the root of
the model's body, as `lorank_atoms`, and layers refer to them, so that each tensor is sharded, decayed and saved once.

Cost of one projection type and group of L blocks: S d_in d_out + L S + L r (d_in + d_out) parameters, r = 0 if S = L,
instead of L d_in d_out, and L e + w (e + w + 2) + S (w + 1) instead of L S while the network is there. In addition to the
dense layer's FLOPs, each call of a layer on n tokens spends 2 S d_in d_out on W_l and 2 n r (d_in + d_out) on the
residual, and twice that backward. W_l is kept for the backward pass unless the block is checkpointed, so MASA saves
weights, gradients and optimizer state, not activations. Decoding forms W_l for each token: use `lorank.merge` first where
that matters.

Source: Zhussip et al., "Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning", AAAI
2026, arXiv 2508.04581. The paper trains one group without a residual; both are from its section on pretrained models.

Choices where the paper's text is silent (we had neither its appendix nor code): all widths of the network and all initial
values, which make c_ls = 1/√S + N(0, 0.02²), D ~ N(0, 0.02²), B_l = 0 and A_l ~ N(0, 1/d_in), so that W_l has an atom's
variance; key and value get half the residual rank of query and output, where the paper says less. W_l is formed in the
parameters' own precision also under autocast.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.architectures import projection_type
from lorank.dictionary import WIDTHS, Dictionary, first_blocks, in_groups
from lorank.fields import Bounds, Count, Rank
from lorank.layers import like, linear
from lorank.method import Method, Site, by_role, check_table, rank_at
from lorank.rewriting import converted_with
from lorank.sites import body_of

VARIANTS = {"qkv": ("query", "key", "value"), "qkvo": ("query", "key", "value", "output")}
Model = TypeVar("Model", bound=nn.Module)


# ---- the layer


class MASALinear(nn.Module):
    """y = W_l x + b_l, where W_l is matrix number `depth` of a dictionary registered elsewhere plus the layer's own B_l A_l."""

    dictionary: Dictionary

    def __init__(self, dictionary: Dictionary, depth: int, bias: bool, residual_rank: int = 0):
        super().__init__()
        (_, d_out, d_in), options = dictionary.atoms.shape, like(dictionary.atoms)
        object.__setattr__(self, "dictionary", dictionary)  # not a submodule: the body owns it
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
        y = F.linear(x, self.dictionary(self.depth).to(x.device), self.bias)
        return y if self.A is None else y + self.B(self.A(x))

    def extra_repr(self) -> str:
        atoms, d_out, d_in = self.dictionary.atoms.shape
        residual = "" if self.A is None else f", residual_rank={self.A.out_features}"
        return f"d_in={d_in}, d_out={d_out}, atoms={atoms}{residual}"


# ---- the method


@dataclass(frozen=True, kw_only=True)
class MASA(Method):
    """MASA with its hyper-parameters."""

    name: ClassVar[str] = "masa"

    atoms: Count | Annotated[float, Bounds(above=0, below=1)] = 1 / 3
    """S of each dictionary: a number, or a fraction of the matrices that share it (the paper's L/3); at most one for each."""
    variant: Literal["qkv", "qkvo"] = "qkvo"
    """Which projections are shared; "qkv" leaves the output projection dense and costs the paper less accuracy."""
    coefficients: Literal["network", "table"] = "network"
    """Where c_l comes from: the network, or a trained table C with a depth-aware start."""
    embedding_width: Count = WIDTHS[0]
    """e, the width of a block's embedding in the network."""
    mlp_width: Count = WIDTHS[1]
    """w, the width of the network's two hidden layers."""
    common_dictionary: bool = False
    """Whether all projections share one dictionary (the paper's ablation) instead of one each. They must have the same shape."""
    groups: Count | Sequence[int] = 1
    """Consecutive blocks with their own atoms: the number of groups, as equal as can be, or the first block of each: (0, 4, 9)."""
    residual_rank: Rank | None = None
    """r, None for no residual: an integer or a fraction of the width, of which key and value get half; or a table {pattern:
    either}, used as it is. It has no effect where atoms are as many as the matrices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "groups", first_blocks(self.groups))
        if self.coefficients == "table" and (widths := (self.embedding_width, self.mlp_width)) != WIDTHS:
            raise ValueError(
                f"embedding_width and mlp_width must be left out with coefficients='table', which has no network, got {widths}"
            )

    def count(self, matrices: int) -> int:
        """S of a dictionary that this number of matrices share."""
        return min(self.atoms, matrices) if isinstance(self.atoms, int) else max(1, round(self.atoms * matrices))

    def rank_of(self, site: Site, matrices: int) -> int:
        """r at a site whose dictionary this number of matrices share: at most its narrower side, and 0 where atoms are enough."""
        if self.residual_rank is None or self.count(matrices) >= matrices:
            return 0
        rank = min(rank_at(self.residual_rank, site), site.d_in, site.d_out)
        less = not isinstance(self.residual_rank, Mapping) and projection_type(site.name) in ("key", "value")
        return max(1, rank // 2) if less else rank

    def split(self, stack: Sequence[Site]) -> list[list[Site]]:
        """One of the `stacks` in groups, each with a dictionary; ValueError if a group has no block."""
        return in_groups(stack, self.groups)

    def wants(self, site: Site) -> bool:
        return projection_type(site.name) in VARIANTS[self.variant]

    def stacks(self, sites: Sequence[Site]) -> Sequence[Sequence[Site]]:
        if not self.common_dictionary:
            return super().stacks(sites)
        found: dict[str, list[Site]] = {}
        for site in sorted(sites, key=lambda site: site.depth):
            found.setdefault(site.role.partition("*")[0], []).append(site)
        return [*found.values()]

    def check(self, sites: Sequence[Site]) -> None:
        found = {projection_type(site.name) for site in sites}
        if lacking := [kind for kind in VARIANTS[self.variant] if kind not in found]:
            raise ValueError(
                f"masa shares {', '.join(VARIANTS[self.variant])} but finds no {' or '.join(lacking)} among {', '.join(by_role(sites))}; "
                "choose another variant, targets or architecture"
            )
        if self.residual_rank is not None:
            check_table(self.residual_rank, sites, "residual_rank")
        cure = "leave out common_dictionary" if self.common_dictionary else "exclude the others"
        large: dict[str, list[str]] = {}
        for stack in self.stacks(sites):
            roles, weights = ", ".join(by_role(stack)), [site.linear.weight for site in stack]
            if len(kinds := {(*W.shape, W.dtype, W.device) for W in weights}) > 1:
                raise ValueError(f"{roles} must be the same in all blocks that share atoms, got {kinds}; {cure}")
            if (fault := self._fault(stack)) is not None:
                large.setdefault(fault, []).append(roles)
        for fault, found_in in large.items():
            warnings.warn(f"masa saves no weights in {', '.join(found_in)}: {fault}", stacklevel=2)

    def _fault(self, stack: Sequence[Site]) -> str | None:
        """Why the layers of a stack have at least the weights of the dense ones, and what to change; None if they have fewer."""
        groups = self.split(stack)
        saved = len(stack) - sum(self.count(len(group)) for group in groups)  # in dense layers, as all that follows
        if not saved:  # then there are no residuals
            if len(stack) == 1:
                return "they are in one block alone; exclude them"
            if len(groups) == len(stack):
                return "each group is one block; use fewer groups"
            return "there are as many atoms as matrices; use fewer atoms"
        ranks = [(self.rank_of(site, len(group)), site.break_even_rank) for group in groups for site in group]
        if sum(rank / even for rank, even in ranks) < saved:
            return None
        enough = sum(min(rank, 1) / even for rank, even in ranks) < saved
        return f"residuals have the weights that atoms save; {'lower' if enough else 'drop'} residual_rank"

    def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
        groups, layers = self.split(sites), []
        for number, group in enumerate(groups):
            weight, (place, _, rest) = group[0].linear.weight, group[0].role.partition("*.")
            key = (place + ("common" if self.common_dictionary else rest)).replace(".", "_")
            kind = f"{key}_{number}" if len(groups) > 1 else key, len(group), weight.shape, self.count(len(group))
            network = self.coefficients, (self.embedding_width, self.mlp_width)
            shared = Dictionary(*kind, *network, **like(weight))
            for depth, site in enumerate(group):
                layers.append(MASALinear(shared, depth, site.linear.bias is not None, self.rank_of(site, len(group))))
        return layers

    def finish(self, model: nn.Module) -> None:
        """Register the dictionaries once, on the body, so that a model with a head and one without have the same."""
        shared = {layer.dictionary.key: layer.dictionary for layer in model.modules() if isinstance(layer, MASALinear)}
        body_of(model).lorank_atoms = nn.ModuleDict(shared)

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        assert isinstance(module, MASALinear)
        return module.weight(), module.bias

    def finalize(self, model: nn.Module) -> None:
        if self.coefficients == "network":
            freeze_coefficients(model)

    def undo(self, model: nn.Module) -> None:
        del body_of(model).lorank_atoms


def freeze_coefficients(model: Model) -> Model:
    """After training: evaluate the coefficient networks of a MASA model once, in place, and keep the tables C alone.

    Outputs stay the same, in fp32 bit for bit, also after saving and loading. Create optimizers again.

    Raises:
        ValueError: the model is not a MASA model with coefficient networks.
    """
    recorded = converted_with(model)
    if recorded is None or recorded["method"] != MASA.name or recorded["arguments"]["coefficients"] != "network":
        raise ValueError(
            f"model must be converted with MASA(coefficients='network'), got {type(model).__name__} without a coefficient network"
        )
    for dictionary in body_of(model).lorank_atoms.values():
        dictionary.freeze()
    recorded["arguments"].update(coefficients="table", embedding_width=WIDTHS[0], mlp_width=WIDTHS[1])
    return model
