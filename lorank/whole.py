"""Files that are whole or not there, and that are written where their names say, whatever links are there."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """A temporary name for a file, which gets its own when all of it is written; if that fails, nothing is left."""
    half = cleared(path.with_name(f".{path.name}.{os.getpid()}"))
    try:
        yield half
        open_to_others([half])
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def open_to_others(files: Iterable[Path]) -> None:
    """Give files the permissions that any new file has in their folder. safetensors writes files that nobody but their owner can
    read, whatever the umask is."""
    for file in [*files]:
        probe = cleared(file.with_name(f".{file.name}.{os.getpid()}.new"))
        with contextlib.suppress(OSError):  # a disk without permissions
            probe.touch(exist_ok=False)
            usual = probe.stat().st_mode
            if file.is_file() and file.stat().st_mode != usual:
                file.chmod(usual & 0o777)
        probe.unlink(missing_ok=True)


def cleared(path: Path) -> Path:
    """A name under which nothing is left. A folder is removed with all in it, and of a link the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
    return path


def without_link(path: Path) -> Path:
    """A name to write under in a folder that somebody else may have made: a link there, which may lead anywhere, is removed."""
    if path.is_symlink():
        path.unlink()
    return path
