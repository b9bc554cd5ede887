"""CoLA: low-rank activations. Every projection of a transformer block becomes a bottleneck with a non-linearity inside.

    y = B σ(A x) (+ b)        x [..., d_in]   A [r, d_in]   B [d_out, r]   b [d_out]   σ = SiLU

Saves: compute, weights, gradients, optimizer state; as cola-m activations too.

There is no dense weight W [d_out, d_in]. A and B are ordinary trainable parameters, drawn so that B A has entries of
standard deviation τ = (d_in + d_out)^(-1/2). With σ in every layer, the block's own activation can be removed
(`nonlinearity`). The mean of σ makes fresh blocks add nearly the same to every token; `lorank.zero_outputs` is the cure.

Cost of one layer, r = rank, for n tokens: r (d_in + d_out) parameters instead of d_in d_out; 2 n r (d_in + d_out)
floating-point operations forward and twice that backward. Its input and two [n, r] tensors are kept for the backward
pass, so CoLA alone does not save activation memory. CoLA-M does: per block it keeps the block's input [n, d] and the
seven A x [n, r], and recomputes everything else except the A's and the last B: 18 n d r + 4 n² d operations at
d_ff = 2.5 d.

Source: Liu et al., "CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation", EMNLP 2025, arXiv
2502.10940.

Departures from the paper. The paper keeps the residual stream twice per block, 2 n d + 7 n r, and quotes
18.5 n d r + 4 n² d. Here the second n d follows from recomputing B, and the last B is not needed again.

Departures from the authors' code. The output of A is kept before σ, so that the backward pass recomputes σ and B but
never A; theirs keeps it after σ and recomputes all. Fused projections (GPT-2's query, key and value) get one bottleneck
each, and grouped-query attention works. σ is the `activation` field, not the model's `hidden_act`. "reduced" is our
reading of a name in the paper's ablation; see `CoLA.nonlinearity`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.architectures import GATE
from lorank.checkpointing import checkpoint, keep_bottlenecks
from lorank.experts import LowRankExperts
from lorank.fields import NonNegative, Rank
from lorank.layers import LowRankLinear, like
from lorank.method import Method, Published, Site, StepHook, check_ranks, rank_at
from lorank.methods.dlr import DecayToReuse, Reusing
from lorank.methods.lax import Carry, LaXLinear, build_chain, check_chains, check_settings
from lorank.rewriting import drop_activations
from lorank.sizes import SIZES


class CoLALinear(LowRankLinear):
    """y = B σ(A x) + b instead of a dense layer; σ is "silu", "gelu", "relu", or None for a linear bottleneck."""

    def __init__(self, d_in: int, d_out: int, rank: int, *, activation: str | None = "silu", **options: Any):
        super().__init__(d_in, d_out, rank, activation=activation, **options)


class ReusingLinear(Reusing, CoLALinear):
    """With DLR's initial B."""


class ReusingLaX(Reusing, LaXLinear):
    """The same in a chain over the blocks."""


class ReusingExperts(Reusing, LowRankExperts):
    """The same for the experts of a mixture."""


# ---- the method


@dataclass(frozen=True, kw_only=True)
class CoLA(Method):
    """CoLA with its hyper-parameters; ``lorank.convert(model, CoLA(rank=128))``."""

    name: ClassVar[str] = "cola"
    experts: ClassVar[bool] = True
    # the authors' configurations, 60m to 7b; tiny, 20m and 250m are ours
    published: ClassVar[Published] = {
        name: {"rank": size.rank, "nonlinearity": "low-rank" if name in ("350m", "1b", "7b") else "both"}
        for name, size in SIZES.items()
    }

    rank: Rank = 0.25
    """Width of the bottlenecks: an integer, a fraction of the width (the paper's default d/4), or {pattern: either}."""
    nonlinearity: Literal["both", "low-rank", "reduced", "original"] = "both"
    """Where there is a non-linearity (the paper's ablation): "both" in every bottleneck and at the block's own place
    (60M, 130M); "low-rank" in every bottleneck only (350M and up); "reduced" only in the bottleneck of the projection
    that feeds the block's own activation, which is removed; "original" only at the block's own place, so that the
    factorisation is linear."""
    activation: Literal["silu", "gelu", "relu"] = "silu"
    """σ."""
    init: Literal["cola", "dlr", "dlr-random"] = "cola"
    """Initial B: CoLA's, or with numbers of the bottleneck added to the outputs, in order or at random; see methods/dlr.py."""
    reuse_scale: NonNegative = 1.0
    """DLR's α."""
    decay_to: Literal["zero", "reuse"] = "zero"
    """Where weight decay pulls B: to 0, or to what DLR has added."""
    carry: Carry = "none"
    """What the bottleneck of the same projection in the block before goes through on its way into this one: a gate, which may be the
    identity; see methods/lax.py."""
    carry_norm: bool = True
    """Whether the sum of the two is normalised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_to == "reuse" and self.init == "cola":
            raise ValueError("init must be 'dlr' or 'dlr-random' with decay_to='reuse', got 'cola'")
        check_settings(self.carry, self.carry_norm)

    @property
    def _drops_original(self) -> bool:
        return self.nonlinearity in ("low-rank", "reduced")

    def check(self, sites: Sequence[Site]) -> None:
        check_ranks(self.rank, sites)
        check_chains(self.carry, self.rank, sites)
        if self._drops_original and not any(GATE.search(site.name) for site in sites):
            raise ValueError(
                f"nonlinearity={self.nonlinearity!r} moves the block's activation into the projection before it, but no converted "
                "projection has a name that lorank knows for it; convert that projection too, or use nonlinearity='both'"
            )

    def _inside(self, site: Site) -> str | None:
        """σ of the bottleneck at a site; None: it is linear."""
        inside = {"both": True, "low-rank": True, "reduced": GATE.search(site.name) is not None, "original": False}
        return self.activation if inside[self.nonlinearity] else None

    def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
        return build_chain(self, sites)

    def build(self, site: Site, **link: Any) -> nn.Module:
        sizes: tuple[int, ...] = (site.d_in, site.d_out, rank_at(self.rank, site))
        settings: dict[str, Any] = {
            "bias": site.linear.bias is not None,
            "activation": self._inside(site),
            **like(site.linear.weight),
            **link,
        }
        kinds: tuple[Any, Any] = (LaXLinear, ReusingLaX) if link else (CoLALinear, ReusingLinear)
        if site.experts:
            kinds, sizes = (LowRankExperts, ReusingExperts), (site.experts, *sizes)
        if self.init == "cola":
            return kinds[0](*sizes, **settings)  # type: ignore[no-any-return]
        layer = kinds[1](*sizes, **settings)
        return layer.start(self.reuse_scale, site.name if self.init == "dlr-random" else None)  # type: ignore[no-any-return]

    @property
    def sources(self) -> tuple[str, ...]:
        return (
            super().sources
            + (() if self.carry == "none" else ("lorank.methods.lax",))
            + (("lorank.methods.dlr",) if self.init == "dlr" else ())
        )

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        raise ValueError(
            f"{self.name} cannot be merged: with the non-linearity between A and B, no layer equals a dense one"
        )

    @property
    def has_hook(self) -> bool:
        return self.decay_to == "reuse"

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook | None:
        return DecayToReuse(optimizer, (module for module in model.modules() if isinstance(module, Reusing)))

    def finish(self, model: nn.Module) -> None:
        if self._drops_original:
            ours = (LowRankLinear, LowRankExperts)
            drop_activations(model, lambda name, module: isinstance(module, ours) and bool(GATE.search(name)))


@dataclass(frozen=True, kw_only=True)
class CoLAM(CoLA):
    """CoLA-M: the same model, training with only the bottlenecks kept for backward (`lorank.keep_bottlenecks`)."""

    name: ClassVar[str] = "cola-m"
    policy: ClassVar[str | None] = "bottlenecks"

    def finish(self, model: nn.Module) -> None:
        super().finish(model)
        checkpoint(model, keep_bottlenecks)
