"""What a method of lorank is: a frozen dataclass that says how the linear maps of a model are written.

A method sees `Site`s (places where the dense model has a linear map) in stacks (all depths of one projection) and
answers with modules. It never sees the model's code, so it works on any architecture, and cross-layer methods fit as
well as layer-wise ones.
"""

import dataclasses
import hashlib
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Rank = int | float | Mapping[str, int | float]
Published = Mapping[str, Mapping[str, Any]]
"""What a paper takes: {size: {field: value}}, where it is not the field's default. Sizes are those of lorank.sizes."""
SHARED = "lorank_"
"""Beginning of the name under which a model's body holds what its blocks share; it counts as part of the blocks."""


class Site(NamedTuple):
    """One place in a model where a linear map lives."""

    name: str
    """Where it is: ``model.layers.3.self_attn.q_proj``."""
    role: str
    """The same with the depth left open, equal for all blocks: ``model.layers.*.self_attn.q_proj``."""
    depth: int
    """Index of the block: 3."""
    linear: nn.Linear
    """The dense map itself, weight [d_out, d_in]. Its weights may be read; its device and dtype are kept."""

    @property
    def d_in(self) -> int:
        return self.linear.in_features

    @property
    def d_out(self) -> int:
        return self.linear.out_features

    @property
    def break_even_rank(self) -> float:
        """Rank at which two factors hold as many weights as the dense map: d_in d_out / (d_in + d_out)."""
        return self.d_in * self.d_out / (self.d_in + self.d_out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametrization:
    """Base of all structure methods; a subclass's fields are its hyper-parameters and are saved with the model.

    Override `build` (one layer at a time), or `build_stack` if the depths of one projection know one another.
    """

    name: ClassVar[str]
    """What the command line, recipes and saved configurations call the method."""
    checkpoint_policy: ClassVar[str | None] = None
    """What blocks keep for backward unless the user says otherwise, by its name in `lorank.checkpointing.POLICIES`."""

    published: ClassVar[Published] = {}
    """Taken in a run of that size, unless the user says otherwise."""

    def wants(self, site: Site) -> bool:
        """Whether the method rewrites such a place at all; if not it stays dense, whatever `targets` say. By its names
        and depth alone: the same is asked when a saved model is built again."""
        return True

    def check(self, sites: Sequence[Site]) -> None:
        """Raise ValueError if the method cannot rewrite these sites (all that were chosen); nothing is changed yet."""

    def build(self, site: Site) -> nn.Module:
        """A module that maps [..., d_in] to [..., d_out] in place of `site.linear`."""
        raise NotImplementedError(f"{type(self).__name__} defines neither build nor build_stack")

    def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
        """One module per site, for all depths of one projection in order of depth."""
        return [self.build(site) for site in sites]

    def finish(self, model: nn.Module) -> None:
        """Whatever the method changes beside its layers; called once, after all stacks are in place.

        What blocks share is registered here, once, under a name that begins with `SHARED`, and not in a block.
        """

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight [d_out, d_in] and bias of the dense layer that a module of this method amounts to.

        Raises:
            ValueError: there is none; why.
        """
        raise ValueError(
            f"{self.name} cannot be merged: it does not say which dense layer one of its layers amounts to"
        )

    def undo(self, model: nn.Module) -> None:
        """Take away what `finish` added; called when a model is merged, after its layers are dense again."""

    def finalize(self, model: nn.Module) -> None:
        """What becomes of a model when its training is over; its outputs stay the same."""

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> "StepHook | None":
        """What happens to `model` and the state of `optimizer` between the `steps` steps of a run; None: nothing.

        Raises:
            ValueError: the method cannot live with this optimizer or with so few steps.
        """
        return None

    def schedule(self, steps: int, warmup_steps: int, min_lr_ratio: float) -> Callable[[int], float] | None:
        """Multiplier of the learning rate by steps done, where the method needs one of its own; None: cosine."""
        return None

    adamw: ClassVar[type[Optimizer] | None] = None
    """The AdamW that the method needs, called as torch's is; None: torch's own."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; tables as lists of pairs, because transformers sorts the keys of its
        config.json."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields = {name: [*value] if isinstance(value, tuple) else value for name, value in fields.items()}
        return {
            name: {"in_order": [[*pair] for pair in value.items()]} if isinstance(value, Mapping) else value
            for name, value in fields.items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        tables = {name: dict(v["in_order"]) for name, v in fields.items() if isinstance(v, Mapping) and "in_order" in v}
        return cls(**{**fields, **tables})


class StepHook:
    """Something that happens between optimizer steps; it rides on the optimizer's own hooks, in any training loop.

    A subclass overrides `before_step` (gradients are final, clipped and accumulated) or `after_step`. Tensors of the
    model change only in place; what must survive a restart and is in neither the model nor the optimizer's state
    belongs in `state_dict`.
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.step = 0
        """Optimizer steps done: 0 in the first call of `before_step`, 1 in the first of `after_step`."""
        optimizer.register_step_pre_hook(lambda *_: self.before_step())
        optimizer.register_step_post_hook(self._after_step)

    def before_step(self) -> None:
        """Called before each optimizer step."""

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def _after_step(self, *_: Any) -> None:
        self.step += 1
        self.after_step()

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on exactly as this one; tensors only."""
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where `state_dict` was taken; model and optimizer are loaded already."""
        self.step = int(state["step"])


def warmup_cosine(step: int, steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Multiplier of the learning rate: up a line from 0, then down half a cosine to `min_lr_ratio`.

    >>> [warmup_cosine(step, 100, 10, 0.1) for step in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def seeded_generator(*seeds: int | str) -> torch.Generator:
    """A generator for one purpose on the CPU, the same in every process: what can be drawn again need not be saved."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_rank(rank: Rank, option: str = "rank") -> None:
    """Raises ValueError, in the name of `option`, unless `rank` is a positive integer, a fraction in (0, 1], or a non-empty table of these."""
    if isinstance(rank, Mapping):
        if not rank:
            raise ValueError(f"{option}={{}} is an empty table; give at least one pattern, for example {{'.*': 0.25}}")
        for pattern, value in rank.items():
            if not isinstance(pattern, str):
                raise ValueError(f"{option}: the pattern {pattern!r} is not a string; write it in quotes")
            compile_pattern(pattern, option)
            check_rank(value, option)
    elif isinstance(rank, bool) or not isinstance(rank, int | float):
        raise ValueError(f"{option}={rank!r} is neither an integer, a fraction of the width, nor a table of patterns")
    elif isinstance(rank, int) and rank < 1:
        raise ValueError(f"{option}={rank} is not positive; give an integer >= 1 or a fraction such as 0.25")
    elif isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"{option}={rank} is not a fraction in (0, 1]; give an integer for an absolute rank")


def check_table(rank: Rank, sites: Sequence[Site], option: str = "rank") -> None:
    """Raises ValueError for a table of ranks without a pattern for a site, or with one that decides nothing."""
    if isinstance(rank, Mapping):
        for site in sites:
            rank_at(rank, site)
        used = {next((pattern for pattern in rank if re.search(pattern, site.name)), None) for site in sites}
        for pattern in rank:
            if pattern not in used:
                raise ValueError(
                    f"{option}: the pattern {pattern!r} decides nothing (no projection matches, or an earlier pattern takes all "
                    "that do); drop it or mend it"
                )


def check_ranks(rank: Rank, sites: Sequence[Site]) -> None:
    """A rank against the sites it is for, where the method has two factors of that rank.

    Raises:
        ValueError: a site for which a table has no pattern, or a pattern that is the first to match nowhere.

    Warns:
        UserWarning: the projections whose two factors would be no smaller than the dense map, all in one.
    """
    check_table(rank, sites)
    beyond = {s.role: (rank_at(rank, s), s.break_even_rank) for s in sites if rank_at(rank, s) >= s.break_even_rank}
    if beyond:
        listed = ", ".join(f"{role} (rank {r}, break-even {limit:.0f})" for role, (r, limit) in beyond.items())
        warnings.warn(f"the factors are no smaller than the dense layer in {listed}; lower the rank", stacklevel=2)


def rank_at(rank: Rank, site: Site) -> int:
    """The rank to use at a site.

    An integer is taken as it is. A fraction is of the map's narrower side, which in a block with as many key as query
    heads is the model's width (the papers' r/d), and under grouped-query attention shrinks the key and value ranks in
    step. A table gives the value of the first pattern (regular expression, searched in the name) that matches.

    >>> rank_at(0.25, Site("layers.0.k_proj", "layers.*.k_proj", 0, nn.Linear(512, 128, device="meta")))
    32
    """
    if isinstance(rank, Mapping):
        for pattern, value in rank.items():
            if re.search(pattern, site.name):
                return rank_at(value, site)
        raise ValueError(
            f"the rank table {list(rank)} has no pattern for {site.name}; add one ('.*' matches all) or exclude the module"
        )
    return rank if isinstance(rank, int) else max(1, round(rank * min(site.d_in, site.d_out)))


def compile_pattern(pattern: str, option: str) -> re.Pattern[str]:
    """A compiled regular expression; ValueError with the option's name if it is not one."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option}={pattern!r} is not a regular expression: {error}") from None
