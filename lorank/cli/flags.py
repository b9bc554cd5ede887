"""Flags made from the fields of `Recipe`: one source of names, types and help."""

import dataclasses
import os
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import yaml

from lorank.fields import alternatives_of, field_types
from lorank.train.places import as_typed, shared_name
from lorank.train.recipe import LONGEST, Recipe, full_name, settings_with
from lorank.train.yamls import load

if TYPE_CHECKING:
    from lorank.train.budget import Budget

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
SEED = click.IntRange(min=0, max=2**32 - 1)
SHORTHAND = "options"
"""The field that `--option NAME=VALUE` fills."""


# ---- values


def value_of(text: str) -> Any:
    """A value as YAML.

    >>> value_of("1e-3"), value_of("[0.9, 0.95]"), value_of("low-rank"), value_of("null")
    (0.001, [0.9, 0.95], 'low-rank', None)
    """
    try:
        return load(text)
    except yaml.YAMLError:
        raise ValueError(f"a value must be valid YAML, got {text!r}") from None


def name_and_value(text: str, flag: str) -> tuple[str, Any]:
    """What is on either side of the first equals sign."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{flag} must be NAME=VALUE, for example {_EXAMPLES[flag]}, got {text!r}")
    return as_typed(name), value_of(value)


_EXAMPLES = {"--option": "nonlinearity=low-rank", "--set": "weight_decay=0.1"}


class Value(click.ParamType):
    """A value as YAML: an integer, a fraction, a table."""

    name = "value"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value_of(value) if isinstance(value, str) else value


class Folder(click.ParamType):
    """A folder's name; "~" is the user's home, also where the shell leaves it, as in --out=~/run."""

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return os.path.expanduser(value)


# ---- flags

GROUPS = {
    "Model and method": "size sizes model models start_from distil method methods optimizer rank options targets exclude checkpoint precision",
    "Text": "data validation text_column tokenizer sequence_length documents",
    "Training": "lr steps tokens epochs tokens_per_parameter warmup_steps batch_size micro_batch_size seed assignments",
}
"""Title in the help -> names of options, in their order; all others are under "Options"."""


class InGroups(click.Command):
    """A command whose help has its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        left = {option.name: option for option in self.get_params(ctx) if isinstance(option, click.Option)}
        grouped = {title: [left.pop(name) for name in names.split() if name in left] for title, names in GROUPS.items()}
        for title, options in {**grouped, "Options": list(left.values())}.items():
            if records := [record for option in options if (record := option.get_help_record(ctx)) is not None]:
                with formatter.section(title):
                    formatter.write_dl(records)


BUDGETS = {
    "tokens": "Instead of --steps: training tokens, such as 2.6B, 300M or 50k, padding not included.",
    "epochs": "Instead of --steps: passes over the training data, such as 1.5.",
    "tokens_per_parameter": "Instead of --steps: tokens for each parameter of the trained model, of which all count; 20, for example.",
}
"""Flags that say in other units how long a run is."""


def budget_flags(command: Any) -> Any:
    """Give a command `BUDGETS`; see `split_budget`."""
    for name, words in reversed(BUDGETS.items()):
        kind: Any = str if name == "tokens" else float
        metavar = "N" if name == "tokens" else "X"
        command = click.option(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, default=None, help=words)(
            command
        )
    return command


class Assignments(click.Option):
    """--set NAME=VALUE: every setting of a recipe by its key in YAML."""

    def __init__(self, *arguments: Any, own: Mapping[str, str] | None = None, **settings: Any):
        super().__init__(*arguments, **settings)
        self.own = own or {}
        """Settings for which the command has a flag of another kind."""

    def instead_of(self, flag: str) -> str | None:
        """What to write for a flag that the command does not have, if it names a setting."""
        name = flag.lstrip("-").replace("-", "_")
        if name in self.own:
            return self.own[name]
        return f"--set {name}.NAME=VALUE" if name in field_types(Recipe) else None


resume_flag = click.option(
    "--resume",
    type=Folder(),
    metavar="RUN",
    default=None,
    help="Continue this run from its newest checkpoint, exactly as it began; or with --steps or the like, train it for more.",
)


def recipe_flags(
    *,
    own: Mapping[str, str] | None = None,
    only: Mapping[str, Any] | None = None,
    shown: Mapping[str, str] | None = None,
) -> Callable[[Any], Any]:
    """Give a command a flag for each everyday setting of a recipe, and --set for all of them. The flags that version 0.1 had for
    the others work, but the help does not list them.

    Args:
        own: {setting: flag} of settings that the command asks for by another flag.
        only: {setting: default that the help shows, or None}: flags for these settings alone.
        shown: {setting: default that the help shows}.
    """

    def decorate(command: Any) -> Any:
        everyday = [name for name in settings_with("everyday") if name not in (own or {})]
        fields = {field.name: field for field in dataclasses.fields(Recipe)}
        add = click.option(
            "--set",
            "assignments",
            cls=Assignments,
            own=own,
            multiple=True,
            metavar="NAME=VALUE",
            help="Any setting of a recipe by its name in YAML, for example weight_decay=0.1, betas=[0.9,0.95], "
            "optimizer.update_gap=500 or shape.hidden_size=64; may be repeated.",
        )
        command = add(command)
        taken = {option.name for option in getattr(command, "__click_params__", [])} | set(own or {}) | {"shape"}
        for field in fields.values():
            if field.name not in taken and (field.name not in everyday or field.name not in (only or everyday)):
                command = _flag(field, hidden=True)(command)
        for name in reversed([name for name in everyday if only is None or name in only]):
            if name == "steps":
                command = budget_flags(command)
            command = _flag(fields[name], (only or shown or {}).get(name))(command)
        return command

    return decorate


def _flag(field: "dataclasses.Field[Any]", instead: Any = None, *, hidden: bool = False) -> Any:
    """The flag of a field; the help shows `instead` in place of its default."""
    kinds = [_bare(one) for one in alternatives_of(field_types(Recipe)[field.name]) if one is not type(None)]
    default = instead or (field.default if field.default is not dataclasses.MISSING else None)
    shown = str(default) if default is not None else False
    common: dict[str, Any] = {"help": field.metadata["help"], "default": None, "show_default": shown}
    common["hidden"] = hidden
    name = f"--{field.name.replace('_', '-')}"
    if field.name == SHORTHAND:
        return click.option("--option", SHORTHAND, multiple=True, metavar="NAME=VALUE", **common)
    if kinds[0] is bool:
        return click.option(f"{name}/{name.replace('--', '--no-')}", **common)
    if list[str] in kinds[1:]:  # one or several
        return click.option(name, multiple=True, metavar="TEXT", **common)
    if typing.get_origin(kinds[0]) is list:
        if typing.get_args(kinds[0]) != (str,):  # betas
            return click.option(name, type=float, nargs=2, **common)
        return click.option(name, multiple=True, metavar="TEXT", **common)
    if typing.get_origin(kinds[0]) is Literal:
        return click.option(name, type=click.Choice(typing.get_args(kinds[0])), **common)
    if kinds[0] in (str, int, float) and kinds[1:] in ([], [dict]):
        return click.option(name, type=kinds[0], **common)
    return click.option(name, type=Value(), **common)


def _bare(kind: Any) -> Any:
    """An annotation without its bounds."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _one(sources: tuple[str, ...]) -> str | None:
    """The one source of text that a saved model is read on."""
    if len(sources) > 1:
        raise ValueError(f"--data must be given once, because it is one text that is read, got {' and '.join(sources)}")
    return sources[0] if sources else None


def of_saved_model(command: Any) -> Any:
    """Flags for the text that a saved model is read on."""
    for option in reversed(_OF_SAVED_MODEL):
        command = option(command)
    return command


_OF_SAVED_MODEL = (
    click.option(
        "--data",
        default=None,
        multiple=True,
        callback=lambda context, param, value: _one(value),
        help="Another text, as in pretrain. Of embedded and hub data, the held-out part is read.",
        show_default="what the run held out, else embedded",
    ),
    click.option(
        "--sequence-length",
        type=click.IntRange(min=2),
        default=None,
        help="Tokens per sequence.",
        show_default="the run's, else 256 or the model's positions",
    ),
    click.option(
        "--documents",
        type=click.Choice(["packed", "separate", "padded"]),
        default=None,
        help="As in pretrain.",
        show_default="the run's, else packed",
    ),
    click.option("--text-column", default=None, help="As in pretrain.", show_default="the run's, else text"),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=None,
        help="Sequences per batch.",
        show_default="the run's, else 16",
    ),
    click.option(
        "--seed",
        type=SEED,
        default=None,
        help="Decides which text was held out.",
        show_default="the run's data_seed or seed, else 42",
    ),
    click.option(
        "--tokenizer", default=None, metavar="NAME", help="Folder or hub name, or bytes.", show_default="the model's"
    ),
)


# ---- from flags to a recipe


def changes_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, by name; names of --set may be dotted.

    Raises:
        ValueError: a value that is not YAML, or one setting given by two flags.
    """
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    assignments = given.pop("assignments", ())
    if SHORTHAND in given:
        given[SHORTHAND] = dict(name_and_value(text, "--option") for text in given[SHORTHAND])
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    by = {name: "--option" if name == SHORTHAND else f"--{name.replace('_', '-')}" for name in given}
    for text in assignments:
        name, value = name_and_value(text, "--set")
        if name in by:
            raise ValueError(f"{name} is given twice, by {by[name]} and by --set; give it once")
        given[name], by[name] = value, "--set"
    return given


def split_budget(flags: Mapping[str, Any]) -> tuple["Budget | None", dict[str, Any]]:
    """The budget that flags give in place of steps, if any, and the other flags, with steps that any warm-up fits into.

    Raises:
        ValueError: two of them are given, or one is given and so are steps; or it is not a positive amount.
    """
    rest = {name: value for name, value in flags.items() if name not in BUDGETS}
    given = {name: flags[name] for name in BUDGETS if flags.get(name) is not None}
    named = [*given, *(["steps"] if given and "steps" in changes_of(rest) else [])]
    if len(named) > 1:
        both = " and ".join(f"--{name.replace('_', '-')}" for name in named[:2])
        raise ValueError(f"{both} both say how long the run is; give one of them")
    if not given:
        return None, rest
    from lorank.train.budget import Budget

    return Budget.read(**given), {**rest, "steps": LONGEST}


def _from_file(path: str, changes: dict[str, Any]) -> Recipe:
    """A file's recipe with changes. If it becomes shorter, so does its warm-up, unless that is changed too."""
    steps = changes.get("steps")
    if type(steps) is not int or steps < 1 or {"warmup_steps", "schedule_steps"} & changes.keys():
        return Recipe.read(path, **changes)
    found = Recipe.read(path, **{name: value for name, value in changes.items() if name != "steps"})
    if steps >= found.steps:  # LONGEST: its budget will say
        return found if steps == LONGEST else dataclasses.replace(found, steps=steps)
    from lorank.train.budget import of_length

    return of_length(found, steps)


def recipe_of(
    path: str | None,
    flags: Mapping[str, Any],
    *,
    own: Mapping[str, str] | None = None,
    base: Mapping[str, Any] | None = None,
    shared: bool = False,
) -> Recipe:
    """The recipe that a command line describes: a file or a name, else the settings of `base`, with the flags on top. If it is `shared`
    by several methods, a setting of a method is for those that have it.

    Raises:
        ValueError: a setting that is unknown, given twice or wrong, or that belongs to another flag (`own`).
    """
    changes = changes_of(flags)
    for name in changes:
        if name in (own or {}):
            raise ValueError(f"--set {name}=... is not possible here; use {(own or {})[name]}")
    if shared:
        changes = {shared_name(full_name(name)): value for name, value in changes.items()}
    if path:
        return _from_file(path, changes)
    entries = {name: value for name, value in changes.items() if "." in full_name(name)}
    whole = {name: value for name, value in changes.items() if name not in entries}
    return Recipe.from_dict({**(base or {}), **whole}).but(entries)
