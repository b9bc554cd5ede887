"""What the cache holds, who uses it, and how it is emptied.

    documents/KEY.arrow, KEY.json     texts of a group of files     tokenizers/KEY/    vocabularies learnt from a text
    rows/KEY.arrow, ...               token ids in rows             users/HOST-PID     what a process uses

A process that opens an entry says so first, in users/, and renews the entry's time of change. So an entry's age is the time
since its last use, and emptying the cache leaves out what a living process uses.
"""

import atexit
import contextlib
import functools
import os
import shutil
import socket
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from filelock import FileLock, Timeout

KINDS = {
    "documents": "documents",
    "tokenizers": "vocabularies",
    "rows": "rows of tokens",
    "sequences": "rows of tokens (lorank 0.1)",
}
"""Folders of the cache, and what they hold."""
USERS = "users"
AWAY_DAYS = 7
"""A process on another machine, which cannot be asked, is taken to live for so long after it last opened something."""


class Entry(NamedTuple):
    """What is made, used and deleted together."""

    kind: str
    paths: tuple[Path, ...]
    bytes: int
    age: float
    """Seconds since its last use."""
    in_use: bool


def use(path: Path) -> None:
    """Say that this process is about to open an entry, a file or folder in a folder of the cache."""
    with contextlib.suppress(OSError):  # without it the entry could only be deleted too early
        user = _user(path.parent.parent / USERS)
        with user.open("a") as file:
            file.write(f"{_name(path)}\n")
        os.utime(path)


@functools.cache
def _user(folder: Path) -> Path:
    """This process's file; its first line says when the process began, because numbers of processes come again."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{socket.gethostname()}-{os.getpid()}"
    file.write_text(f"{psutil.Process().create_time()}\n")
    atexit.register(file.unlink, missing_ok=True)
    return file


def _name(path: Path) -> str:
    """Of an entry: rows/KEY for rows/KEY.arrow."""
    return f"{path.parent.name}/{path.name.lstrip('.').partition('.')[0]}"


def _in_use(cache: Path) -> set[str]:
    """Names of entries that living processes use. What others have said is deleted."""
    names: set[str] = set()
    for file in (cache / USERS).glob("*-*"):
        with contextlib.suppress(OSError, ValueError):
            began, *used = file.read_text().splitlines()
            host, _, number = file.name.rpartition("-")
            if _lives(host, int(number), float(began), time.time() - file.stat().st_mtime):
                names |= {*used}
            else:
                file.unlink()
    return names


def _lives(host: str, number: int, began: float, age: float) -> bool:
    if host != socket.gethostname():
        return age < AWAY_DAYS * 86_400
    try:
        return abs(psutil.Process(number).create_time() - began) < 1
    except psutil.Error:
        return False


def entries(cache: Path) -> list[Entry]:
    """What the cache holds; nothing if there is none."""
    used, found = _in_use(cache), []
    for folder, kind in KINDS.items():
        top = cache / folder / "generator" if folder == "sequences" else cache / folder
        groups: dict[str, list[Path]] = {}
        for path in sorted(top.iterdir()) if top.is_dir() else ():
            groups.setdefault(_name(path), []).append(path)
        found += [_entry(kind, paths, name in used) for name, paths in groups.items()]
    return found


def _entry(kind: str, paths: list[Path], in_use: bool) -> Entry:
    files = [file for path in paths for file in ([path] if path.is_file() else [path, *path.rglob("*")])]
    states = []
    for file in files:
        with contextlib.suppress(OSError):  # deleted meanwhile
            states.append(file.stat())
    size = sum(state.st_size for file, state in zip(files, states, strict=False) if file.is_file())
    latest = max((state.st_mtime for state in states), default=0.0)
    return Entry(kind, tuple(paths), size, max(0.0, time.time() - latest), in_use)


def clear(cache: Path, older_than: float = 0.0) -> list[Entry]:
    """Delete the entries of which no process makes use now, or for that many seconds.

    Returns:
        Those that were deleted.

    Raises:
        OSError: one could not be deleted.
    """
    gone = []
    for entry in entries(cache):
        if entry.in_use or entry.age < older_than:
            continue
        with contextlib.ExitStack() as held:
            lock = next((path for path in entry.paths if path.suffix == ".lock"), None)
            try:
                if lock is not None:
                    held.enter_context(FileLock(lock, timeout=0))
            except Timeout:
                continue  # a process makes it now
            for path in entry.paths:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        gone.append(entry)
    return gone
