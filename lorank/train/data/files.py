"""Which files a source means.

A folder is searched at any depth, through links too; each file is read once, whatever links lead to it. Names that begin
with a dot are skipped. Every other file that is not read is named in a warning.
"""

import contextlib
import fnmatch
import glob
import logging
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorank.train.reading import SUFFIXES, kind_of

logger = logging.getLogger(__name__)
NOT_EMBEDDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


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


WRITTEN = ("metrics.jsonl", "config.json", "README.md", "checkpoint-1/config.json", "runs/one/metrics.jsonl")
"""Files like those that a run or a comparison writes, which are of kinds that are read."""


def would_read(source: str, folder: Path) -> bool:
    """Whether what a run writes to a folder would be read as text of a source, now or when the source is read again.

    >>> would_read("/texts", Path("/texts/runs/one")), would_read("/texts/*.txt", Path("/texts")), would_read("/texts", Path("/texts/.runs"))
    (True, False, False)
    """
    place, path = Path(os.path.realpath(folder.expanduser())), Path(source).expanduser()
    if set("*?[") & set(source) and not path.exists():
        pattern = Path(os.path.abspath(path)).parts
        return any(_matches((place / name).parts, pattern) for name in WRITTEN)
    top = Path(os.path.realpath(path))
    return not top.is_file() and place.is_relative_to(top) and not _is_hidden(place.relative_to(top))


def _is_hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


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
