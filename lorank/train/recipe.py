"""A recipe: everything that fixes a training run, under the same names in Python, in YAML and on the command line."""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml

import lorank
from lorank.optim import OPTIMIZERS
from lorank.table import METHODS


def _option(default: Any, help: str) -> Any:
    mutable = isinstance(default, list | dict)
    make = {"default_factory": lambda: type(default)(default)} if mutable else {"default": default}
    return dataclasses.field(**make, metadata={"help": help})


EGG_SETTINGS: dict[str, Any] = {
    "method": "eggroll",
    "tokenizer": "bytes",
    "lr": 4.0,
    "weight_decay": 0.0,
    "clip": 0.0,
    "warmup_steps": 0,
    "sequence_length": 32,
    "batch_size": 512,
}
"""What model=egg takes where a user says nothing; lr is the flag of `lorank.evolution.integers.alpha_at`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one pre-training run; ValueError in one sentence if they do not make sense together."""

    # the model
    size: str = _option("tiny", "Llama of this size: tiny, 20m, 60m, 130m, 350m, 1b, 7b.")
    model: str | None = _option(
        None, "Instead of --size: a model type of transformers (gpt2), a folder, config.json or hub name, or egg."
    )
    method: str = _option(
        "cola",
        f"{', '.join(METHODS)}; dense; dense with a low-rank optimizer: {', '.join(OPTIMIZERS)}; dense without backward "
        "passes: eggroll; or of an installed package.",
    )
    rank: int | float | dict | None = _option(
        None,
        "Bottleneck width, or rank of the projected gradients: integer, fraction of the width, or (YAML) {pattern: either}. Default: what the method's paper takes at that size, else the method's own.",
    )
    options: dict = _option(
        {}, "Further settings of the method, NAME=VALUE, for example nonlinearity=low-rank, update_gap=500."
    )
    targets: list[str] = _option([], "Regular expression(s): convert (project) only layers whose names match.")
    exclude: list[str] = _option([], "Regular expression(s): leave matching layers dense.")
    checkpoint: Literal["none", "bottlenecks", "bottlenecks+attention", "blocks", "recurrence"] | None = _option(
        None, "What blocks keep for backward; default bottlenecks for cola-m, none otherwise."
    )
    checkpoint_every: int = _option(1, "Checkpoint each n-th block only.")
    attention: str = _option("sdpa", "Attention implementation of transformers.")
    precision: Literal["fp32", "bf16", "bf16-pure"] = _option(
        "fp32", "bf16: fp32 weights under autocast; bf16-pure: weights, gradients and moments in bf16 (the papers)."
    )
    compile: bool = _option(False, "torch.compile the model.")

    # the data
    data: str = _option(
        "embedded",
        "embedded (Python's standard library), a file, folder or glob (txt md py jsonl parquet), or a hub name.",
    )
    validation: str | None = _option(None, "Where validation text comes from; default: a held-out part of --data.")
    text_column: str = _option("text", "Column of jsonl, parquet or hub data that holds the text.")
    tokenizer: str | None = _option(
        None, "Name or folder of a tokenizer, or bytes; default: byte-level BPE trained on the data."
    )
    vocab_size: int | None = _option(None, "Entries of the vocabulary; default 4096 if trained, else the tokenizer's.")
    sequence_length: int = _option(256, "Tokens per sequence.")
    documents: Literal["packed", "padded"] = _option(
        "packed", "packed: documents one after another; padded: each cut or padded to one sequence (the papers)."
    )

    # the optimizer
    optimizer: Literal["adamw", "adamw-8bit", "adafactor", "muon"] = _option(
        "adamw", "Of PyTorch, 8-bit of bitsandbytes; muon has AdamW beside it. With galore: what works in the subspace."
    )
    lr: float = _option(3e-3, "Peak learning rate.")
    weight_decay: float = _option(0.01, "Decoupled weight decay.")
    decay: Literal["matrices", "all"] = _option(
        "matrices", "What decays: all but norms, biases and embeddings, or everything (the papers)."
    )
    betas: list[float] = _option([0.9, 0.95], "Decay rates of Adam's two moments; the papers keep torch's 0.9 0.999.")
    eps: float = _option(1e-8, "Adam's epsilon.")
    clip: float = _option(0.5, "Largest global gradient norm; 0 turns clipping off.")
    steps: int = _option(400, "Optimizer steps.")
    warmup_steps: int = _option(80, "Steps of linear warm-up from 0; a cosine follows.")
    min_lr_ratio: float = _option(0.1, "Learning rate at the end, as a part of the peak.")
    batch_size: int = _option(8, "Sequences per optimizer step, over all devices.")
    micro_batch_size: int | None = _option(None, "Sequences per device and forward pass; default: no accumulation.")

    # watching and keeping
    eval_every: int = _option(100, "Steps between evaluations; 0 evaluates at the end only.")
    eval_tokens: int = _option(100_000, "Validation tokens per evaluation during training; the last one takes all.")
    log_every: int = _option(10, "Steps between log lines.")
    save_every: int = _option(200, "Steps between checkpoints; 0 keeps the final model only.")
    keep: int = _option(2, "Checkpoints to keep.")
    report_to: list[str] = _option([], "Trackers that transformers reports to: tensorboard, wandb, ...")
    seed: int = _option(
        42, "Fixes initial weights, order of data and dropout, and what data_seed does if that is not given."
    )
    data_seed: int | None = _option(
        None,
        "Fixes which text is held out and the trained tokenizer, so that runs of several seeds share them. Default: the seed.",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, setting_types()[field.name])
            if isinstance(value, int) and abs(value) >= 2**32:
                raise ValueError(f"{field.name}={value} is not below 2**32")
            if any(
                isinstance(x, float) and not math.isfinite(x) for x in (value if isinstance(value, list) else [value])
            ):
                raise ValueError(f"{field.name}={value} is not a finite number")
        for name in (
            "checkpoint_every",
            "sequence_length",
            "steps",
            "batch_size",
            "log_every",
            "keep",
            "lr",
            "eval_tokens",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        for name in ("weight_decay", "clip", "warmup_steps", "eval_every", "save_every", "eps", "min_lr_ratio", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative")
        for name in ("data", "validation", "tokenizer", "model"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty; name something or leave it out")
        if self.data_seed is not None and self.data_seed < 0:
            raise ValueError(f"data_seed={self.data_seed} is negative")
        if self.vocab_size is not None and self.vocab_size <= 0:
            raise ValueError(f"vocab_size={self.vocab_size} is not positive")
        if self.sequence_length < 2:
            raise ValueError("sequence_length=1 leaves no token to predict; give at least 2")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} leaves none of steps={self.steps} for the cosine")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} are not two numbers in [0, 1)")
        if self.min_lr_ratio > 1:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio} is above 1")
        if self.micro_batch_size is not None and not 0 < self.micro_batch_size <= self.batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is not between 1 and batch_size={self.batch_size}"
            )
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """A recipe from a mapping of names to values; an unknown name is an error that gives the nearest one."""
        known = [field.name for field in dataclasses.fields(cls)]
        if settings.get("model") == "egg":
            settings = {**EGG_SETTINGS, **settings}
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                raise ValueError(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return cls(**{name: _coerce(value, setting_types()[name]) for name, value in settings.items()})

    @classmethod
    def read(cls, path: str | Path, **changes: Any) -> Self:
        """A recipe from a YAML file, with `changes` on top."""
        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"recipe {path} does not exist; recipes are YAML files such as those in recipes/"
            ) from None
        except IsADirectoryError:
            raise ValueError(f"recipe {path} is a folder; give a YAML file, or continue a run with --resume") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 1}" if where else ""
            raise ValueError(f"recipe {path}{line} is not valid YAML: {getattr(error, 'problem', error)}") from None
        if not isinstance(settings, dict):
            raise ValueError(f"recipe {path} is not a mapping of settings to values")
        try:
            return cls.from_dict({**settings, **changes})
        except ValueError as error:
            raise ValueError(f"recipe {path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def split_seed(self) -> int:
        """The seed that decides what is held out: `data_seed`, or the run's own."""
        return self.seed if self.data_seed is None else self.data_seed

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def recipes_folder() -> Path:
    """Where recipes/ is: inside an installed package, beside it in a checkout."""
    package = Path(lorank.__file__).parent
    return next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package / "recipes")


def recipe_file(method: str, size: str) -> Path:
    """Of a method at a size, whether it exists or not; CoLA-M has CoLA's."""
    return recipes_folder() / f"{method.removesuffix('-m')}-{size}.yaml"


@functools.cache
def published_lr(method: str, size: str) -> float | None:
    """The learning rate that the recipe of a method at a size names; None where there is no recipe, or it leaves the rate open
    because no source is known for it."""
    path = recipe_file(method, size)
    found = yaml.safe_load(path.read_text(encoding="utf-8")).get("lr") if path.is_file() else None
    return None if found is None else float(found)


@functools.cache
def setting_types() -> dict[str, Any]:
    """The type of each setting, by name."""
    return typing.get_type_hints(Recipe)


def alternatives_of(kind: Any) -> tuple[Any, ...]:
    """The members of a union, in either of Python's spellings; of any other type, the type itself."""
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if union else (kind,)


def _coerce(value: Any, kind: Any) -> Any:
    """YAML reads 6e-3 as a string (its floats want a dot) and one pattern where a list is meant; both are clear
    enough."""
    alternatives = alternatives_of(kind)
    if isinstance(value, str) and float in alternatives:
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, int) and not isinstance(value, bool) and float in alternatives and int not in alternatives:
        return float(value) if abs(value) < 1e300 else math.inf  # told of as not finite
    if isinstance(value, str) and list[str] in alternatives:
        return [value]
    return value


def _check_type(name: str, value: Any, kind: Any) -> None:
    for option in alternatives_of(kind):
        origin = typing.get_origin(option)
        if origin is Literal:
            if value in typing.get_args(option):
                return
        elif origin is list:
            if isinstance(value, list) and all(isinstance(item, typing.get_args(option)[0] | int) for item in value):
                return
        elif isinstance(value, option) and not (isinstance(value, bool) and option is not bool):
            return
    literals = [option for option in alternatives_of(kind) if typing.get_origin(option) is Literal]
    choices = [repr(choice) for option in literals for choice in typing.get_args(option)]
    named = str(getattr(kind, "__name__", kind)).replace("NoneType", "null")
    wanted = f"one of {', '.join(choices)}" if choices else named
    raise ValueError(f"{name}={value!r} is not {wanted}")
