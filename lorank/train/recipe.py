"""A recipe: everything that fixes a training run, under the same names in Python, in YAML and on the command line."""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml

from lorank.fields import (
    Bounds,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Rank,
    Share,
    Whole,
    alternatives_of,
    check_fields,
    field_types,
    whole_steps,
)
from lorank.table import METHODS, find, method_names
from lorank.train.earlier import as_today
from lorank.train.places import KEYS as KEYS
from lorank.train.places import entries, without
from lorank.train.shipped import recipe_names, recipe_path
from lorank.train.yamls import load

Seed = Annotated[int, Bounds(least=0, below=2**32)]
LONGEST = 2**32 - 1
"""Steps of a recipe whose budget has not been turned into steps yet."""


def _setting(default: Any, help: str, *, everyday: bool = False, shared: bool = False, free: bool = False) -> Any:
    """A field with what others know it by.

    Args:
        everyday: it has a flag; every setting has ``--set NAME=VALUE``.
        shared: compared runs do not differ in it.
        free: it changes neither a model nor the cost of a step.
    """
    mutable = isinstance(default, list | dict)
    make = {"default_factory": lambda: type(default)(default)} if mutable else {"default": default}
    return dataclasses.field(**make, metadata={"help": help, "everyday": everyday, "shared": shared, "free": free})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one pre-training run; ValueError in one sentence if they do not make sense together."""

    # the model
    size: str = _setting(
        "tiny", "Llama of this size: tiny, 20m, 60m, 130m, 250m, 350m, 1b, 7b.", everyday=True, shared=True
    )
    model: str | None = _setting(
        None,
        "Instead of a size: a model type of transformers (gpt2), a folder, a config.json or a hub name.",
        everyday=True,
        shared=True,
    )
    start_from: str | None = _setting(
        None, "Train these weights on: a run, folder or hub name, dense or converted.", everyday=True, shared=True
    )
    distil: str | None = _setting(
        None,
        "A teacher, whose predictions are a term of the loss: TEACHER, or TEACHER:WEIGHT.",
        everyday=True,
        free=True,
    )
    shape: dict = _setting({}, "Entries of the model's configuration to change, for example hidden_size.", shared=True)
    method: str | dict = _setting(
        "cola",
        f"A method by its name, or several joined with +, for example cola+galore. The names are {', '.join(METHODS)}, and "
        "those of installed packages.",
        everyday=True,
        shared=True,
    )
    optimizer: str | dict = _setting(
        "adamw", "How the weights move: adamw, adamw-8bit, adafactor, muon, galore, ...", everyday=True
    )
    gradient: str | dict = _setting("autograd", "Where the gradient comes from: autograd or eggroll.")
    rank: Rank | None = _setting(
        None,
        "Rank of the first method that has one: an integer, a fraction of the width, or (YAML) {pattern: either}. "
        "Default: the paper's at that size, else the method's own.",
        everyday=True,
    )
    options: dict = _setting(
        {},
        "Other settings of the methods, NAME=VALUE, for example nonlinearity=low-rank; may be repeated.",
        everyday=True,
    )
    targets: list[str] = _setting(
        [], "Regular expression(s): convert (project) only layers whose names match.", everyday=True
    )
    exclude: list[str] = _setting([], "Regular expression(s): leave matching layers dense.", everyday=True)
    checkpoint: Literal["none", "bottlenecks", "bottlenecks+attention", "blocks", "recurrence"] | None = _setting(
        None, "What blocks keep for the backward pass. Default: bottlenecks for cola-m, else none.", everyday=True
    )
    checkpoint_every: Count = _setting(1, "Checkpoint each n-th block only.")
    attention: str = _setting("sdpa", "Attention implementation of transformers; eager for models without sdpa.")
    precision: Literal["fp32", "bf16", "bf16-pure"] = _setting(
        "fp32",
        "bf16: fp32 weights under autocast; bf16-pure: weights, gradients and moments in bf16 (as in the papers).",
        everyday=True,
    )
    zero_outputs: bool = _setting(
        False, "New blocks begin as the identity: what they add to the residual stream starts at zero.", free=True
    )
    compile: bool = _setting(False, "Compile the model with torch.compile.")
    fused: bool = _setting(False, "Bottlenecks with SiLU keep A x alone: less memory; on GPUs σ inside the products.")

    # the data
    data: str | list[str] = _setting(
        "embedded",
        "embedded (Python's standard library), a file, folder or glob (txt md py jsonl parquet csv), or a hub name. Several local "
        "ones are mixed, PATH:0.3 with that weight.",
        everyday=True,
        shared=True,
    )
    validation: str | None = _setting(
        None, "Where validation text comes from. Default: a held-out part of the data.", shared=True
    )
    validation_tokens: Count | None = _setting(
        10_000_000,
        "Held-out tokens, of local data at most 5 %. null: always 5 %, 10 M of which are used.",
        shared=True,
    )
    text_column: str = _setting("text", "Column of jsonl, parquet, csv or hub data that holds the text.", shared=True)
    stream: bool = _setting(
        False,
        "Read local files while training, without preparing or keeping anything: for text larger than the disk has room for.",
        shared=True,
    )
    tokenizer: str | None = _setting(
        None,
        "Name, folder or tokenizer.json of a tokenizer, or bytes. Default: byte-level BPE trained on the data.",
        everyday=True,
        shared=True,
    )
    vocab_size: Count | None = _setting(
        None, "Entries of the vocabulary. Default: 4096 if trained, else the tokenizer's.", shared=True
    )
    sequence_length: Annotated[int, Bounds(least=2)] = _setting(256, "Tokens per sequence.", everyday=True, shared=True)
    documents: Literal["packed", "separate", "padded"] = _setting(
        "packed",
        "packed: documents one after another; separate: packed, but no token sees another document and positions begin anew; "
        "padded: each cut or padded to one sequence (as in the papers).",
        shared=True,
    )

    # the optimizer
    lr: Positive = _setting(3e-3, "Peak learning rate.", everyday=True, free=True)
    weight_decay: NonNegative = _setting(0.01, "Decoupled weight decay.", free=True)
    decay: Literal["matrices", "all"] = _setting(
        "matrices", "What decays: all but norms, biases and embeddings, or everything (as in the papers).", free=True
    )
    betas: list[Annotated[float, Bounds(least=0, below=1)]] = _setting(
        [0.9, 0.95], "Decay rates of Adam's two moments; the papers use torch's 0.9 0.999.", free=True
    )
    eps: NonNegative = _setting(1e-8, "Adam's epsilon.", free=True)
    clip: NonNegative = _setting(0.5, "Largest global gradient norm; 0 turns clipping off.", free=True)
    on_nan: Literal["stop", "skip"] = _setting(
        "stop", "A step whose gradient is not finite ends the run (stop) or is left out (skip).", shared=True, free=True
    )
    steps: Count = _setting(400, "Optimizer steps.", everyday=True, shared=True, free=True)
    warmup_steps: Share = _setting(
        0.2,
        "Linear warm-up from 0: a number of steps, or a fraction of the run's steps; a cosine follows.",
        everyday=True,
        free=True,
    )
    schedule_steps: Count | None = _setting(
        None,
        "Steps over which warm-up and cosine run; at later ones the learning rate stays as it is then. Default: steps.",
        shared=True,
        free=True,
    )
    min_lr_ratio: Fraction = _setting(0.1, "Learning rate at the end, as a part of the peak.", free=True)
    batch_size: Count = _setting(8, "Sequences per optimizer step, over all devices.", everyday=True, shared=True)
    micro_batch_size: Count | None = _setting(
        None, "Sequences per device and forward pass. Default: no accumulation.", everyday=True
    )

    # watching and keeping
    eval_every: Whole = _setting(100, "Steps between evaluations; 0 evaluates at the end only.", shared=True)
    eval_tokens: Count | None = _setting(
        None,
        "Validation tokens per evaluation, the last one included. Default: 100,000 during training, all at the end.",
        shared=True,
    )
    eval_all_at_end: bool = _setting(
        False, "The last evaluation uses all validation tokens, whatever eval_tokens is.", shared=True
    )
    log_every: Count = _setting(10, "Steps between log lines.", shared=True)
    save_every: Whole = _setting(200, "Steps between checkpoints; 0 keeps the final model only.", shared=True)
    keep: Count = _setting(2, "Checkpoints to keep.", shared=True)
    license: str | None = _setting(
        None,
        "Licence of the model for its card, as the hub writes it: apache-2.0, mit, cc-by-4.0, ...",
        shared=True,
        free=True,
    )
    push_to_hub: str | None = _setting(
        None,
        "Name on the hub, such as me/my-model, to which the finished model is pushed; a new one is private.",
        shared=True,
        free=True,
    )
    report_to: list[str] = _setting([], "Trackers that transformers reports to: tensorboard, wandb, ...", shared=True)
    seed: Seed = _setting(
        42,
        "Fixes initial weights, order of data and dropout, and data_seed unless that is given.",
        everyday=True,
        shared=True,
        free=True,
    )
    data_seed: Seed | None = _setting(
        None,
        "Fixes which text is held out and the trained tokenizer, so that runs of several seeds share them. Default: that of the run in start_from if "
        "the data are the same, else seed.",
        shared=True,
        free=True,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in field_types(type(self)):
            value = getattr(self, name)
            if isinstance(value, int) and abs(value) >= 2**32:
                raise ValueError(f"{name} must be below 2**32, got {value}")
            if value == "":
                raise ValueError(f"{name} must not be empty; name something or leave it out")
        check_license(self.license)
        if self.zero_outputs and self.start_from is not None:
            raise ValueError(
                "zero_outputs is for new weights, and start_from brings trained ones; leave one of them out"
            )
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.warmup >= self.scheduled:
            name = "steps" if self.schedule_steps is None else "schedule_steps"
            raise ValueError(
                f"warmup_steps must be below {name}={self.scheduled}, got {self.warmup_steps}; give fewer, or a fraction such as 0.2"
            )
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size must divide batch_size={self.batch_size}, got {self.micro_batch_size}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """A recipe from a mapping of names to values; an unknown name is an error that gives the nearest one."""
        types = field_types(cls)
        for name in settings:
            if name not in types:
                near = difflib.get_close_matches(str(name), types, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                if name in METHODS:
                    hint = "; a method's own setting is written method.NAME, optimizer.NAME or gradient.NAME"
                elif full_name(str(name)) != name:
                    hint = "; it is a setting of a method: write it under options, or under the method's name"
                raise ValueError(f"unknown setting {name!r}{hint}")
        return cls(**{name: _coerce(value, types[name]) for name, value in as_today(settings).items()})

    def but(self, changes: Mapping[str, Any]) -> Self:
        """The recipe with some settings changed. A dotted name is an entry of a mapping: "options.alpha",
        "optimizer.update_gap", "method.cola.rank", "shape.hidden_size". A method's setting may be named alone: "alpha". It replaces
        what the recipe says of that setting in any of these places.

        Raises:
            ValueError: an unknown name, or the result is not a recipe.
        """
        settings = without(self.to_dict(), {full_name(name): value for name, value in changes.items()})
        for name, value in changes.items():
            head, dot, entry = full_name(name).partition(".")
            if not dot:
                settings[name] = value
            elif head in KEYS:
                method, dot, own = entry.partition(".")
                named = {key: list(entries(settings[key])) for key in KEYS}
                if dot:  # method.cola.rank, wherever cola is named
                    head, entry = next((key for key in KEYS if method in named[key]), ""), own
                    if not head:
                        names = ", ".join(f"{key}={'+'.join(named[key])}" for key in KEYS)
                        raise ValueError(f"{name} must be a setting of a named method, got {names}; name {method} too")
                given = entries(settings[head])
                method = method if dot else next(iter(given))
                settings[head] = {**given, method: {**given[method], entry: value}}
            elif isinstance(settings.setdefault(head, {}), dict):
                settings[head] = {**settings[head], entry: value}
            else:
                raise ValueError(f"{head} is one value and has no entry {entry!r}; set {head} itself")
        return type(self).from_dict(settings)

    @classmethod
    def read(cls, path: str | Path, **changes: Any) -> Self:
        """A recipe from a YAML file, or by the name of one that comes with lorank (cola-60m), with `changes` on top.

        Raises:
            ValueError: there is no such file, it is not valid YAML, or its settings are wrong; the message names it.
        """
        try:
            settings = load(recipe_path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"recipe {path} does not exist; name a YAML file or one of {', '.join(recipe_names())}"
            ) from None
        except IsADirectoryError:
            raise ValueError(f"recipe {path} is a folder; give a YAML file, or continue a run with --resume") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 1}" if where else ""
            raise ValueError(f"recipe {path}{line} is not valid YAML: {getattr(error, 'problem', error)}") from None
        if not isinstance(settings, dict):
            raise ValueError(f"recipe {path} must be a mapping of settings to values")
        try:
            return cls.from_dict(settings).but(changes)
        except ValueError as error:
            raise ValueError(f"recipe {path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def warmup(self) -> int:
        """Steps of warm-up: `warmup_steps`, whether it is a number of steps or a fraction."""
        return whole_steps(self.warmup_steps, self.scheduled)

    @property
    def scheduled(self) -> int:
        """The steps for which schedules of learning rate and methods are made."""
        return self.steps if self.schedule_steps is None else self.schedule_steps

    @property
    def split_seed(self) -> int:
        """The seed that decides what is held out: `data_seed`, or the run's own."""
        return self.seed if self.data_seed is None else self.data_seed

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def check_license(name: str | None) -> None:
    """Raises ValueError for what cannot be the hub's name of a licence."""
    if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ValueError(f"license must be an identifier such as apache-2.0, mit or cc-by-4.0, got {name!r}")


def full_name(setting: str) -> str:
    """A setting as recipes call it. The flag for "options.NAME" is --option NAME=VALUE, so "option.NAME" is allowed, and so is
    NAME alone if it is a setting of a method and no recipe's.

    >>> full_name("option.update_gap"), full_name("update_gap"), full_name("optimizer.update_gap"), full_name("steps")
    ('options.update_gap', 'options.update_gap', 'optimizer.update_gap', 'steps')
    """
    if setting.startswith("option."):
        return f"options.{setting.removeprefix('option.')}"
    own = "." not in setting and setting not in field_types(Recipe)
    return f"options.{setting}" if own and any(setting in field_types(find(n)) for n in method_names()) else setting


def settings_with(mark: str) -> list[str]:
    """Names of the settings that are "everyday", "shared" or "free"; see `_setting`."""
    return [field.name for field in dataclasses.fields(Recipe) if field.metadata[mark]]


def _coerce(value: Any, kind: Any) -> Any:
    """Readers of YAML 1.1 give 6e-3 as a string (its floats need a dot), and people one pattern where a list is meant; both are
    clear enough."""
    bare = [typing.get_args(one)[0] if hasattr(one, "__metadata__") else one for one in alternatives_of(kind)]
    if isinstance(value, str) and float in bare:
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, int) and not isinstance(value, bool) and float in bare and int not in bare:
        return float(value) if abs(value) < 1e300 else math.inf  # refused as not finite
    if isinstance(value, str) and list[str] in bare and str not in bare:
        return [value]
    if isinstance(value, list) and len(value) == 1 and {str, list[str]} <= {*bare}:
        return value[0]
    return value
