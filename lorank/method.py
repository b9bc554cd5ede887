"""What a method of lorank is: a frozen dataclass that answers up to five questions about training.

    method      What is W?                           `build`, `build_stack`: CoLA, SLTrain, CR-Net, ReLoRA, SST, MASA, adapters
    optimizer   How does W move?                     `optimizer`: GaLore, Fira, DCT-AdamW, Trion, Muon, SwitchLoRA
    hook        What happens between two steps?      `hook`: ReLoRA, SwitchLoRA, SST, SMoRA, CoDyRA, OSFT
    memory      What is kept for the backward pass?  `policy`: CoLA-M
    gradient    Where does the gradient come from?   `gradient`: EGGROLL

`Dense` answers none of them: AdamW, autograd, a plain model. Two methods combine if they answer different questions.

A method sees `Site`s (places where the dense model has a linear map) in stacks (all depths of one projection) and
answers with modules. It never sees the model's code, so it works on any architecture, layer by layer or across layers.
"""

import dataclasses
import hashlib
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.fields import RANK_TABLES, Rank, check_fields
from lorank.hooks import StepHook as StepHook

Published = Mapping[str, Mapping[str, Any]]
"""What a paper uses, {size: {field: value}}, if it differs from the field's default. Sizes are those of lorank.sizes."""
Patterns = str | Sequence[str] | None
"""Regular expression(s) searched in the names of linear layers."""
SHARED = "lorank_"
"""Prefix of the name under which a model's body has what its blocks share; it counts as part of the blocks."""
QUESTIONS = {
    "method": "what the weights are",
    "optimizer": "how the weights move",
    "hook": "what happens between steps",
    "memory": "what is kept for the backward pass",
    "gradient": "where the gradient comes from",
}
"""The questions, in the words of a message."""
_SEAMS = {"method": ("build", "build_stack"), "memory": ("policy",)}


class Site(NamedTuple):
    """One place in a model with a linear map."""

    name: str
    """Where it is: ``model.layers.3.self_attn.q_proj``."""
    role: str
    """The same with the depth left open, equal for all blocks: ``model.layers.*.self_attn.q_proj``."""
    depth: int
    """Index of the block: 3."""
    linear: nn.Linear
    """The dense map itself, weight [d_out, d_in]. A method may read its weights and keeps its device and dtype."""
    router: str | None = None
    """The part of the name that says router, if the map chooses experts; it is rewritten only if a pattern names it."""
    experts: int = 0
    """How many experts of a mixture have this map, all in one tensor; `linear` is the first one's."""

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


def by_role(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """The stacks of a model: for each role its sites, in order of depth."""
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        stacks.setdefault(site.role, []).append(site)
    return stacks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. A subclass's fields are its settings, checked by their annotations (`lorank.fields`) and saved.

    Raises:
        ValueError: a field has a value that its annotation does not allow.
    """

    name: ClassVar[str]
    """What the command line, recipes and saved configurations call the method."""
    key: ClassVar[str] = "method"
    """The recipe's key under which it is named: "method", "optimizer" or "gradient"."""
    published: ClassVar[Published] = {}
    """Settings of the paper by model size. They hold unless the user says otherwise."""
    keeps_outputs: ClassVar[bool] = False
    """Whether a new layer computes what the dense one did, so that `lorank.convert` can check it."""
    soon: ClassVar[Mapping[str, Any]] = {}
    """Settings with which the method acts within a few steps; tests and recorded first steps use them."""
    once: ClassVar[Mapping[str, Any]] = {}
    """Defaults that have changed, as they were. Runs name these settings; one that does not began with the old."""
    progress: ClassVar[tuple[str, ...]] = ()
    """Fields that the method changes in a model's record as training goes on. A resumed run has them as it began."""
    adapts: ClassVar[bool] = False
    """Whether the trained weights of the dense model are kept and frozen, embeddings, norms and head too."""
    experts: ClassVar[bool] = False
    """Whether `build` also answers for the experts of a mixture, with one layer of `lorank.experts` for all of a block."""

    adamw: ClassVar[type[Optimizer] | None] = None
    """The class of optimizer that the method's own hook needs; None: any will do."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def sources(self) -> tuple[str, ...]:
        """Modules whose docstrings name the papers that these settings follow."""
        return (type(self).__module__,)

    @classmethod
    def answers(cls) -> frozenset[str]:
        """The questions that the method answers; see `QUESTIONS`."""
        overrides = lambda seam: getattr(cls, seam) is not getattr(Method, seam)  # noqa: E731
        return frozenset(question for question in QUESTIONS if any(map(overrides, _SEAMS.get(question, (question,)))))

    # ---- what is W?

    def wants(self, site: Site) -> bool:
        """Whether the method rewrites this site at all. If not, the layer stays dense, whatever `targets` are. Decide by name
        and depth alone, because this is called again when a saved model is built."""
        return True

    def check(self, sites: Sequence[Site]) -> None:
        """Raise ValueError if the method cannot rewrite these sites (all that were chosen). Called before anything is changed."""

    def stacks(self, sites: Sequence[Site]) -> Sequence[Sequence[Site]]:
        """The sites that `build_stack` gets together: all depths of one projection."""
        return [*by_role(sites).values()]

    def build(self, site: Site) -> nn.Module:
        """A module that maps [..., d_in] to [..., d_out] instead of `site.linear`."""
        raise NotImplementedError(f"{type(self).__name__} defines neither build nor build_stack")

    def build_stack(self, sites: Sequence[Site]) -> Sequence[nn.Module]:
        """One module per site of one of the `stacks`, in order of depth."""
        return [self.build(site) for site in sites]

    def finish(self, model: nn.Module) -> None:
        """Changes outside the method's layers; called once, after all stacks are in place. Register here what blocks share,
        once, under a name that begins with `SHARED`, and not in a block."""

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight [d_out, d_in] and bias of the dense layer that computes the same as `module`; by default its own `merged()`.

        Raises:
            ValueError: there is no such layer; the message says why.
        """
        if callable(own := getattr(module, "merged", None)):
            return own()  # type: ignore[no-any-return]
        raise ValueError(
            f"{self.name} cannot be merged: it does not define the dense layer that one of its layers equals"
        )

    def undo(self, model: nn.Module) -> None:
        """Remove what `finish` added; called when a model is merged, after its layers are dense again."""

    def finalize(self, model: nn.Module) -> None:
        """Changes to a model after training; its outputs stay the same."""

    # ---- how does it move?

    def parameter_groups(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], targets: Patterns, exclude: Patterns
    ) -> list[dict[str, Any]]:
        """Parameter groups for `optimizer`, made from those of a plain optimizer: projected matrices get a ``rank``,
        matrices under another rule a ``rule``. `targets` and `exclude` choose linear layers as in `lorank.convert`."""
        return list(groups)

    def optimizer(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> Optimizer:
        """An optimizer over groups that each have ``params`` and ``weight_decay``; torch's AdamW by default."""
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

    def state_bytes(self, p: Tensor, group: Mapping[str, Any]) -> int:
        """Bytes that the optimizer keeps between steps for a parameter of the group; counters are not included."""
        return 2 * p.numel() * p.element_size()  # Adam's two moments

    def gathered_bytes(self, p: Tensor, group: Mapping[str, Any]) -> float:
        """Bytes of a sharded parameter's matrices that a process gathers in an average step; sums over processes count twice."""
        return 0.0

    def step_flops(self, p: Tensor, group: Mapping[str, Any], *, micro_batches: int = 1) -> float:
        """FLOPs of the matrix products in one optimizer step on a parameter; those of some steps only are averaged.
        Decompositions (eigenvectors, QR) and fast Fourier transforms are not included."""
        return 0.0

    def kept_gradient(self, p: Tensor, group: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of what is kept for the step after backward has finished a parameter's gradient."""
        return tuple(p.shape)

    def schedule(self, steps: int, warmup_steps: int, min_lr_ratio: float) -> Callable[[int], float] | None:
        """Multiplier of the learning rate by steps done, if the method needs its own; None: warm-up and cosine."""
        return None

    # ---- what happens between steps?

    @property
    def has_hook(self) -> bool:
        """Whether something does with these settings."""
        return "hook" in self.answers()

    def hook(self, model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int) -> StepHook | None:
        """What happens to `model` and the state of `optimizer` between the `steps` steps of a run; None: nothing.

        Raises:
            ValueError: the method cannot work with this optimizer or with so few steps.
        """
        return None

    # ---- what happens between two tasks?

    def next_task(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Change `model`, in place, for the next stretch of data, and the state of its optimizer if there is one; see
        `lorank.next_task`. Parameters that train stay the same objects, so that an optimizer goes on with them."""

    # ---- what is kept for the backward pass?

    policy: ClassVar[str | None] = None
    """What blocks keep unless the user says otherwise, by its name in `lorank.checkpointing.POLICIES`."""

    # ---- where does the gradient come from?

    def gradient(
        self, model: nn.Module, *, batch_size: int, sequence_length: int, seed: int, compile: bool = False
    ) -> "Gradient | None":
        """An estimator that fills `.grad` in place of forward and backward; None: autograd.

        Raises:
            ValueError: the model or the batch does not suit the estimator.
        """
        return None

    # ---- what is saved

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; tables as lists of pairs, because transformers sorts the keys of its config.json."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """The method that answers no question: the model as it is."""

    name: ClassVar[str] = "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autograd(Method):
    """The gradient of every method that does not bring its own."""

    name: ClassVar[str] = "autograd"
    key: ClassVar[str] = "gradient"


def check_combination(methods: Sequence[Method | type[Method]]) -> None:
    """Raises ValueError if two methods answer the same question."""
    for i, one in enumerate(methods):
        for other in methods[:i]:
            if both := [QUESTIONS[question] for question in QUESTIONS if question in one.answers() & other.answers()]:
                raise ValueError(
                    f"{other.name} and {one.name} cannot be combined: both decide {both[0]}; use one of the two"
                )


class Gradient(Protocol):
    """What a training loop calls in place of forward and backward."""

    @property
    def flops_per_token(self) -> float:
        """Of training on one token."""

    @property
    def carries(self) -> bool:
        """Whether each row of a batch continues the same row of the batch before."""

    def __call__(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Fill `.grad` for this batch and step, which determine all randomness, and return the mean loss in nats."""

    def state_dict(self) -> dict[str, Tensor]:
        """What it keeps from step to step."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""

    def step_cost(
        self, *, batch_size: int, sequence_length: int, optimizer_bytes: int, autocast: bool = False
    ) -> tuple[Any, Any]:
        """`lorank.accounting.Flops` and `Memory` of one step, with an optimizer that keeps that many bytes."""

    def moves(self, p: nn.Parameter) -> bool:
        """Whether it estimates a gradient for a parameter."""

    def treatment(self, name: str, p: nn.Parameter) -> str:
        """How it estimates the gradient of a parameter, in a few words."""

    def describe(self) -> str:
        """How it estimates the gradient of the model, in one sentence."""


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
    """A generator for one purpose on the CPU, the same in every process, so that draws can be repeated and need not be saved."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_table(rank: Rank, sites: Sequence[Site], option: str = "rank") -> None:
    """Raises ValueError for a table of ranks without a pattern for a site, or with one that decides nothing."""
    if isinstance(rank, Mapping):  # those with a name suit any part of a model
        for site in sites:
            rank_at(rank, site)
        used = {next((pattern for pattern in rank if re.search(pattern, site.name)), None) for site in sites}
        for pattern in rank:
            if pattern not in used:
                raise ValueError(
                    f"{option} must use all of its patterns, but {pattern!r} decides nothing: it matches no projection, or earlier "
                    "patterns match all that it does; remove it or correct it"
                )


def check_ranks(rank: Rank, sites: Sequence[Site]) -> None:
    """Checks a rank for the sites of a method that has two factors of that rank.

    Raises:
        ValueError: a table has no pattern for a site, or a pattern that is the first to match nowhere.

    Warns:
        UserWarning: one warning with all projections whose two factors would not be smaller than the dense map.
    """
    check_table(rank, sites)
    beyond = {s.role: (rank_at(rank, s), s.break_even_rank) for s in sites if rank_at(rank, s) >= s.break_even_rank}
    if beyond:
        listed = ", ".join(f"{role} (rank {r}, break-even {limit:.0f})" for role, (r, limit) in beyond.items())
        warnings.warn(f"the factors are not smaller than the dense layer in {listed}; lower the rank", stacklevel=2)


def rank_at(rank: Rank, site: Site) -> int:
    """The rank to use at a site.

    An integer is used as it is. A fraction is of the map's narrower side: with as many key as query heads this is the model's width
    (the papers' r/d); with fewer, the ranks of key and value are smaller. A table gives the value of the first pattern that matches.

    >>> rank_at(0.25, Site("layers.0.k_proj", "layers.*.k_proj", 0, nn.Linear(512, 128, device="meta")))
    32
    """
    if isinstance(rank, str):
        rank = RANK_TABLES[rank]
    if isinstance(rank, Mapping):
        for pattern, value in rank.items():
            if re.search(pattern, site.name):
                return rank_at(value, site)
        raise ValueError(
            f"the rank table must have a pattern for {site.name}, got {list(rank)}; add one ('.*' matches all) or exclude the module"
        )
    return rank_within(rank, min(site.d_in, site.d_out))


def rank_within(rank: float, narrower: int) -> int:
    """An integer as it is; a fraction is of a matrix's narrower side.

    >>> rank_within(8, 32), rank_within(0.25, 32), rank_within(0.001, 32)
    (8, 8, 1)
    """
    return rank if isinstance(rank, int) else max(1, round(rank * narrower))
