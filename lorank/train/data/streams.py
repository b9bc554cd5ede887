"""Local files as a stream: text that is read while a model trains, and neither prepared, nor kept, nor whole in memory.

    files, in an order of the seed and the pass  ->  some of them at a time, block by block  ->  a pool, from which documents are drawn

Held out are the first documents of each large file of rows, and of other files some are held out whole. So what is held out can be
read without the rest, and is the same in each pass.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc

from lorank.train.reading import Tally, blocks, kind_of

OPEN = 8
"""Files that are read at a time."""
POOL = 1 << 26
"""Characters of documents that wait to be drawn."""
LARGE = 1 << 16
"""A file of rows is large if so many bytes of it are held out."""


class Part(NamedTuple):
    """What a pass over the text reads of a file."""

    file: Path
    held_out: float
    """How much text at its beginning is held out, in bytes; the last document of it is held out whole."""
    keep: float = 1.0
    """The chance that a document is seen."""


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

    def set_epoch(self, epoch: int) -> None:
        """Which pass comes next."""
        self.epoch = epoch

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
        """Documents of one pass, so many at a time."""
        some: list[str] = []
        for text in self._drawn(np.random.default_rng((self.seed, self.epoch))):
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

    def _drawn(self, random: np.random.Generator) -> Iterator[str]:
        waiting = [self.parts[i] for i in random.permutation(len(self.parts))]
        reading: list[Iterator[list[str]]] = []
        pool: list[str] = []
        size = 0
        while waiting or reading:
            while waiting and len(reading) < OPEN:
                reading.append(self._texts(waiting.pop(), random))
            at = int(random.integers(len(reading)))
            found = next(reading[at], None)
            if found is None:
                del reading[at]
                continue
            pool += found
            size += sum(map(len, found))
            while size > POOL:
                chosen = int(random.integers(len(pool)))
                pool[chosen], pool[-1] = pool[-1], pool[chosen]
                size -= len(pool[-1])
                yield pool.pop()
        for i in random.permutation(len(pool)):
            yield pool[i]

    def _texts(self, part: Part, random: np.random.Generator) -> Iterator[list[str]]:
        """The documents of a file that are on this side, block by block."""
        if (self.side, part.held_out) in (("validation", 0), ("train", math.inf)):
            return
        before = 0
        for block, _ in blocks(part.file, self.column, Tally()):
            sizes = pc.binary_length(block).to_numpy().astype(np.int64)
            held_out = before + np.cumsum(sizes) - sizes < part.held_out
            before += int(sizes.sum())
            chosen = {"whole": np.ones_like(held_out), "train": ~held_out, "validation": held_out}[self.side]
            if part.keep < 1:
                chosen &= random.random(len(chosen)) < part.keep
            yield block.filter(chosen).to_pylist()
            if self.side == "validation" and before >= part.held_out:
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
