"""Which text a saved model is read on. A run is read on the text that it held out, cut as in training, unless the user asks
for another one."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lorank.train.data import files_of, same_content, share_trained_on
from lorank.train.data.sources import name_of
from lorank.train.folder import absolute, read_recipe, write_whole
from lorank.train.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A source, which part of it is read, and how it is cut into batches."""

    data: str | list[str] = "embedded"
    """As in a recipe. Of embedded and hub data, the part that training holds out is read."""
    held_out: bool = False
    """Whether also of local files only that part is read."""
    held_out_hash: str | None = None
    """Of that part, as it was when the run began; None: not known, or it does not matter."""
    seed: int = 42
    """Decides which part is held out: the run's data_seed, or its seed if it has none."""
    validation_tokens: int | None = 10_000_000
    """Decides how much is held out, as in a recipe."""
    last_tokens: int | None = None
    """Predicted tokens after which the run's last evaluation stopped; None: it read all."""
    sequence_length: int | None = None
    """Tokens; None: as many as suit the model."""
    documents: Literal["packed", "separate", "padded"] = "packed"
    text_column: str = "text"
    stream: bool = False
    batch_size: int = 16
    run: str | None = None
    """The run whose recipe says this, or what was made of it; None: no run is known, or another text than its own."""
    trained_on: int = 0
    """How many of its files the run, or one that it started from, was trained on."""
    share_trained_on: float = 0.0
    """About which share of its documents they were trained on, in whatever files; 0 where files are known."""

    def __str__(self) -> str:
        part = "held-out part of " if self.held_out else "part of " if self.data == "embedded" else ""
        said = f"{part}{name_of(self.data)}" + (", as in the run's recipe" if self.run else "")
        if self.sequence_length:
            said += f", in sequences of {self.sequence_length} tokens"
        if self.trained_on:
            said += f" (the run, or one that it started from, was trained on most of {self.trained_on} of its files, so these figures are too good)"
        elif self.share_trained_on >= FEW:
            part = f"about {self.share_trained_on:.0%} of its documents"
            said += f" ({part} are in what the run, or one that it started from, was trained on, so these figures are too good)"
        return said


def recipe_of_run(model: str) -> Recipe | None:
    """The recipe of a run's folder, or of the run that a checkpoint's folder is in; None for any other model."""
    folder = Path(model).expanduser()
    if folder.name.startswith("checkpoint-") and not (folder / "recipe.yaml").exists():
        folder = folder.parent
    written = folder / "recipe.yaml"
    return read_recipe(written) if written.exists() else None


TRAINED_ON = "trained_on.json"
"""Stands next to a model that was made of a run, such as an export: what the run's recipe says of its text. It names places on this
machine, and is not pushed."""
HASH, FILES, DOCUMENTS = "held_out_hash", "files", "document_sample"
"""What run.json and `TRAINED_ON` know besides: what was held out, and the contents of files and a sample of the documents that were trained
on."""
FEW = 0.01
"""Share of documents that are in any two texts, such as an error message of a web server, and are not worth a word."""
_OF_TEXT = (
    *("data", "validation", "validation_tokens", "text_column", "stream", "sequence_length", "documents", "start_from"),
    *("seed", "data_seed", "batch_size", "micro_batch_size", "eval_tokens", "eval_all_at_end"),
)


def keep_text(model: str, out: Path) -> None:
    """Write to the folder `out`, of a model that was made of another one, what that one was trained on, if this is known."""
    if (recipe := recipe_of_text(model)) is not None:
        write_text(recipe, out, *(_known_of(model, name) for name in (HASH, FILES, DOCUMENTS)))


def write_text(
    recipe: Recipe, out: Path, held_out_hash: str | None, files: Iterable[str] | None, documents: str | None
) -> None:
    """Write to the folder `out` of a model what it was trained on: what a recipe says, digests of files, and a sample of documents."""
    known = {name: getattr(absolute(recipe), name) for name in _OF_TEXT}
    write_whole(
        out / TRAINED_ON,
        json.dumps({**known, HASH: held_out_hash, FILES: [*(files or ())], DOCUMENTS: documents}, indent=2),
    )


def recipe_of_text(model: str) -> Recipe | None:
    """A recipe that says what a saved model was trained on, and what was held out: a run's own, or that of the run it was made of.

    Raises:
        ValueError: there is one that cannot be read.
    """
    if (recipe := recipe_of_run(model)) is not None:
        return recipe
    kept = Path(model).expanduser() / TRAINED_ON
    if not kept.exists():
        return None
    try:
        known = json.loads(kept.read_text(encoding="utf-8"))
        return Recipe.from_dict({name: value for name, value in known.items() if name not in (HASH, FILES, DOCUMENTS)})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{kept} must say what the model was trained on, as lorank wrote it, but: {error}") from None


def _known_of(model: str, name: str) -> Any:
    """`HASH`, `FILES` or `DOCUMENTS` of the run of a saved model; None for one that began before this was written down."""
    folder = Path(model).expanduser()
    for file in (folder / "run.json", folder / TRAINED_ON, folder.parent / "run.json"):
        if file.exists() and (file.parent == folder or folder.name.startswith("checkpoint-")):
            with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
                return json.loads(file.read_text(encoding="utf-8")).get(name)
    return None


def limits_of(recipe: Recipe) -> tuple[int, int | None]:
    """Predicted tokens after which a run's evaluations stop: during training, and at the end. None: it reads all."""
    during = 100_000 if recipe.eval_tokens is None else recipe.eval_tokens
    return during, None if recipe.eval_all_at_end else recipe.eval_tokens


def text_of(model: str, **asked: Any) -> Text:
    """The text for a saved model: what is asked for, by default what its run held out; or embedded, if no run is known.

    Args:
        asked: fields of `Text`; those that are None are not asked for.

    Raises:
        ValueError: the seed would hold out another part of the run's text than training did.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    recipe = recipe_of_text(model)
    if recipe is None:
        return Text(**asked)
    own = _of_run(recipe, model)
    source = asked.get("data")
    if source is not None and not _same(source, own.data):
        found = dataclasses.replace(own, data=source, held_out=False, held_out_hash=None, run=None)
        trained_on = len(_seen(source, recipe, model)) or _trained_before(recipe, found)
        return _with_share(
            dataclasses.replace(found, trained_on=trained_on, **asked), [model, *_names(_bases(recipe, found))]
        )
    seed = asked.get("seed", own.seed)
    if seed != own.seed and own.held_out:
        raise ValueError(
            f"--seed must be {own.seed}, with which {model} held out part of data={recipe.data!r}, got {seed}: the run was trained "
            "on the part that this seed holds out; leave --seed out"
        )
    if any(asked.get(name, getattr(own, name)) != getattr(own, name) for name in DECIDE):
        own = dataclasses.replace(own, held_out_hash=None)  # other text by intent
    own = dataclasses.replace(own, trained_on=_trained_before(recipe, own))
    return _with_share(dataclasses.replace(own, **{**asked, "data": own.data}), _names(_bases(recipe, own)))


def with_split_of_start(recipe: Recipe) -> Recipe:
    """A recipe that starts from a run on the same text, with the split of that run, unless it says another: what that run was trained on is
    not held out then."""
    base = recipe_of_text(recipe.start_from) if recipe.start_from is not None else None
    if base is None or recipe.data_seed is not None or not _same(recipe.data, base.data):
        return recipe
    return dataclasses.replace(recipe, data_seed=base.split_seed)


def _with_share(text: Text, models: Sequence[str]) -> Text:
    """A text with the share of its documents that the runs of these models were trained on, if no files are known."""
    samples = [sample for model in models if (sample := _known_of(model, DOCUMENTS))]
    if text.trained_on or not samples or not files_of(text.data):
        return text
    read = {name: getattr(text, name) for name in ("held_out", "seed", *DECIDE)}
    return dataclasses.replace(text, share_trained_on=share_trained_on(text.data, samples, **read))


def _trained_before(recipe: Recipe, text: Text) -> int:
    """How many files of a text the runs were trained on that this one started from, if they did not hold out the same part."""
    return len({file for base, name in _bases(recipe, text) for file in _seen(text.data, base, name)})


def _names(bases: Iterable[tuple[Recipe, str]]) -> list[str]:
    return [name for _, name in bases]


def _bases(recipe: Recipe, text: Text) -> Iterator[tuple[Recipe, str]]:
    """The runs that this one started from and that did not hold out the same part of a text, with the names of their models."""
    seen = set[str]()
    while (start := recipe.start_from) is not None and start not in seen:
        seen.add(start)
        try:
            base = recipe_of_text(start)
        except ValueError:  # it was changed, and is not what is asked about
            base = None
        if base is None:
            break
        recipe = base
        if not _same_part(text, _of_run(base, start)):
            yield base, start


def _seen(source: str | list[str], recipe: Recipe, model: str) -> set[Path]:
    """The files of a source that a model's run was trained on, or copies of which."""
    ours, theirs = files_of(source), files_of(recipe.data)
    with contextlib.suppress(OSError):  # of a file that cannot be read
        return (ours & theirs) | same_content(ours - theirs, theirs, _known_of(model, FILES) or ())
    return ours & theirs


def _same_part(one: Text, other: Text) -> bool:
    """Whether two texts are the same held-out part of the same data."""
    if not (one.held_out and other.held_out and _same(one.data, other.data)):
        return False
    if one.held_out_hash is not None and other.held_out_hash is not None:
        return one.held_out_hash == other.held_out_hash
    return all(getattr(one, name) == getattr(other, name) for name in ("seed", *DECIDE))


DECIDE = ("text_column", "validation_tokens", "stream")
"""What decides, besides the seed, what is held out of data."""


def _of_run(recipe: Recipe, model: str) -> Text:
    """The text on which training evaluated."""
    other = recipe.validation is not None and not _same(recipe.validation, recipe.data)
    return Text(
        data=recipe.validation if other else recipe.data,  # type: ignore[arg-type]
        held_out=not other,
        held_out_hash=None if other else _known_of(model, HASH),
        seed=recipe.split_seed,
        validation_tokens=recipe.validation_tokens,
        last_tokens=limits_of(recipe)[1],
        sequence_length=recipe.sequence_length,
        documents=recipe.documents,
        text_column=recipe.text_column,
        stream=recipe.stream,
        batch_size=recipe.micro_batch_size or recipe.batch_size,
        run=model,
    )


def _same(one: str | list[str], other: str | list[str]) -> bool:
    """Whether two sources are the same; names of files may be relative."""
    if isinstance(one, list) or isinstance(other, list):
        return one == other
    return one == other or os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))
