"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """A temporary name for a file, which gets its own when all of it is written; if that fails, nothing is left."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield half
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
