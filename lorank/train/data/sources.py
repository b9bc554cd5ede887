"""Documents from the interpreter's own standard library, from local files, or from a data set of the hub (streamed)."""

import atexit
import contextlib
import errno
import glob
import logging
import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow.compute
from datasets import Dataset, IterableDataset, Value

from lorank.train.hub import asked_if_reachable

logger = logging.getLogger(__name__)
VALIDATION_SHARE = 0.05
SHUFFLE_BUFFER = 10_000  # documents of a stream
LOADERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
SUFFIXES = f"{', '.join(LOADERS)} (or these with .gz)"
NOT_EMBEDDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
Documents: TypeAlias = Dataset | IterableDataset  # one column, text; one row, one document


class Source(NamedTuple):
    """Documents in a seeded random order, and their two parts."""

    whole: Documents
    train: Documents
    validation: Documents
    description: str


def open_source(source: str, text_column: str, seed: int, cache: Path) -> Source:
    """Find the documents of a source, shuffle them and split them."""
    if _is_hub(source):
        return _open_hub(source, text_column, seed)
    kinds: dict[str, list[Path]] = {}
    for file in embedded_files() if source == "embedded" else _local_files(source):
        if file.stat().st_size:
            kinds.setdefault(_loader(file), []).append(file)
    parts = [_read(loader, files, text_column, cache) for loader, files in kinds.items()]
    documents = datasets.concatenate_datasets(parts) if parts else Dataset.from_dict({"text": [""]})
    texts = documents.data.column("text")
    sizes = pyarrow.compute.binary_length(texts).fill_null(0).to_numpy()  # bytes [documents]
    order = np.random.default_rng(seed).permutation(np.flatnonzero(sizes))
    if not order.size:
        raise ValueError(f"{source} contains no text: every document is empty")
    documents, sizes = documents.select(order), sizes[order]
    count = f"{len(sizes):,} document{'s' * (len(sizes) > 1)}"
    description = f"{source}: {count}, {quantity(sizes.sum(), 'B')}"
    return Source(documents, *_split(documents, sizes), description)


def open_for_evaluation(source: str, text_column: str, seed: int, cache: Path) -> Documents:
    """Documents to evaluate on: the validation part of embedded and hub data, all of local files."""
    opened = open_source(source, text_column, seed, cache)
    return opened.validation if source == "embedded" or _is_hub(source) else opened.whole


def _split(documents: Dataset, sizes: np.ndarray) -> tuple[Dataset, Dataset]:
    """Training and validation. The latter takes the first documents that are not too large, until it has 5 % of the text."""
    if len(documents) == 1:
        text = documents[0]["text"]
        late, early = (int((1 - part) * len(text)) for part in (VALIDATION_SHARE, 2 * VALIDATION_SHARE))
        cut = text.rfind("\n", early, late) + 1 or late
        return Dataset.from_dict({"text": [text[:cut]]}), Dataset.from_dict({"text": [text[cut:]]})
    share = VALIDATION_SHARE * sizes.sum()
    small = np.flatnonzero(sizes <= max(share, sizes.min()))
    held_out = small[: np.searchsorted(np.cumsum(sizes[small]), share) + 1][: len(sizes) - 1]
    return documents.select(np.setdiff1d(np.arange(len(sizes)), held_out)), documents.select(held_out)


def embedded_files() -> list[Path]:
    """The modules of Python's standard library, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(folder, NOT_EMBEDDED) if file.suffix == ".py" and _is_text(file)]
    if not files:
        raise FileNotFoundError(
            f"the embedded corpus is Python's own .py files, and {folder} has none; give other data"
        )
    return files


def _is_text(file: Path) -> bool:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        file.read_text(encoding="utf-8")
        return True
    return False


def _local_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        if not _loader(path):
            raise ValueError(f"data files must end in {SUFFIXES}, got {source}")
        return [path]
    if path.is_dir():
        found: Iterable[Path] = _walk(path)
    elif set("*?[") & set(source):
        found = map(Path, sorted(glob.glob(str(path), recursive=True)))
    else:
        raise FileNotFoundError(f"file not found: {source}; give a file, folder, glob or hub data set")
    files = [file for file in found if _loader(file) and file.is_file()]
    if not files:
        raise ValueError(f"{source} contains no readable file; looked for {SUFFIXES}")
    return files


def _walk(folder: Path, skip: Iterable[str] = ()) -> Iterator[Path]:
    """Files at any depth in a fixed order, without hidden ones."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _loader(file: Path) -> str:
    """The loader of `datasets` that reads a file, or ""."""
    return LOADERS.get(Path(file.name.lower().removesuffix(".gz")).suffix, "")


def _read(loader: str, files: list[Path], text_column: str, cache: Path) -> Dataset:
    """Documents from files of one kind. Unchanged files come from the cache of `datasets`."""
    column = "text" if loader == "text" else text_column
    options = {"sample_by": "document"} if loader == "text" else {}
    names = [glob.escape(str(file)) for file in files]
    folder = str(cache / "documents")
    try:
        rows = datasets.load_dataset(loader, data_files=names, split="train", cache_dir=folder, **options)
    except Exception as error:  # pyarrow, pandas, datasets and the file system each raise their own
        cause = root_cause(error)
        if "disk space" in str(cause) or getattr(cause, "errno", None) == errno.ENOSPC:
            raise OSError(f"the disk of the cache {cache} is full; free some space or set XDG_CACHE_HOME") from error
        if len(files) > 1:  # one by one, to name the broken file, or because columns differ between files
            return datasets.concatenate_datasets([_read(loader, [file], text_column, cache) for file in files])
        kind = OSError if isinstance(cause, OSError) else ValueError
        wrong = "is not UTF-8 text" if isinstance(cause, UnicodeDecodeError) else f"is not readable as {loader}"
        raise kind(f"{files[0]} {wrong} ({first_line(cause)}); repair it or leave it out") from error
    if column not in rows.column_names:
        raise ValueError(f"{files[0]} has no column {column!r}; set text_column to one of {rows.column_names}")
    dtype = getattr(rows.features[column], "dtype", "list")
    if dtype not in ("string", "large_string"):
        raise ValueError(f"column {column!r} of {files[0]} must contain text, got {dtype}; set another text_column")
    rows = _only(column, rows)
    return rows if dtype == "string" else rows.cast_column("text", Value("string"))


def _only(column: str, rows: Any) -> Any:
    """Rows with one column only, renamed to text."""
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def _is_hub(source: str) -> bool:
    """Whether a name can only mean a hub data set: it does not look like a path, and there is no file of that name."""
    if source == "embedded" or source.startswith((".", "/", "~")) or _loader(Path(source)):
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
    return Source(whole, train, validation, f"{source}: streamed")


def texts_of(documents: Documents) -> Iterator[str]:
    """Texts of documents, without empty ones."""
    for block in documents.iter(batch_size=64):
        yield from filter(None, block["text"])


def cache_folder(cache_dir: Path | None = None) -> Path:
    """The cache folder, or a temporary one if that cannot be written to."""
    folder = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lorank"
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


def root_cause(error: BaseException) -> BaseException:
    """The error that `datasets` wrapped in others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def quantity(number: float, unit: str) -> str:
    """A number in the style of 11.8 MB or 3.4 M tokens."""
    power = 1 + (number >= 999_950) + (number >= 999_950_000)
    return f"{number / 1000**power:.1f} {' kMG'[power]}{'' if unit == 'B' else ' '}{unit}"
