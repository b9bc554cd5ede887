"""Text files as documents in Arrow files, unit by unit: the part of reading a corpus that all cores do at once.

    python -m lorank.train.texts FOLDER

is a worker (`lorank.train.workers`) for the units in FOLDER/units.json. A unit is some files, or a part of a large one. It imports
neither torch nor transformers. An Arrow file has its name only once it is whole, so a unit that is there need not be read again.
"""

import contextlib
import dataclasses
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from lorank.train import reading
from lorank.train.encodings import UnreadableError
from lorank.train.reading import Tally, blocks
from lorank.train.seen import with_hashes, write_sample
from lorank.train.workers import answer
from lorank.whole import made_whole

SCHEMA = pa.schema({"text": pa.string()})


class Unit(NamedTuple):
    """What is read at once, to one Arrow file, with its counts and a sample of its documents next to it."""

    files: list[str]
    states: list[list[int]]
    """What the files were like just before they were hashed."""
    part: list[int] | None
    """Which bytes of the only file; None: all of all files."""
    column: str
    kept: str
    """The Arrow file."""

    @property
    def counts(self) -> Path:
        return Path(self.kept).with_suffix(".json")

    @property
    def size(self) -> int:
        return self.part[1] - self.part[0] if self.part else sum(state[0] for state in self.states)


class Found(NamedTuple):
    """What was read of a unit."""

    tally: Tally
    left_out: list[list[Any]]
    """What could not be read: the arguments of `lorank.train.reading.warn_of`."""


def state_of(file: Path) -> list[int]:
    """Changes when a file does."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def write_unit(unit: Unit, say: Callable[[int], object]) -> Found:
    """Read a unit and write its files; `say` hears how many bytes have been read. Errors are those of `blocks`, and OSError for a
    file that changed meanwhile."""
    tally, done = Tally(), 0
    hashes: list[int] = []
    part = (unit.part[0], unit.part[1]) if unit.part else None
    with (
        _lines_left_out() as left_out,
        made_whole(Path(unit.kept)) as half,
        pa.OSFile(str(half), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
    ):
        for name, state in zip(unit.files, unit.states, strict=True):
            for block, position in blocks(Path(name), unit.column, tally, part):
                if len(block):
                    writer.write_batch(pa.record_batch([block], schema=SCHEMA))
                    hashes = with_hashes(hashes, block.to_pylist())
                say(done + position)
            done += state[0]
            if state_of(Path(name)) != state:
                raise OSError(f"{name} changed while it was read; start again when it is complete")
        with made_whole(unit.counts) as counts:
            counts.write_text(json.dumps(dataclasses.asdict(tally)))
        write_sample(Path(unit.kept), hashes)
    return Found(tally, left_out)


def attempted(unit: Unit, say: Callable[[int], object]) -> Found | None:
    """`write_unit`; None for a part of a file that cannot be read by itself, so that the file must be judged as a whole."""
    try:
        return write_unit(unit, say)
    except UnreadableError:
        if unit.part is None:
            raise
        return None


@contextlib.contextmanager
def _lines_left_out() -> Iterator[list[list[Any]]]:
    """What would be warned of, which is for the process that prepares the corpus."""
    found: list[list[Any]] = []
    handler = logging.Handler()

    def note(record: logging.LogRecord) -> None:
        file, *rest = record.args  # type: ignore[misc]
        found.append([str(file), *rest])

    handler.emit = note  # type: ignore[method-assign]
    before = reading.logger.propagate
    reading.logger.propagate = False
    reading.logger.addHandler(handler)
    try:
        yield found
    finally:
        reading.logger.removeHandler(handler)
        reading.logger.propagate = before


def main() -> None:
    """Be a worker. Ctrl-C is for the process that started it, which then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer(lambda: _reader(Path(sys.argv[1])))


def _reader(folder: Path) -> Callable[[int], list[Any] | None]:
    units = json.loads((folder / "units.json").read_text())
    return lambda number: _read(Unit(*units[number]))


def _read(unit: Unit) -> list[Any] | None:
    found = attempted(unit, lambda size: print(size, flush=True))
    return found and [dataclasses.asdict(found.tally), found.left_out]


if __name__ == "__main__":
    main()
