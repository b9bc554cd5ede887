"""Which files a source means, and their documents, read once and kept in the cache by what the files contain.

A folder is searched at any depth, through links too; each file is read once, whatever links lead to it. Names that begin
with a dot are skipped. Every other file that is not read is named in a warning.

Files are read in groups. The cache holds one Arrow file for each group, under a hash of the content of its files, so a
file that changed is read again, also if its size and its time did not change; and of a corpus in many files, only the
groups with changes.
"""

import contextlib
import dataclasses
import errno
import fnmatch
import glob
import hashlib
import json
import logging
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import xxhash
from datasets import Dataset

from lorank.train.data.cache import use
from lorank.train.data.reading import BUFFER, SUFFIXES, Tally, blocks, kind_of
from lorank.train.watching import tell

logger = logging.getLogger(__name__)
VERSION = 3  # part of every cache key; raise it when the same file must give other documents
GROUP = 256 << 20  # bytes of files whose documents are cached together
NOT_EMBEDDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SCHEMA = pa.schema({"text": pa.string()})


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


def local_files(source: str) -> tuple[list[Path], int]:
    """The files to read of a file, folder or glob, and how many others are left out, which a warning names.

    Raises:
        ValueError: there is none to read.
        OSError: there is no such file, or a folder cannot be searched.
    """
    files, left = found_files(source)
    if left:
        path = Path(source).expanduser()
        names = ", ".join(_name(file, path) for file in left[:3])
        others = f" and {len(left) - 3} more" if len(left) > 3 else ""
        logger.warning("%s: left out %s%s; looked for %s", source, names, others, SUFFIXES)
    return files, len(left)


def found_files(source: str) -> tuple[list[Path], list[Path]]:
    """The files to read of a source, and the others; errors are those of `local_files`."""
    path = Path(source).expanduser()
    if path.is_file():
        if not kind_of(path):
            raise ValueError(f"data files must end in {SUFFIXES}, got {source}")
        return [path], []
    if path.is_dir():
        found = list(_walk(path))
    elif set("*?[") & set(source):
        found = list(_glob(path))
    else:
        raise FileNotFoundError(f"file not found: {source}; give a file, folder, glob or hub data set")
    files = _once(file for file in found if kind_of(file) and file.is_file())
    if not files:
        raise ValueError(f"{source} contains no readable file; looked for {SUFFIXES}")
    read = {*files, *(folder for file in files for folder in file.parents)}
    return files, [file for file in found if file not in read and not (kind_of(file) and file.is_file())]


def _glob(pattern: Path) -> Iterator[Path]:
    """What matches a pattern. `**` stands for folders at any depth, links included."""
    parts = pattern.parts
    if "**" not in parts:
        yield from map(Path, sorted(glob.glob(str(pattern))))
        return
    start = parts.index("**")
    folders = map(Path, glob.glob(str(Path(*parts[:start])))) if start else [Path()]
    found = [
        file
        for folder in folders
        if folder.is_dir()
        for file in _walk(folder)
        if _matches(file.relative_to(folder).parts, parts[start:])
    ]
    yield from sorted(found, key=str)


def _matches(names: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    if not patterns or not names:
        return not names and set(patterns) <= {"**"}
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or _matches(names[1:], patterns)
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _name(file: Path, folder: Path) -> str:
    name = str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)
    return f"{name} (a folder)" if file.is_dir() else name if file.exists() else f"{name} (a broken link)"


def _once(files: Iterable[Path]) -> list[Path]:
    """Files in their order, each once, whatever links lead to it."""
    return list({os.path.realpath(file): file for file in reversed(list(files))}.values())[::-1]


def _walk(folder: Path, skip: Iterable[str] = (), above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files at any depth in a fixed order, without hidden ones. Links are followed, but not back into a folder above."""
    try:
        inside = [folder / name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    except OSError as error:
        raise OSError(f"{folder} cannot be searched: {error.strerror}; leave it out or give other data") from None
    above = (*above, os.path.realpath(folder))
    yield from (path for path in inside if not path.is_dir())
    for path in inside:
        if path.is_dir() and path.name not in skip and os.path.realpath(path) not in above:
            yield from _walk(path, skip, above)


def read_documents(files: Sequence[Path], column: str, cache: Path) -> tuple[Dataset, Tally]:
    """The documents of files in their order, one column, text; and what was read and left out.

    Raises:
        ValueError: a file holds no text, or not where it was looked for.
        OSError: a file or the cache failed, or a file changed meanwhile.
    """
    groups = list(_groups(files))
    keys = _keys(groups, column)
    size, done = sum(map(_size, files)), 0
    parts, tally = [], Tally()
    for group, (key, before) in zip(groups, keys, strict=True):
        part, counted = _read_group(group, key, before, column, cache, partial(_tell_reading, done, size))
        parts.append(part)
        tally += counted
        done += sum(map(_size, group))
    return datasets.concatenate_datasets(parts), tally


def _size(file: Path) -> int:
    return file.stat().st_size


def _tell_reading(before: int, total: int, done: int) -> None:
    tell("reading", before + done, total, "B")


def _groups(files: Iterable[Path]) -> Iterator[list[Path]]:
    group: list[Path] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.stat().st_size
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _keys(groups: Sequence[Sequence[Path]], column: str) -> list[tuple[str, list[tuple[int, ...]]]]:
    """Of each group, the name of its documents in the cache, and what its files were like just before they were hashed."""
    total, done = sum(_size(file) for group in groups for file in group), 0
    keys = []
    for group in groups:
        before, contents = [], []
        for file in group:
            before.append(_state(file))
            contents.append((kind_of(file), file.suffix.lower(), _digest(file, done, total)))
            done += before[-1][0]
        key = hashlib.blake2b(repr((VERSION, column, contents)).encode(), digest_size=16).hexdigest()
        keys.append((key, before))
    return keys


def _read_group(
    files: Sequence[Path],
    key: str,
    before: Sequence[tuple[int, ...]],
    column: str,
    cache: Path,
    say: Callable[[int], None],
) -> tuple[Dataset, Tally]:
    kept, counts = (cache / "documents" / f"{key}.{end}" for end in ("arrow", "json"))
    use(kept)
    if not kept.exists():
        try:
            _write(files, column, kept, counts, before, say)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(
                    f"the disk of the cache {cache} is full; free some space or set XDG_CACHE_HOME"
                ) from error
            raise
    documents = Dataset.from_file(str(kept))
    documents._fingerprint = key  # what is made from them is known by what they contain
    return documents, Tally(**json.loads(counts.read_text()))


def _write(
    files: Sequence[Path],
    column: str,
    kept: Path,
    counts: Path,
    before: Sequence[tuple[int, ...]],
    say: Callable[[int], None],
) -> None:
    tally, done = Tally(), 0
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".reading-") as part:
        with pa.OSFile(f"{part}/arrow", "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for file, state in zip(files, before, strict=True):
                for block, position in blocks(file, column, tally):
                    if len(block):
                        writer.write_batch(pa.record_batch([block], schema=SCHEMA))
                    say(done + position)
                done += state[0]
                if _state(file) != state:
                    raise OSError(f"{file} changed while it was read; start again when it is complete")
        Path(part, "json").write_text(json.dumps(dataclasses.asdict(tally)))
        os.replace(f"{part}/json", counts)
        os.replace(f"{part}/arrow", kept)


def _state(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _digest(file: Path, done: int, total: int) -> str:
    """Of the whole content, at several GB a second: sizes and times of change do not tell whether a file is the same."""
    digest = xxhash.xxh3_128()
    with open(file, "rb", buffering=0) as stream:
        while part := stream.read(BUFFER):
            digest.update(part)
            done += len(part)
            tell("hashing", done, total, "B")
    return digest.hexdigest()
