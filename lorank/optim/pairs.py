"""The two factors of a low-rank map in a model: A [r, d_in] and B [d_out, r], of the product B A or of B σ(A x); those of a
mixture's experts are A [E, r, d_in] and B [E, d_out, r]."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lorank.layers import factor
from lorank.method import SHARED
from lorank.optim.groups import hidden_matrices
from lorank.optim.rule import Group, Rule, State
from lorank.optim.stacks import at_once, each, stacked
from lorank.sites import expert_stacks, linear_layers


class Pair(NamedTuple):
    """Factors of one projection; both are trained."""

    name: str
    """Of the module that holds them: ``model.layers.3.self_attn.q_proj``."""
    module: nn.Module
    A: nn.Parameter
    B: nn.Parameter

    @property
    def d_in(self) -> int:
        return self.A.shape[-1]

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def d_out(self) -> int:
        return self.B.shape[-2]


def pairs(model: nn.Module) -> Iterator[Pair]:
    """The pairs of a model, in its order: modules with an A and a B as those of `lorank.layers` and `lorank.experts`."""
    for name, module in model.named_modules():
        A, B = factor(module, "A"), factor(module, "B")
        if A is None or B is None or A.ndim != B.ndim or A.ndim not in (2, 3):
            continue
        if A.shape[-2] == B.shape[-1] and A.requires_grad and B.requires_grad:
            yield Pair(name, module, A, B)


@torch.no_grad()
def draw(
    model: nn.Module, stds: Callable[[int, int, int], tuple[float, float]], generator: torch.Generator | None = None
) -> None:
    """Draw all factors of a model anew, in place, from normal distributions of standard deviations (of A, of B) by d_in, d_out, r."""
    for pair in pairs(model):
        for W, std in zip((pair.A, pair.B), stds(pair.d_in, pair.d_out, pair.rank), strict=True):
            W.normal_(0, std, generator=generator)


def projections(model: nn.Module) -> set[nn.Parameter]:
    """The matrices that a method has made or could have made factors of: those of the projections in the blocks, converted or not,
    and what blocks share. Routers, heads and what is between embeddings and blocks are none."""
    linear = [model.get_submodule(site.name) for site in linear_layers(model) if site.router is None]
    converted = [module for module in model.modules() if hasattr(module, "stands_for_linear")]
    inside = {p for module in (*linear, *converted) for p in module.parameters()} | expert_stacks(model).keys()
    shared = {p for name, p in model.named_parameters() if f".{SHARED}" in f".{name}"}
    return {p for p in hidden_matrices(model) if p in inside or p in shared}


def pair_groups(
    model: nn.Module, groups: Sequence[dict[str, Any]], rule: str, *, refuse: bool = True
) -> list[dict[str, Any]]:
    """The groups, those with factors split: first the pairs [A, B, A, B, ...] under `rule`, then the rest under AdamW.

    Raises:
        ValueError: the model has no pairs; one is spread over two groups; or, with `refuse`, one of its `projections` is in none.
    """
    found = list(pairs(model))
    if not found:
        raise ValueError(
            f"{rule} moves pairs of factors, but the model has none; use it with a factorisation: low-rank+{rule}"
        )
    partner = {pair.A: pair.B for pair in found}
    factors = {*partner, *partner.values()}
    names = {p: name for name, p in model.named_parameters()}
    if refuse and (alone := [p for p in projections(model) if p.requires_grad and p not in factors]):
        listed = ", ".join(sorted(names[p] for p in alone)[:3]) + (
            f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        )
        raise ValueError(
            f"{rule} moves pairs of factors, but the model also has matrices that are in none; set unpaired to 'adamw', which "
            f"moves them: {listed}"
        )
    made = []
    for group in groups:
        there = set(group["params"])
        if lone := [A for A, B in partner.items() if (A in there) != (B in there)]:
            raise ValueError(
                f"both factors of a pair must be in one group, but {names[lone[0]]} and its partner are in two"
            )
        both = [p for A, B in partner.items() if A in there for p in (A, B)]
        rest = [p for p in group["params"] if p not in factors]
        made += [{**group, "params": some, "rule": name} for some, name in ((both, rule), (rest, "adamw")) if some]
    return made


class PairRule(Rule):
    """Moves pairs, which follow one another in a group: A, B, A, B, ... Those of equal shapes move as one stack."""

    matrices_only: ClassVar[bool] = True
    at_once: ClassVar[int] = 2

    def check(self, weights: Sequence[Tensor]) -> None:
        for A, B in zip(weights[::2], [*weights[1::2], None][: (len(weights) + 1) // 2], strict=True):
            if B is None or A.ndim != B.ndim or A.shape[-2] != B.shape[-1]:
                got = "no B" if B is None else f"{list(A.shape)} and {list(B.shape)}"
                raise ValueError(f"a group of pairs must hold A [r, d_in], B [d_out, r], A, B, ... in order, got {got}")

    def step(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        def counts(first: int) -> tuple[int, ...]:
            both = states[first : first + 2]
            return tuple(int(state[name]) for state in both for name in ("step", "steps") if name in state)

        for firsts in at_once(range(0, len(weights), 2), lambda i: weights[i : i + 2], counts):
            ndim, wide = weights[firsts[0]].ndim, torch.promote_types(weights[firsts[0]].dtype, torch.float32)
            sides = [[i + side for i in firsts] for side in range(2)]
            W = [stacked([weights[i] for i in some], ndim).to(wide, copy=True) for some in sides]
            G = [stacked([gradients[i] for i in some], ndim).to(wide) for some in sides]
            kept = [self._stacked([states[i] for i in some], ndim, wide) for some in sides]
            self.move(W, G, kept, group)
            for some, moved, its in zip(sides, W, kept, strict=True):
                for i, value in zip(some, each(moved, ndim), strict=True):
                    weights[i].copy_(value)
                for name, values in its.items():
                    own = each(values, ndim) if name in self.kept else [values] * len(some)
                    for i, value in zip(some, own, strict=True):
                        states[i][name].copy_(value)

    def _stacked(self, states: list[State], ndim: int, dtype: torch.dtype) -> State:
        """One state for all: what is kept [k, ...] in this type, and the counters, which are equal."""
        kept = {name: stacked([s[name] for s in states], ndim).to(dtype) for name in self.kept if name in states[0]}
        return {**kept, **{name: states[0][name].clone() for name in ("step", "steps") if name in states[0]}}

    def move(self, W: list[Tensor], G: list[Tensor], states: list[State], group: Group) -> None:
        """One step in place of stacks of A [k, r, d_in] and of B [k, d_out, r] with these gradients, and of one state for each, which
        keeps stacks too; in single precision or better."""
        raise NotImplementedError
