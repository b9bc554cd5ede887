"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """A temporary name for a file, which gets its own when all of it is written; if that fails, nothing is left."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
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
        probe = file.with_name(f".{file.name}.{os.getpid()}.new")
        with contextlib.suppress(OSError):  # a disk without permissions
            probe.touch()
            usual = probe.stat().st_mode
            if file.is_file() and file.stat().st_mode != usual:
                file.chmod(usual & 0o777)
        probe.unlink(missing_ok=True)
