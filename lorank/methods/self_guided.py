"""Self-guided training: in the first part of a run a dense matrix works in parallel with two factors, and fades out.

    y = a W x + (1 - a) B A x (+ b)      x [..., d_in]   A [r, d_in]   B [d_out, r]   W [d_out, d_in]   b [d_out]

    a = (1 + cos(π t / T)) / 2           at optimizer step t, down from 1 to 0 in the T steps of the guide
    W = B A at the start                 so that a changes nothing there

Saves: compute, weights, gradients, optimizer state, once the dense matrix has gone.

The guide moves as a dense matrix does, and hands over to the factors. With `reduce_flops` each layer draws u from [0, 1) for each
step and uses the guide only if u < a, so in half of the steps; else it is B A x (not (1 - a) B A x). After T steps W and its
optimizer state are gone, and what remains is a model of `low-rank`.

Initial factors: the SVD of a matrix with entries from N(0, 0.02²), cut at rank r, with the root of the singular values on both sides.

Cost: that of `low-rank`; with the guide also weights, gradients and optimizer state of W, so that the peak is above the dense
model's, and 2 n d_in d_out operations forward for n tokens, with `reduce_flops` in half of these steps.

Source: Wei, Moalla, Pascanu and Gulcehre, "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward
Layers", NeurIPS 2024, arXiv 2406.16450, and facts from the authors' repository CLAIRE-Labo/StructuredFFN.

Departures. The paper guides the feed-forward layers of all blocks but the first, which stays dense; here every projection that
`targets` and `exclude` choose. Draws are made for a step instead of a forward pass, so that all micro-batches and processes train
one model. With a non-linearity between the factors (CoLA) no W equals them at the start, so there is no guide for it.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.fields import Fraction, Rank
from lorank.layers import LowRankLinear, PartTime, like, linear, loaded, wide
from lorank.method import Method, Site, StepHook, check_ranks, rank_at, seeded_generator
from lorank.rewriting import converted_with

STD = 0.02


# ---- the mathematics


def share(step: int, until: int) -> float:
    """a at a step, for a guide of that many steps.

    >>> [share(step, 100) for step in (0, 50, 100, 200)]
    [1.0, 0.5, 0.0, 0.0]
    """
    return round((1 + math.cos(math.pi * min(step / until, 1))) / 2, 15)


def factors_of(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, d_in] and B [d_out, r] of the best approximation of W, with the root of the singular values on both sides."""
    U, S, Vh = torch.linalg.svd(wide(W), full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


class Untouched(torch.autograd.Function):
    """y as it is, with a gradient of zero for W: DDP waits for the gradients of all parameters that it knows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, W: Tensor) -> Tensor:
        ctx.like, ctx.shape = like(W), W.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return g, torch.zeros(ctx.shape, **ctx.like)


# ---- the layer


class GuidedLinear(LowRankLinear, PartTime):
    """y = a W x + (1 - a) B A x + b, and y = B A x + b once W is gone. `share` is a; until a hook sets it, it is 1/2."""

    silent = ("B", "W")
    share: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, *, passes: float, **options: Any):
        super().__init__(d_in, d_out, rank, **options)
        self.passes = passes
        self.W: nn.Linear | None = None
        self.spent: tuple[Tensor, ...] = ()
        if passes:
            self.W = linear(d_in, d_out, bias=False, **like(self.A.weight))
            self.register_buffer("share", torch.full((), 0.5, **like(self.A.weight)))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Draw A and B, and set W to B A; values from a file stay."""
        if not (loaded(A := self.A.weight) and loaded(self.B.weight)):
            drawn = wide(A.new_empty(self.B.out_features, A.shape[1])).normal_(std=STD)
            for factor, value in zip((A, self.B.weight), factors_of(drawn, len(A)), strict=True):
                factor.copy_(factor if loaded(factor) else value)
        if self.W is not None and not loaded(self.W.weight):
            self.W.weight.copy_(wide(self.B.weight) @ wide(A))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.W is not None and not loaded(self.share):
            self.share.fill_(0.5)
        self.start()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.W is not None and (self.runs or not self.training):
            guide = self.W(x) + (0 if self.B.bias is None else self.B.bias)
            return torch.lerp(y, guide, self.share.to(y.dtype))
        for W in self.idle():
            y = Untouched.apply(y, W)
        return y

    def idle(self) -> tuple[Tensor, ...]:
        """The weights that this pass leaves out, for other processes."""
        if not torch.distributed.is_initialized():
            return ()
        return self.spent if self.W is None else (self.W.weight,)

    def drop(self) -> None:
        if self.W is not None:
            self.spent = (self.W.weight,) if torch.distributed.is_initialized() else ()
            self.W, self.passes = None, 0.0
            self.register_buffer("share", self.share, persistent=False)  # DDP cannot lose all buffers

    def merged(self) -> Tensor:
        """The weight of the dense layer that computes the same."""
        product = wide(self.B.weight) @ wide(self.A.weight)
        mixed = product if self.W is None else torch.lerp(product, wide(self.W.weight), wide(self.share))
        return mixed.to(self.B.weight.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """With weights that were saved after the guide, W is B A, until the hook removes it."""
        if self.W is not None and f"{prefix}W.weight" not in state_dict and f"{prefix}A.weight" in state_dict:
            A, B = (wide(state_dict[f"{prefix}{name}.weight"]) for name in "AB")
            state_dict |= {f"{prefix}W.weight": B @ A, f"{prefix}share": self.share}  # a copy of the caller's
        super()._load_from_state_dict(state_dict, prefix, *args)

    def standalone(self) -> tuple[str, dict[str, Any]] | None:  # type: ignore[override]
        return None if self.W is not None else super().standalone()

    def extra_repr(self) -> str:
        return super().extra_repr() + f", guided in {self.passes:.3g} of all steps" * (self.passes > 0)


# ---- the method


@dataclass(frozen=True, kw_only=True)
class SelfGuided(Method):
    """Low-rank factors with a dense guide that fades out; ``lorank.convert(model, SelfGuided(rank=64))``."""

    name: ClassVar[str] = "self-guided"
    soon: ClassVar[Mapping[str, Any]] = {"guide": 0.5}
    progress: ClassVar[tuple[str, ...]] = ("guide",)

    rank: Rank = 0.25
    """Width of the bottlenecks: an integer, a fraction of the width, or {pattern: either}."""
    guide: Fraction = 0.5
    """T as a part of the run's steps; 0: no guide, as where it is gone."""
    reduce_flops: bool = True
    """Use the guide with probability a, instead of in every step before T."""

    def check(self, sites: Sequence[Site]) -> None:
        check_ranks(self.rank, sites)

    def build(self, site: Site) -> nn.Module:
        options = {"bias": site.linear.bias is not None, **like(site.linear.weight)}
        passes = self.guide * (0.5 if self.reduce_flops else 1.0)
        return GuidedLinear(site.d_in, site.d_out, rank_at(self.rank, site), passes=passes, **options)

    def merged(self, module: Any) -> tuple[Tensor, Tensor | None]:
        return module.merged(), module.B.bias

    def finalize(self, model: nn.Module) -> None:
        for layer in model.modules():
            if isinstance(layer, GuidedLinear):
                layer.drop()
        (converted_with(model) or {"arguments": {}})["arguments"]["guide"] = 0.0  # a saved model is built without

    @property
    def has_hook(self) -> bool:
        return self.guide > 0

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook:
        return FadingGuide(self, model, optimizer, math.ceil(self.guide * steps), seed)


# ---- between steps


class FadingGuide(StepHook):
    """Sets a and draws for each step, and removes the guide after T steps. All follows from seed and step."""

    def __init__(self, method: SelfGuided, model: nn.Module, optimizer: Optimizer, until: int, seed: int):
        self.method, self.model, self.until, self.seed = method, model, until, seed
        layers = (module for module in model.modules() if isinstance(module, GuidedLinear))
        self.layers = {layer: W.weight for layer in layers if (W := layer.W)}
        super().__init__(optimizer, self.layers)
        self.prepare()

    def after_step(self) -> None:
        if self.step <= self.until:
            self.prepare()

    @torch.no_grad()
    def prepare(self) -> None:
        """For the step that comes."""
        if self.step >= self.until:
            return self.remove()
        a = share(self.step, self.until)
        drawn = torch.rand(len(self.layers), generator=seeded_generator("self-guided", self.seed, self.step))
        for layer, u in zip(self.layers, drawn.tolist(), strict=True):
            layer.share.fill_(a)
            layer.runs = not self.method.reduce_flops or u < a

    def remove(self) -> None:
        """The weights stay in the optimizer's groups, because saved states count on their order, but need no memory."""
        self.method.finalize(self.model)
        for W in self.layers.values():
            self.optimizer.state.pop(W, None)
            W.grad, W.data = None, W.new_zeros(1).expand(W.shape)

    def before_step(self) -> None:
        for layer, W in self.layers.items():
            if layer.W is None or not layer.runs:
                W.grad = None  # or it is zero, for DDP

    def aside(self) -> Mapping[str, AbstractContextManager[None]]:
        return {"without_guide": self.without()} if self.step < self.until else {}

    @contextlib.contextmanager
    def without(self) -> Iterator[None]:
        """Inside, the model is what its factors alone compute."""
        for layer in self.layers:
            layer.share.zero_()
        yield
        self.prepare()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.prepare()
