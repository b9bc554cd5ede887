"""Documents from the interpreter's own standard library, from local files (prepared or streamed), or from a data set of the hub
(streamed)."""

import atexit
import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow.compute
from datasets import Dataset, IterableDataset

from lorank.train import seen
from lorank.train.data.documents import read_documents
from lorank.train.data.files import embedded_files, found_files, local_files
from lorank.train.data.streams import FileStream, held_out_of, mixed, streams_of
from lorank.train.hub import asked_if_reachable
from lorank.train.reading import Tally, kind_of

logger = logging.getLogger(__name__)
VALIDATION_SHARE = 0.05
MOST_OFTEN = 1000  # the largest weight of a source
LONG_TOKEN = 8  # bytes; no usual vocabulary has tokens as long on average, in any language
SHUFFLE_BUFFER = 10_000  # documents of a stream
Documents: TypeAlias = Dataset | IterableDataset | FileStream  # one column, text; one row, one document


class Source(NamedTuple):
    """Documents in a seeded random order, and their two parts."""

    whole: Documents
    train: Documents
    validation: Documents
    description: str
    digests: list[str]
    """Of the contents of files; none of a stream and of embedded ones."""
    sample: np.ndarray | None = None
    """Hashes of documents, see `lorank.train.seen`; None for a stream."""


def open_data(
    data: str | list[str],
    text_column: str,
    seed: int,
    cache: Path,
    validation_tokens: int | None = None,
    *,
    stream: bool = False,
) -> Source:
    """A source, or several as one; see `open_source` and `open_sources`. As a `stream`, local files are read when they are needed."""
    check_sources(data)
    if isinstance(data, list):
        return open_sources(data, text_column, seed, cache, validation_tokens, stream=stream)
    if stream and not _is_hub(data):
        return _open_stream(data, text_column, seed, validation_tokens)
    return open_source(data, text_column, seed, cache, validation_tokens)


def check_sources(*data: str | list[str] | None) -> None:
    """What can be said of sources before one is read.

    Raises:
        ValueError: a weight is none, or no file can be read.
        OSError: there is no such file.
    """
    for some in (some for some in data if some is not None):
        for one in [some] if isinstance(some, str) else some:
            name, weight = weighted(one) if isinstance(some, list) else (one, 1.0)
            path = Path(one.rpartition(":")[0] or ".").expanduser()
            given = ":" in one and path.exists() and not Path(one).expanduser().exists()
            if given and (name == one or not 0 < weight <= MOST_OFTEN):
                raise ValueError(
                    f"data must be a path, or of several sources PATH:WEIGHT with a number up to {MOST_OFTEN:,} such as 0.3, got {one!r}"
                )
            if name != "embedded" and not _is_hub(name):
                found_files(name)


def name_of(data: str | list[str]) -> str:
    """A source or several in words."""
    return data if isinstance(data, str) else " and ".join(data)


def open_source(source: str, text_column: str, seed: int, cache: Path, validation_tokens: int | None = None) -> Source:
    """Find the documents of a source, shuffle them and split them; about how many tokens are held out at most, if that is said."""
    if _is_hub(source):
        return _open_hub(source, text_column, seed)
    files, left = (embedded_files(), 0) if source == "embedded" else local_files(source)
    kinds = list(dict.fromkeys(kind_of(file) for file in files if file.stat().st_size))
    files.sort(key=lambda file: kinds.index(kind_of(file)) if kind_of(file) in kinds else len(kinds))
    documents, tally, digests, sample = read_documents(files, text_column, cache)
    sizes = pyarrow.compute.binary_length(documents.data.column("text")).to_numpy()  # bytes [documents]
    order = np.random.default_rng(seed).permutation(len(sizes))
    if not order.size:
        raise ValueError(f"{source} contains no text: every document is empty")
    documents, sizes = documents.select(order), sizes[order]
    description = f"{source}: {_counted(tally.documents, 'document')}, {amount(tally.bytes, 'B')}"
    if source != "embedded":
        description += _said(tally, left)
    digests = digests if source != "embedded" else []
    return Source(documents, *_split(documents, sizes, validation_tokens), description, digests, sample)


def _open_stream(source: str, text_column: str, seed: int, validation_tokens: int | None) -> Source:
    files, left = (embedded_files(), 0) if source == "embedded" else local_files(source)
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise ValueError(f"{source} contains no text: every file is empty")
    total = sum(file.stat().st_size for file in files)
    share = (
        VALIDATION_SHARE if validation_tokens is None else min(VALIDATION_SHARE, LONG_TOKEN * validation_tokens / total)
    )
    said = f"{source}: {_counted(len(files), 'file')}, {amount(total, 'B')}, streamed{_said(Tally(), left)}"
    return Source(*streams_of(files, text_column, seed, share), said, [])


def open_sources(
    sources: Sequence[str],
    text_column: str,
    seed: int,
    cache: Path,
    validation_tokens: int | None = None,
    *,
    stream: bool = False,
) -> Source:
    """Several local sources as one. In "PATH:WEIGHT" the weight says how often a pass over the data sees each document: with 2
    twice, with 0.3 three in ten. It does not change what is held out.

    Raises:
        ValueError: one is on the hub, given twice or has a weight of zero.
    """
    opened = []
    names = [name for name, _ in map(weighted, sources)]
    for name, weight in map(weighted, sources):
        if _is_hub(name):
            raise ValueError(
                f"data must be local if it is several sources, got {name!r}; give it alone, or download it"
            )
        if not weight or names.count(name) > 1:
            raise ValueError(f"data must name each source once, with a positive weight if any, got {list(sources)}")
        opened.append((open_data(name, text_column, seed, cache, validation_tokens, stream=stream), weight))
    said = "; ".join(one.description + ("" if weight == 1 else f", times {weight:g}") for one, weight in opened)
    if stream:
        whole, train, validation = (
            [getattr(one, side) for one, _ in opened] for side in ("whole", "train", "validation")
        )
        weights = [weight for _, weight in opened]
        sides = mixed(whole, weights, seed), mixed(train, weights, seed), mixed(validation, [1.0] * len(opened), seed)
        return Source(*sides, said, [])
    parts = {
        "whole": [_as_often(one.whole, weight) for one, weight in opened],
        "train": [_as_often(one.train, weight) for one, weight in opened],
        "validation": [one.validation for one, _ in opened],
    }
    joined = {}
    for part, documents in parts.items():
        every = datasets.concatenate_datasets(documents)
        joined[part] = every.select(np.random.default_rng(seed).permutation(len(every)))
    digests = [digest for one, _ in opened for digest in one.digests]
    sample = seen.joined(one.sample for one, _ in opened if one.sample is not None)
    return Source(**joined, description=said, digests=digests, sample=sample)


def weighted(source: str) -> tuple[str, float]:
    """A source and its weight.

    >>> weighted("books/:0.3"), weighted("books/")
    (('books/', 0.3), ('books/', 1.0))
    """
    found = re.fullmatch(r"(.+):(\d+(?:\.\d+)?|\.\d+)", source)
    return (source, 1.0) if found is None or Path(source).expanduser().exists() else (found[1], float(found[2]))


def _as_often(documents: Documents, weight: float) -> Dataset:
    """Documents, which are in a random order, that many times; the last time as many of them as remain."""
    assert isinstance(documents, Dataset)
    count = max(1, round(weight * len(documents)))
    return documents if count == len(documents) else documents.select(np.arange(count) % len(documents))


def _said(tally: Tally, left: int) -> str:
    """How many files were read, if not one, what was left out, and what was not text."""
    others = {"empty document": tally.empty, "unreadable line": tally.invalid, "other file": left}
    listed = ", ".join(_counted(number, what) for what, number in others.items() if number)
    notes = [f"left out: {listed}"] * bool(listed)
    notes += [f"not UTF-8: {_counted(tally.malformed, 'byte')}"] * bool(tally.malformed)
    read = f" from {tally.files:,} files" if tally.files > 1 else ""
    return f"{read} ({'; '.join(notes)})" if notes else read


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def is_held_out(source: str | list[str]) -> bool:
    """Whether an evaluation on a source reads the part that training on it holds out: of embedded and hub data."""
    return isinstance(source, str) and (source == "embedded" or _is_hub(source))


def files_of(source: str | list[str]) -> set[Path]:
    """The files of a source or of several, links followed; none of a data set of the hub, or of what does not exist."""
    if isinstance(source, list):
        return {file for one in source for file in files_of(weighted(one)[0])}
    if _is_hub(source):
        return set()
    with contextlib.suppress(OSError, ValueError):
        found = embedded_files() if source == "embedded" else found_files(source)[0]
        return {file.resolve() for file in found}
    return set()


def _split(documents: Dataset, sizes: np.ndarray, most_tokens: int | None = None) -> tuple[Dataset, Dataset]:
    """Training and validation. The latter takes the first documents that are not too large, until it has 5 % of the text or
    surely `most_tokens` tokens."""
    if len(documents) == 1:
        text = documents[0]["text"]
        late, early = (int((1 - part) * len(text)) for part in (VALIDATION_SHARE, 2 * VALIDATION_SHARE))
        cut = text.rfind("\n", early, late) + 1 or late
        return Dataset.from_dict({"text": [text[:cut]]}), Dataset.from_dict({"text": [text[cut:]]})
    share = VALIDATION_SHARE * sizes.sum()
    if most_tokens is not None:
        share = min(share, LONG_TOKEN * most_tokens)
    held_out = held_out_of(sizes, share)
    return documents.select(np.setdiff1d(np.arange(len(sizes)), held_out)), documents.select(held_out)


def _only(column: str, rows: Any) -> Any:
    """Rows with one column only, renamed to text."""
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def _is_hub(source: str) -> bool:
    """Whether a name can only mean a hub data set: it does not look like a path, and there is no file of that name."""
    if source == "embedded" or source.startswith((".", "/", "~")) or kind_of(Path(source)):
        return False
    return not Path(source).exists() and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source))


def _open_hub(source: str, text_column: str, seed: int) -> Source:
    """Streams of a hub data set. Without a validation split, their first documents (5 % at most) are held out."""
    name, _, config = source.partition(":")
    try:
        with asked_if_reachable():
            splits = datasets.load_dataset(name, config or None, streaming=True)
            first = {split: list(splits[split].take(1)) for split in ("train", "validation") if split in splits}
    except Exception as error:  # the network, the hub and every builder raise their own
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"{source} is not on disk and could not be opened on the hub ({first_line(error)})") from error
    if "train" not in first:
        raise ValueError(f"{source} must have a split named train, got {list(splits)}")
    streams = {}
    for split, rows in first.items():
        columns = list(rows[0]) if rows else []
        if text_column not in columns or not isinstance(rows[0][text_column], str | None):
            raise ValueError(f"{source} has no text in column {text_column!r}; set text_column to one of {columns}")
        streams[split] = _only(text_column, splits[split])
    whole = train = streams["train"]
    validation = streams.get("validation")
    if validation is None:
        seen = sum(1 for _ in whole.take(SHUFFLE_BUFFER))
        if seen < 2:
            raise ValueError(f"{source} has only one document and no validation split; give other validation data")
        count = max(1, int(VALIDATION_SHARE * seen))
        train, validation = whole.skip(count), whole.take(count)
    whole, train = (stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) for stream in (whole, train))
    return Source(whole, train, validation, f"{source}: streamed", [])


def texts_of(documents: Documents) -> Iterator[str]:
    """Texts of documents, without empty ones."""
    for block in documents.iter(batch_size=64):
        yield from filter(None, block["text"])


def cache_place() -> Path:
    """Where the cache is."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lorank"


def cache_folder(cache_dir: Path | None = None) -> Path:
    """The cache folder, or a temporary one if that cannot be written to."""
    folder = cache_dir or cache_place()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16))
            return folder
    except OSError as error:
        logger.warning("cannot write to the cache %s, so the next run will tokenise again: %s", folder, error)
        temporary = tempfile.mkdtemp(prefix="lorank-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and log lines of `datasets`. The user's own settings are restored afterwards."""
    fixed = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None  # by an environment variable
    bars = not fixed and not datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def amount(number: float, unit: str) -> str:
    """A number in the style of 11.8 MB or 3.4 M tokens."""
    power = 1 + (number >= 999_950) + (number >= 999_950_000)
    return f"{number / 1000**power:.1f} {' kMG'[power]}{'' if unit == 'B' else ' '}{unit}"
