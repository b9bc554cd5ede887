"""OSFT: all singular pairs of a trained weight but the leading ones are tuned, in directions that the leading ones do not use.

    W = U_h S_h V_hᵀ + U S Vᵀ      U_h [d_out, k]  S_h [k]  V_h [d_in, k] frozen     U [d_out, m-k]  S [m-k]  V [d_in, m-k]
    before a step:  ∂U <- ∂U - U_h U_hᵀ ∂U,   ∂V <- ∂V - V_h V_hᵀ ∂V                                            (1)
    after it:       U <- U - U_h U_hᵀ U,      V <- V - V_h V_hᵀ V                                              (2)
    next task:      the split is made anew, of W as it is then
    by importance:  k = (a + I (b - a)) m,   I the mean cosine of a block's inputs and outputs, over its mean            (3)

Saves: nothing; it protects what the model knows.

m = min(d_in, d_out). So U_hᵀ W = S_h V_hᵀ and W V_h = U_h S_h forever: inputs along V_h give what they gave. With `form="weight"`
W itself is trained, ∂W and W projected on both sides; the weights that can be reached are the same, the path is not.

Cost of a layer: (d_in + d_out + 1)(m - k) trained parameters, which is *more* than the dense layer's d_in d_out if k is small, and
(d_in + d_out + 1) k frozen ones; for n tokens 2 n m (d_in + d_out) operations forward, twice as often as the dense layer for a square
matrix. With form="weight" d_in d_out trained parameters and the dense layer's operations. A step costs 8 k (m - k)(d_in + d_out) more,
or 16 k d_in d_out.

Source: Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", arXiv 2504.07097, and the
authors' repository.

Confirmed in the authors' code: the split and (1), and that it is made anew for each task; all projections. Departures. (2) is ours:
theirs, as peft's OSF, stops at (1), and under Adam the protected part is lost (peft 0.21.2 after 1,000 steps of AdamW: up to 7 % of
the change lies in it, by `benchmarks/protected_core.py`). They choose k of each matrix by (3), between half of m and m; here `rank` is k, one share for all unless a table
says otherwise, such as `lorank.adapters.importance` makes. There (3) is of a block, our reading, as x and W x of a matrix that is not square
cannot be compared. `form="weight"` is ours. Embeddings, norms and biases are frozen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.adapters.gated import Adapted, Adapter
from lorank.adapters.protected import Guard, leading, project_
from lorank.fields import Rank
from lorank.layers import like, loaded, own_memory, wide
from lorank.method import Site, StepHook, rank_at

Form = Literal["factors", "weight"]


# ---- the layers


class OSFTLinear(Adapted):
    """y = U_h S_h V_hᵀ x + U S Vᵀ x + b."""

    U_high: nn.Parameter
    S_high: nn.Parameter
    V_high: nn.Parameter
    U_low: nn.Parameter
    S_low: nn.Parameter
    V_low: nn.Parameter

    def __init__(self, dense: nn.Linear, rank: int):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        m, new = min(dense.weight.shape), like(dense.weight)
        k = min(rank, m - 1)  # at least one pair trains
        for name, width in (("high", k), ("low", m - k)):
            train = name == "low"
            for factor, shape in (("U", [len(dense.weight), width]), ("S", [width]), ("V", [dense.in_features, width])):
                self.register_parameter(
                    f"{factor}_{name}", nn.Parameter(torch.empty(shape, **new), requires_grad=train)
                )
        self.bias = own_memory(dense).bias
        self.split(dense.weight)

    @property
    def rank(self) -> int:
        return len(self.S_high)

    @torch.no_grad()
    def split(self, weight: Tensor) -> None:
        """Become the dense map `weight` [d_out, d_in], with its leading pairs protected."""
        if weight.is_meta:
            return
        U, S, V = leading(weight, 0)
        for high, low, values in (
            (self.U_high, self.U_low, U),
            (self.S_high, self.S_low, S),
            (self.V_high, self.V_low, V),
        ):
            high.copy_(values[..., : self.rank])
            low.copy_(values[..., self.rank :])

    def reset_parameters(self) -> None:
        """The factors of a weight drawn as nn.Linear draws it, unless they came from a file."""
        if not all(map(loaded, (self.U_high, self.S_high, self.V_high, self.U_low, self.S_low, self.V_low))):
            drawn = self.U_low.new_empty(self.out_features, self.in_features)
            self.split(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))

    def weight(self) -> Tensor:
        """W [d_out, d_in], in single precision or better."""
        high, low = ((wide(U) * S) @ wide(V).T for U, S, V in ((self.U_high, self.S_high, self.V_high), self.low()))
        return high + low

    def low(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.U_low, self.S_low, self.V_low

    def forward(self, x: Tensor) -> Tensor:
        kept = F.linear(F.linear(x, self.V_high.T) * self.S_high, self.U_high, self.bias)
        return kept + F.linear(F.linear(x, self.V_low.T) * self.S_low, self.U_low)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        return self.weight().to(self.U_low.dtype), self.bias

    def trained(self) -> Iterator[nn.Parameter]:
        return iter((self.U_low, self.S_low, self.V_low))

    def next_task(self) -> bool:
        self.split(self.weight())
        return True

    def project_gradients(self) -> None:
        """(1)."""
        project_(self.U_low.grad, self.U_high)
        project_(self.V_low.grad, self.V_high)

    def project_weights(self) -> None:
        """(2)."""
        project_(self.U_low, self.U_high)
        project_(self.V_low, self.V_high)

    def extra_repr(self) -> str:
        return f"d_in={self.in_features}, d_out={self.out_features}, protected={self.rank} of {min(self.in_features, self.out_features)}"


class OSFTWeight(Adapted):
    """y = W x + b, with the leading pairs of W protected on both sides."""

    def __init__(self, dense: nn.Linear, rank: int):
        super().__init__()
        self.W = own_memory(dense)
        if self.W.bias is not None:
            self.W.bias.requires_grad_(False)
        k, new = min(rank, min(dense.weight.shape) - 1), like(dense.weight)
        self.U = nn.Parameter(torch.empty(dense.out_features, k, **new), requires_grad=False)
        self.S = nn.Parameter(torch.empty(k, **new), requires_grad=False)
        self.V = nn.Parameter(torch.empty(dense.in_features, k, **new), requires_grad=False)
        self.next_task()

    @torch.no_grad()
    def next_task(self) -> bool:
        """Protect the leading pairs of W as it is."""
        if not self.W.weight.is_meta:
            for kept, value in zip((self.U, self.S, self.V), leading(self.W.weight, len(self.S)), strict=True):
                kept.copy_(value)
        return True

    def reset_parameters(self) -> None:
        if not all(map(loaded, (self.U, self.S, self.V))):
            self.next_task()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.W(x)
        return y

    def merged(self) -> tuple[Tensor, Tensor | None]:
        return self.W.weight, self.W.bias

    def trained(self) -> Iterator[nn.Parameter]:
        return (p for p in self.W.parameters() if p is self.W.weight)

    def project_gradients(self) -> None:
        project_(self.W.weight.grad, self.U)
        project_(self.W.weight.grad, self.V, rows=True)

    def project_weights(self) -> None:
        """W keeps U_hᵀ W = S_h V_hᵀ and W V_h = U_h S_h: what differs is taken out, so that no error adds up."""
        kept = (wide(self.U) * self.S) @ wide(self.V).T
        change = wide(self.W.weight) - kept
        project_(change, self.U)
        project_(change, self.V, rows=True)
        self.W.weight.copy_(kept + change)

    def extra_repr(self) -> str:
        return f"protected={len(self.S)} of {min(self.W.weight.shape)}"


FORMS: dict[str, type[Adapted]] = {"factors": OSFTLinear, "weight": OSFTWeight}


# ---- the method


@dataclass(frozen=True, kw_only=True)
class OSFT(Adapter):
    """Full tuning outside the leading subspace; ``lorank.convert(model, OSFT(rank=0.5))``, then `lorank.next_task`."""

    name: ClassVar[str] = "osft"

    rank: Rank = 0.5
    """k, singular pairs that are protected, at most all but one: an integer, a fraction of the narrower side, or {pattern: either}."""
    form: Form = "factors"
    """What is trained: the remaining pairs, as in the paper, or W itself, with fewer parameters unless k is large."""

    def build(self, site: Site) -> nn.Module:
        return FORMS[self.form](site.linear, rank_at(self.rank, site))

    def layers(self, model: nn.Module) -> dict[str, Any]:
        return {name: module for name, module in model.named_modules() if isinstance(module, FORMS[self.form])}

    def inseparable(self, model: nn.Module) -> str:
        return "it changes all of W"

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook:
        return Guard(optimizer, self.layers(model).values())
