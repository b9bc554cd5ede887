"""Local files as a stream: text that is read while a model trains, and neither prepared, nor kept, nor whole in memory.

    files, in an order of the seed and the pass  ->  some of them at a time, block by block  ->  pools, each in a random order

Between two pools little has to be known to go on (`Place`), so that a run resumes without reading again what it has seen. Held out are the first documents of each large file of rows, and of other files some are held out whole. So what is held out can be
read without the rest, and is the same in each pass.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc

from lorank.train.encodings import UnreadableError
from lorank.train.reading import INVALID_SHARE, Tally, blocks, kind_of, rows_at_lines

logger = logging.getLogger(__name__)

OPEN = 8
"""Files that are read at a time."""
POOL = 1 << 26
"""Characters of documents that are mixed with one another."""
LARGE = 1 << 16
"""A file of rows is large if so many bytes of it are held out."""


class Part(NamedTuple):
    """What a pass over the text reads of a file."""

    file: Path
    held_out: float
    """How much text at its beginning is held out, in bytes; the last document of it is held out whole."""
    keep: float = 1.0
    """The chance that a document is seen."""


class Reached(NamedTuple):
    """How far a file has been read."""

    blocks: int = 0
    byte: int = 0
    """Where the next block begins, if the file has a row a line; 0: this is not known."""
    text: int = 0
    """Bytes of text so far, by which is known what is held out."""


class Place(NamedTuple):
    """Where a pass stands between two pools, as JSON keeps it."""

    epoch: int
    random: dict[str, Any]
    """State of the generator."""
    opened: int
    """How many files of the pass's order have been opened."""
    reading: list[tuple[int, Reached]]
    """The open ones: their numbers among the parts."""


@dataclasses.dataclass
class FileStream:
    """The documents of local files, in another order in each pass.

    Args:
        parts: the files; one that is named twice is read twice.
        side: which documents: all, those that are not held out, or those that are.
    """

    parts: Sequence[Part]
    column: str
    seed: int
    side: Literal["whole", "train", "validation"] = "whole"
    epoch: int = 0
    unreadable: set[Path] = dataclasses.field(default_factory=set, repr=False, compare=False)
    """Files that could not be read, or not to their end."""

    def set_epoch(self, epoch: int) -> None:
        """Which pass comes next."""
        self.epoch = epoch

    def leave_out(self, file: Path, error: UnreadableError) -> None:
        """Go on without a file, or without its rest. Raises the error if too many files cannot be read, or the only one."""
        if file in self.unreadable:
            return
        self.unreadable.add(file)
        files = {part.file for part in self.parts}
        if len(self.unreadable) > max(INVALID_SHARE * len(files), len(files) > 1):
            raise error
        logger.warning("%s is left out of the stream from where it cannot be read: %s", file, error)

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
        """Documents of one pass, so many at a time."""
        some: list[str] = []
        for text in (text for _, pool in self.pools() for text in pool):
            some.append(text)
            if len(some) == batch_size:
                yield {"text": some}
                some = []
        if some:
            yield {"text": some}

    @property
    def state(self) -> str:
        """What the files are, by their names, sizes and times of change."""
        files = {part.file: part.file.stat() for part in self.parts}
        return repr((self.side, self.parts, [(found.st_size, found.st_mtime_ns) for found in files.values()]))

    def pools(self, place: Place | None = None) -> Iterator[tuple[Place, list[str]]]:
        """The documents of the pass, pool by pool in random orders, each with the place where it begins; from a place on."""
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.parts))
        opened, reading = 0, []
        if place is not None:
            random.bit_generator.state = place.random
            opened, reading = place.opened, [Reader(self, number, reached, random) for number, reached in place.reading]
        while opened < len(order) or reading:
            state, reached = random.bit_generator.state, [(one.number, one.reached) for one in reading]
            here, pool, size = Place(self.epoch, dict(state), opened, reached), [], 0
            while size <= POOL and (opened < len(order) or reading):
                while opened < len(order) and len(reading) < OPEN:
                    reading.append(Reader(self, int(order[opened]), Reached(), random))
                    opened += 1
                at = int(random.integers(len(reading)))
                found: list[str] | None = next(reading[at].texts, None)
                if found is None:
                    del reading[at]
                    continue
                pool += found
                size += sum(map(len, found))
            if pool:
                yield here, [pool[i] for i in random.permutation(len(pool))]


class Reader:
    """A file of a pass, of which some blocks have been read."""

    def __init__(self, stream: FileStream, number: int, reached: Reached, random: np.random.Generator):
        self.number, self.reached = number, reached
        self.texts = self._readable(stream, stream.parts[number], random)

    def _readable(self, stream: FileStream, part: Part, random: np.random.Generator) -> Iterator[list[str]]:
        try:
            yield from self._texts(stream, part, random)
        except UnreadableError as error:
            stream.leave_out(part.file, error)

    def _texts(self, stream: FileStream, part: Part, random: np.random.Generator) -> Iterator[list[str]]:
        """The documents that are on this side and not read yet, block by block."""
        if (stream.side, part.held_out) in (("validation", 0), ("train", math.inf)):
            return
        begun, lines = self.reached, rows_at_lines(part.file)
        span = (begun.byte, part.file.stat().st_size) if begun.byte else None
        for number, (block, read) in enumerate(
            blocks(part.file, stream.column, Tally(), span), begun.blocks if span else 0
        ):
            if number < begun.blocks:
                continue  # no byte says where the next block begins
            sizes = pc.binary_length(block).to_numpy().astype(np.int64)
            before = self.reached.text
            held_out = before + np.cumsum(sizes) - sizes < part.held_out
            chosen = {"whole": np.ones_like(held_out), "train": ~held_out, "validation": held_out}[stream.side]
            if part.keep < 1:
                chosen &= random.random(len(chosen)) < part.keep
            self.reached = Reached(number + 1, begun.byte + read if lines else 0, before + int(sizes.sum()))
            yield block.filter(chosen).to_pylist()
            if stream.side == "validation" and self.reached.text >= part.held_out:
                return


def streams_of(
    files: Sequence[Path], column: str, seed: int, share: float
) -> tuple[FileStream, FileStream, FileStream]:
    """All documents of files, those to train on and those that are held out: about that `share` of the bytes of the files, of
    compressed files as they are on disk.

    Raises:
        ValueError: there is one document.
    """
    sizes = np.array([file.stat().st_size for file in files])
    rows = np.array([kind_of(file) != "text" for file in files])
    beginnings = rows & ((share * sizes >= LARGE) | (len(files) == 1))
    if len(files) == 1 and not rows[0]:
        raise ValueError(f"a stream must have several documents, got one, {files[0]}; set stream to false")
    held_out = np.where(beginnings, share * sizes, 0.0)
    others = np.random.default_rng(seed).permutation(np.flatnonzero(~beginnings))
    held_out[others[held_out_of(sizes[others], share * sizes[others].sum())]] = math.inf
    parts = [Part(file, float(amount)) for file, amount in zip(files, held_out, strict=True)]
    whole, train, validation = (FileStream(parts, column, seed, side) for side in ("whole", "train", "validation"))
    return whole, train, validation


def held_out_of(sizes: np.ndarray, amount: float) -> np.ndarray:
    """Which of some texts in a random order are held out: the first that are not too large, until they have that amount, but not all."""
    small = np.flatnonzero(sizes <= max(amount, sizes.min())) if len(sizes) else np.arange(0)
    return small[: np.searchsorted(np.cumsum(sizes[small]), amount) + 1][: max(0, len(sizes) - 1)]


def mixed(streams: Sequence[FileStream], weights: Sequence[float], seed: int) -> FileStream:
    """Several streams as one. A pass sees each document as often as its weight says; with 2.5 some twice, the others three times."""
    parts = [
        part._replace(keep=keep)
        for stream, weight in zip(streams, weights, strict=True)
        for part in stream.parts
        for keep in [*[1.0] * math.floor(weight), *[weight % 1] * (weight % 1 > 0)]
    ]
    return dataclasses.replace(streams[0], parts=parts, seed=seed)
