"""Layers and helpers that methods share: two factors instead of a matrix or added to one, and linear layers of odd widths."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.rounding import rest_bytes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
ALIGNED = 8
"""Rows whose length is a multiple of this start at addresses that vector units read fast."""


# ---- factors


def entry_std(d_in: int, d_out: int, rank: int) -> float:
    """Standard deviation s of the entries of A and B with which those of B A have variance r s⁴ = 1 / (d_in + d_out).

    >>> round(entry_std(512, 1376, 128), 6)
    0.045102
    """
    return (rank * (d_in + d_out)) ** -0.25


def scale_at(alpha: float, scale: float | None, rank: int) -> float:
    """Multiplier of a low-rank term: `scale`, or α/r if it is None.

    >>> scale_at(32.0, None, 128), scale_at(32.0, 0.5, 128)
    (0.25, 0.5)
    """
    return alpha / rank if scale is None else scale


class LowRankLinear(nn.Module):
    """y = B σ(A x) + b instead of a dense layer; σ is "silu", "gelu", "relu", or None for a linear map.

    x [..., d_in]   A [r, d_in]   B [d_out, r]   b [d_out]
    """

    silent: tuple[str, ...] = ("B",)
    """Parts that are zero in a layer whose output starts at zero (`lorank.starts`); none if it cannot."""
    at_once: Callable[[Tensor, nn.Module], Tensor] | None = None
    """B σ(z) + b of z = A x and B as one operation (`lorank.speed.bottleneck`). It knows no layer, so that copies use their own B."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        bias: bool = False,
        activation: str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation = activation
        self.A = nn.Linear(d_in, rank, bias=False, device=device, dtype=dtype)
        self.B = linear(rank, d_out, bias=bias, device=device, dtype=dtype)
        LowRankLinear.reset_parameters(self)  # a subclass's own parameters do not exist yet

    def reset_parameters(self) -> None:
        """Draw A and B from normal distributions of standard deviation `entry_std`, and b as ``nn.Linear`` does for d_out inputs."""
        d_in, rank, d_out = self.A.in_features, self.A.out_features, self.B.out_features
        s = entry_std(d_in, d_out, rank)
        nn.init.normal_(self.A.weight, std=s)
        nn.init.normal_(self.B.weight, std=s)
        if self.B.bias is not None:
            nn.init.uniform_(self.B.bias, -(d_out**-0.5), d_out**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.A(x)  # [..., r]: all that CoLA-M keeps
        if self.at_once is not None:
            return self.at_once(z, self.B)
        return self.B(z if self.activation is None else ACTIVATIONS[self.activation](z))

    def standalone(self) -> tuple[str, dict[str, Any]]:
        """The layer as a class of `lorank.standalone`, and its arguments; see `lorank.portable`."""
        bias = self.B.bias is not None
        sizes = {"d_in": self.A.in_features, "d_out": self.B.out_features, "rank": self.A.out_features, "bias": bias}
        return "LowRank", {**sizes, "activation": self.activation}

    def extra_repr(self) -> str:
        sizes = f"d_in={self.A.in_features}, d_out={self.B.out_features}, rank={self.A.out_features}"
        return sizes if self.activation is None else f"{sizes}, activation={self.activation}"


class Gate(nn.Module):
    """A small map inside a layer, from its bottleneck to itself. Its matrices are no projections: AdamW moves them under every rule."""

    def draw(self) -> None:
        """Set the parameters to initial values."""
        raise NotImplementedError


class PartTime(nn.Module):
    """A layer with a part that runs in some steps of a run and not in others. Costs are means over the run; memory is the most."""

    passes: float = 1.0
    """In which share of the steps."""
    runs: bool = True
    """Whether in the next one."""


class FrozenPlusLowRank(nn.Module):
    """y = W x + s B A dropout(x) + b: a dense layer, which becomes the frozen W, and trained factors.

    x [..., d_in]   W [d_out, d_in]   A [r, d_in]   B [d_out, r]   b [d_out]   s = `scale`

    A subclass ends its ``__init__`` with ``reset_parameters()``.
    """

    silent: tuple[str, ...] = ("W", "B")
    edits_W: ClassVar[bool] = False
    """Whether W changes in place between steps."""

    def __init__(self, dense: nn.Linear, rank: int, *, scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale = scale
        self.W = own_memory(dense)
        self.W.weight.requires_grad_(False)
        self.A = nn.Linear(dense.in_features, rank, bias=False, **like(dense.weight))
        self.B = linear(rank, dense.out_features, bias=False, **like(dense.weight))
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()

    def reset_parameters(self) -> None:
        """Start as the dense layer: A Kaiming-uniform, B zero."""
        nn.init.zeros_(self.B.weight)
        nn.init.kaiming_uniform_(self.A.weight, a=5**0.5)

    @property
    def rest_bytes(self) -> int:
        """What a hook keeps of a W of 16 bits that is edited in place (`lorank.rounding`)."""
        return rest_bytes(self.W.weight.numel(), self.W.weight.dtype) if self.edits_W else 0

    def product(self) -> Tensor:
        """s B A [d_out, d_in], in single precision or better."""
        return self.scale * (wide(self.B.weight) @ wide(self.A.weight))

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight W + s B A and bias of the dense layer that computes the same."""
        weight = self.W.weight
        return (weight + self.product()).to(weight.dtype), self.W.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.W(x), self.B(self.A(self.dropout(x))), alpha=self.scale)

    def extra_repr(self) -> str:
        sizes = f"d_in={self.W.in_features}, d_out={self.W.out_features}, rank={self.A.out_features}"
        return f"{sizes}, scale={self.scale:g}"


class SpectralLinear(nn.Module):
    """A weight as its full SVD, W = U diag(S) V^T, of whose pairs of vectors `rank` are active and the others frozen.

    U [d_out, m]   S [m]   V [d_in, m]   m = min(d_in, d_out)   active pairs first; `index` tells which pair is at a place
    """

    index: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, *, bias: bool = False, **options: Any):
        super().__init__()
        m = min(d_in, d_out)
        self.d_in, self.d_out, self.rank = d_in, d_out, rank
        self.U_active = nn.Parameter(torch.empty(d_out, rank, **options))
        self.V_active = nn.Parameter(torch.empty(d_in, rank, **options))
        self.U_frozen = nn.Parameter(torch.empty(d_out, m - rank, **options), requires_grad=False)
        self.V_frozen = nn.Parameter(torch.empty(d_in, m - rank, **options), requires_grad=False)
        self.S = nn.Parameter(torch.empty(m, **options))
        self.bias = nn.Parameter(torch.empty(d_out, **options)) if bias else None
        self.register_buffer("index", torch.arange(m, device=options.get("device")))

    @torch.no_grad()
    def decompose(self, weight: Tensor) -> None:
        """Set the factors, in place, to the SVD of `weight`, the largest values active."""
        U, S, Vh = torch.linalg.svd(wide(weight), full_matrices=False)
        self.U_active.copy_(U[:, : self.rank])
        self.U_frozen.copy_(U[:, self.rank :])
        self.V_active.copy_(Vh[: self.rank].T)
        self.V_frozen.copy_(Vh[self.rank :].T)
        self.S.copy_(S)
        self.index.copy_(torch.arange(len(S)))

    @torch.no_grad()
    def swap(self, leaving: Tensor, entering: Tensor) -> None:
        """Exchange the pairs at places `leaving` (< rank) and `entering` (>= rank), in place; doing it twice restores both."""
        exchange(self.U_active, self.U_frozen, leaving, entering - self.rank)
        exchange(self.V_active, self.V_frozen, leaving, entering - self.rank)
        exchange(self.S, self.S, leaving, entering)
        exchange(self.index, self.index, leaving, entering)

    @torch.no_grad()
    def normalise(self) -> None:
        """Active vectors back to length one, singular values back to >= 0."""
        for vectors in (self.U_active, self.V_active):
            vectors.copy_(nn.functional.normalize(wide(vectors), dim=0))
        self.S.clamp_(min=0)

    def weight(self) -> Tensor:
        """U diag(S) V^T [d_out, d_in], in single precision at least."""
        U, V = torch.cat([self.U_active, self.U_frozen], 1), torch.cat([self.V_active, self.V_frozen], 1)
        return wide(U) * self.S @ wide(V).T

    @property
    def rest_bytes(self) -> int:
        """What a hook keeps of W if the factors have 16 bits and are computed anew (`lorank.rounding`)."""
        return rest_bytes(self.d_in * self.d_out, self.S.dtype)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_out={self.d_out}, rank={self.rank} of {len(self.S)}"


def factor(layer: nn.Module, side: str) -> nn.Parameter | None:
    """The "A" or "B" of a layer, which keeps it itself, as experts do, or in a linear layer of that name; None if it has none."""
    held = getattr(layer, side, None)
    found = held if isinstance(held, nn.Parameter) else getattr(held, "weight", None)
    return found if isinstance(found, nn.Parameter) else None


# ---- dense layers


def linear(d_in: int, d_out: int, **options: object) -> nn.Linear:
    """An ``nn.Linear``, or a `ColumnMajorLinear` if `d_out` is not a multiple of `ALIGNED`."""
    return (nn.Linear if d_out % ALIGNED == 0 else ColumnMajorLinear)(d_in, d_out, **options)  # type: ignore[arg-type]


class ColumnMajorLinear(nn.Linear):
    """y = x W^T (+ b) computed as (W x^T)^T, so that the rows of y in memory are as long as there are tokens.

    The 1B Llama's MLP is 5,461 wide. In a row-major y [n, 5461] seven rows of eight start at an unaligned address, which
    costs BLAS a third of its speed. Stored as [5461, n] they are aligned, and autograd keeps this layout in the backward
    pass. The values are those of ``nn.Linear`` up to the order of sums.
    """

    def forward(self, x: Tensor) -> Tensor:
        n = x.numel() // x.shape[-1]
        if n % ALIGNED:
            return super().forward(x)
        flat = x.reshape(n, -1)
        y = torch.bmm(self.weight[None], flat.T[None])[0].T  # [n, d_out], strides (1, n)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def own_memory(layer: nn.Linear) -> nn.Linear:
    """The same layer; tensors that are views (parts of a fused matrix) are copied, because files cannot hold views."""
    for name, value in list(layer.named_parameters()):
        if not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes:
            copied = value.detach().clone(memory_format=torch.contiguous_format)
            setattr(layer, name, nn.Parameter(copied, requires_grad=value.requires_grad))
    return layer


class Factor(nn.Linear):
    """A layer whose weight and bias its parent uses. Calling it gives both, so that hooks on calls (offloading, sharding) have
    them in place."""

    def forward(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return self.weight, self.bias


# ---- tensors


def exchange(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> None:
    """Swap columns (or entries) i of `a` with those j of `b`, in place; doing it twice restores both."""
    a[..., i], b[..., j] = b[..., j], a[..., i]  # the right-hand sides are copies


def like(tensor: Tensor) -> dict[str, Any]:
    """Device and dtype of a tensor, as options for a new one."""
    return {"device": tensor.device, "dtype": tensor.dtype}


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The type in which autocast computes where a tensor is; None where it is off or unknown (the meta device)."""
    kind = tensor.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def wide(tensor: Tensor) -> Tensor:
    """The tensor in single precision or better, for sums, norms, products of factors and decompositions."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def loaded(tensor: Tensor) -> bool:
    """Whether the values of a parameter or buffer came from a file, so that `reset_parameters` must keep them.

    transformers marks what it has loaded. Its own guard on ``nn.init`` covers values that are drawn there; this is for
    values that are computed.
    """
    return getattr(tensor, "_is_hf_initialized", False)
