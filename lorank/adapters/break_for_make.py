"""Break-for-Make: an adapter of which half is frozen in orthonormal directions, so that two trained apart can be joined.

    y = W x + s (B A - [Q_B Q_A, 0; 0, 0]) x (+ b)              W [d_out, d_in] frozen                                     (1)
    A = [Q_A  A_t] [r, d_in]      B = [Q_B; B_t] [d_out, r]       [Q_Aᵀ; Q_B] has orthonormal columns, and is frozen         (2)
    joined: A_t of one adapter, B_t of another
    then, before a step:  ∂A <- (Bᵀ B + δ I)⁻¹ ∂A,   ∂B <- ∂B (A Aᵀ + δ I)⁻¹                                                (3)

Saves: gradients, optimizer state.

Q_A is the first half of A's columns, and Q_B the first half of B's rows; where r exceeds both halves together, rows of (2) are orthonormal
instead of columns. They are separate parameters, so that no weight decay
moves them. `join` makes the second stage of two first ones, with (3), which does not depend on how a product is split into B and A.

Cost of a layer: half of r (d_in + d_out) trained parameters, rounded up for each side, and the rest frozen; for n tokens 2 n (d_in d_out
+ r (d_in + d_out)) operations forward; backward the first term once more and the second one and a half times. (3) costs 4 r² (d_in +
d_out) each step. Merged, it is a dense layer; as a LoRA of peft it has rank 2 r.

Source: Xu et al., "Break-for-Make: Modular Low-Rank Adaptation for Composable Content-Style Customization", arXiv 2403.19456, and the
authors' repository ICTMCG/Break-for-make.

Confirmed in the authors' code: (2) for square projections, the halves, B_t zero at the start, r = 64, no scale; what is joined, and
(3) with δ = 0 under Adam. In a first stage one concept moves B at 1e-4 and others A at 1e-5, each with its own optimizer; the halves stay
frozen in the second, where both rates are 1e-4. Departures. They mask gradients, which weight decay ignores. They leave Q_B Q_A in and
draw A_t from a normal distribution, so that their model is another one before it has learned anything; here (1) takes the constant
out and A_t is zero, and both halves still get gradients at once. They adapt projections that are not square without (2). δ = 1e-6,
as Bᵀ B may be singular.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.adapters.gated import Adapted, Adapter, GatedAdapter
from lorank.factors import Pair
from lorank.fields import NonNegative, Positive, Rank
from lorank.layers import like, linear, loaded, wide
from lorank.method import Site, StepHook
from lorank.rewriting import converted_with

# ---- the mathematics


def preconditioned(A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """(3), in single precision or better; dA may have some columns of A only, and dB some rows of B."""
    A, B, dA, dB = map(wide, (A, B, dA, dB))
    ridge = delta * torch.eye(len(A), dtype=A.dtype, device=A.device)
    return torch.linalg.solve(B.T @ B + ridge, dA), torch.linalg.solve(A @ A.T + ridge, dB, left=False)


# ---- the layer


class BreakForMakeLinear(GatedAdapter):
    """`A` and `B` are A_t and B_t."""

    def __init__(self, dense: nn.Linear, rank: int, *, scale: float):
        super().__init__(dense, rank, scale=scale)
        half_in, half_out, new = dense.in_features // 2, dense.out_features // 2, like(dense.weight)
        self.A = nn.Linear(dense.in_features - half_in, rank, bias=False, **new)
        self.B = linear(rank, dense.out_features - half_out, bias=False, **new)
        self.Q_A = nn.Parameter(torch.empty(rank, half_in, **new), requires_grad=False)
        self.Q_B = nn.Parameter(torch.empty(half_out, rank, **new), requires_grad=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.A.weight)
        nn.init.zeros_(self.B.weight)
        if self.Q_A.is_meta or (loaded(self.Q_A) and loaded(self.Q_B)):
            return
        half_in = self.Q_A.shape[1]
        Q = nn.init.orthogonal_(wide(self.Q_A).new_empty(half_in + len(self.Q_B), self.rank))
        self.Q_A.copy_(Q[:half_in].T)
        self.Q_B.copy_(Q[half_in:])

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.tensor_split([self.Q_A.shape[1]], dim=-1)
        free = self.A(second)  # [..., r]
        update = torch.cat([F.linear(free, self.Q_B), self.B(free + F.linear(first, self.Q_A))], dim=-1)
        return torch.add(self.W(x), update, alpha=self.scale)

    def whole(self) -> tuple[Tensor, Tensor]:
        """A [r, d_in] and B [d_out, r], with their frozen halves."""
        return torch.cat([self.Q_A, self.A.weight], 1), torch.cat([self.Q_B, self.B.weight])

    def product(self) -> Tensor:
        A, B = map(wide, self.whole())
        update = B @ A
        update[: len(self.Q_B), : self.Q_A.shape[1]] = 0
        return self.scale * update

    def trained(self) -> Any:
        return iter((self.A.weight, self.B.weight))


# ---- the method


@dataclass(frozen=True, kw_only=True)
class BreakForMake(Adapter):
    """Half-frozen factors; ``lorank.convert(model, BreakForMake(rank=64))``, then `lorank.adapters.break_for_make.join`."""

    name: ClassVar[str] = "break-for-make"
    layer: ClassVar[type[Adapted]] = BreakForMakeLinear
    progress: ClassVar[tuple[str, ...]] = ("precondition",)

    rank: Rank = 64
    """Width of the factors: an integer, a fraction of the width, or {pattern: either}."""
    scale: Positive = 1.0
    """s."""
    precondition: bool = False
    """Whether gradients are preconditioned (3), as in the second stage; `join` sets it."""
    delta: NonNegative = 1e-6
    """δ."""

    def options(self, site: Site) -> dict[str, Any]:
        return {"scale": self.scale}

    def pair(self, module: nn.Module) -> Pair:
        """Of rank 2 r: [Q_B 0; B_t B_t] and [0 A_t; Q_A 0]."""
        assert isinstance(module, BreakForMakeLinear)
        Q_A, Q_B, A, B = (p.detach() for p in (module.Q_A, module.Q_B, module.A.weight, module.B.weight))
        left = torch.cat([torch.cat([Q_B, torch.zeros_like(Q_B)], 1), torch.cat([B, B], 1)])
        right = torch.cat([torch.cat([torch.zeros_like(Q_A), A], 1), torch.cat([Q_A, torch.zeros_like(A)], 1)])
        return module.scale * left, right

    @property
    def has_hook(self) -> bool:
        return self.precondition

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook | None:
        return Precondition(optimizer, self.layers(model).values(), self.delta) if self.precondition else None


@torch.no_grad()
def join(model: nn.Module, other: nn.Module) -> None:
    """Give a model A_t of another, in place, so that it has both concepts, and let (3) act from the next `lorank.step_hook` on.

    Both must have learned with the same Q_A and Q_B, so start both from one adapter, or one seed.

    Raises:
        ValueError: they do not both have this adapter, on the same layers and with the same ranks and frozen halves.
    """
    mine, theirs = (
        {name: m for name, m in each.named_modules() if isinstance(m, BreakForMakeLinear)} for each in (model, other)
    )
    record = converted_with(model)
    if (
        not mine
        or record is None
        or [(n, m.A.weight.shape) for n, m in mine.items()] != [(n, m.A.weight.shape) for n, m in theirs.items()]
    ):
        raise ValueError("both models must have the adapter break-for-make, on the same layers and with the same ranks")
    for name, layer in mine.items():
        if not all(torch.equal(getattr(layer, Q), getattr(theirs[name], Q).to(layer.Q_A)) for Q in ("Q_A", "Q_B")):
            raise ValueError(
                f"both models must have the same frozen halves, but those of {name} differ; start both from one adapter or one seed"
            )
    for name, layer in mine.items():
        layer.A.weight.copy_(theirs[name].A.weight)
    record["arguments"]["precondition"] = True


# ---- between steps


class Precondition(StepHook):
    """(3)."""

    def __init__(self, optimizer: Optimizer, layers: Any, delta: float):
        self.layers, self.delta = list(layers), delta
        super().__init__(optimizer, self.layers)

    @torch.no_grad()
    def before_step(self) -> None:
        for layer in self.layers:
            dA, dB = layer.A.weight.grad, layer.B.weight.grad
            if dA is not None and dB is not None:
                A, B = layer.whole()
                for gradient, found in zip((dA, dB), preconditioned(A, B, dA, dB, self.delta), strict=True):
                    gradient.copy_(found)
