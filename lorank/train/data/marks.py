"""Marks in a stream: which row of a run begins where, so that it is not read again from its beginning when the run resumes.

RUN/stream.jsonl     {"stream": what is read, and into which rows}, then a line for each pool: {"row", "rest", "place", "sum"}

A mark is a fact of the stream, not of the training: rows are made ahead of the steps that need them. A run that has done some rows
goes on from the last mark before them; at most the rows of a pool are made again. Lines that a crash cut off or a disk has changed,
which their checksums show, and marks of another stream, do not count.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lorank.train.data.streams import Place, Reached
from lorank.whole import without_link

logger = logging.getLogger(__name__)


class Mark(NamedTuple):
    """The beginning of a pool."""

    row: int
    """How many rows the documents before it have filled."""
    rest: list[int]
    """Their last tokens, which fill none."""
    place: Place


class Marks:
    """A file of marks.

    Args:
        stream: says what is read, and into which rows.
        writes: whether this process adds marks.
    """

    def __init__(self, file: Path, stream: str, *, writes: bool):
        self.file, self.writes = file, writes
        self.title = json.dumps({"stream": _digest(stream)})
        self.known = list(_marks(without_link(file) if writes else file, self.title))

    def last(self, row: int) -> Mark | None:
        """The last mark that is not behind a row; None, with a warning, if there is none."""
        found = max((mark for mark in self.known if mark.row <= row), key=lambda mark: mark.row, default=None)
        if found is None and row:
            logger.warning(
                "where row %d of the stream begins is not known, because its files have changed or the run is older than version 0.4; it "
                "is read again from its beginning, in the order that it has now",
                row,
            )
        return found

    def add(self, mark: Mark) -> None:
        """Keep a mark, if none of its row is there. Without it only time is lost, so a full disk ends nothing."""
        if not self.writes or any(mark.row == one.row for one in self.known):
            return
        line = _line(mark)
        with contextlib.suppress(OSError), self.file.open("a" if self.known else "w", encoding="utf-8") as file:
            file.write(f"{'' if self.known else self.title}\n{line}")  # on another line than what a crash has left
            self.known.append(mark)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _line(mark: Mark) -> str:
    return json.dumps({**mark._asdict(), "sum": _digest(json.dumps(mark))})


def _marks(file: Path, title: str) -> Iterator[Mark]:
    """Those of a file; none if they are of another stream, and without lines that are not as they were written."""
    with contextlib.suppress(OSError), file.open(encoding="utf-8", errors="replace") as lines:
        if next(lines, "").strip() != title:
            return
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                one = json.loads(line)
                epoch, random, opened, reading = one["place"]
                place = Place(epoch, random, opened, [(number, Reached(*reached)) for number, reached in reading])
                if _line(mark := Mark(one["row"], one["rest"], place)) == line.strip():
                    yield mark
