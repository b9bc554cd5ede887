"""Documents of the cache as files of token ids, shard by shard: the part of preparing a corpus that all cores do at once.

    python -m lorank.train.tokens FOLDER

is a worker (`lorank.train.workers`): it writes FOLDER/NUMBER.npy for each number of a shard, and says how many bytes of text it
has tokenised so far. FOLDER/plan.json says which documents, and by which tokenizer. A file has its final name only once it is
whole, so what is there need not be done again.

A worker starts in a tenth of a second and takes little memory, because it imports neither torch nor transformers.
"""

import dataclasses
import json
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from lorank.train.workers import answer
from lorank.whole import made_whole

PIECE = 1 << 20  # characters tokenised at once: long texts then use all cores, but not all memory
BATCH = 1 << 22  # characters tokenised in one call
Ids: TypeAlias = list[int] | np.ndarray
Encode: TypeAlias = Callable[[Sequence[str]], Sequence[Ids]]
"""Texts to the token ids of each."""


class Piece(NamedTuple):
    """Part of a document, small enough to be tokenised at once."""

    text: str
    is_last: bool


def pieces_of(text: str) -> Iterator[Piece]:
    """A text in pieces that end at the end of a line where possible."""
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield Piece(text[start:cut], False)
        start = cut
    yield Piece(text[start:], True)


def whole(texts: Iterable[str], encode: Encode, eos: int) -> Iterator[tuple[Piece, Ids]]:
    """Documents piece by piece with their token ids, and an eos after the last piece of each."""
    for piece, ids in _encoded((piece for text in texts for piece in pieces_of(text)), encode):
        if not piece.is_last:
            yield piece, ids
        else:
            yield piece, np.append(ids, ids.dtype.type(eos)) if isinstance(ids, np.ndarray) else [*ids, eos]


def beginnings(texts: Iterable[str], encode: Encode, eos: int, length: int) -> Iterator[tuple[Piece, Ids]]:
    """Documents with the token ids that fit in a row of `length`, to which `encode` cuts them. An eos is added where it is missing
    and fits."""
    for piece, ids in _encoded((Piece(text[:PIECE], True) for text in texts), encode):
        yield piece, [*ids, eos] if len(ids) < length and [*ids[-1:]] != [eos] else ids


def _encoded(pieces: Iterable[Piece], encode: Encode) -> Iterator[tuple[Piece, Ids]]:
    """Pieces with their token ids. Many are tokenised in one call."""
    for batch in _batches(pieces):
        yield from zip(batch, encode([piece.text for piece in batch]), strict=True)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the shards of a corpus are."""

    bounds: list[int]
    """Shard i has the documents from bounds[i] to bounds[i + 1], in the corpus's order."""
    eos: int
    """Id of the token after a document."""
    length: int | None
    """Tokens to which a document is cut; None: it is kept whole."""
    dtype: str
    """Of a token id: "uint16" or "int32"."""
    files: list[str] | None = None
    """Arrow files of the documents; None: only this process has them."""
    tokenizer: str | None = None
    """In JSON; None: only this process can run it."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls(**json.loads((folder / "plan.json").read_text()))


class Documents(NamedTuple):
    """Texts in Arrow's memory and the order in which a corpus has them."""

    chunks: list[pa.StringArray]
    order: np.ndarray

    def texts(self, start: int, stop: int, say: Callable[[int], object]) -> Iterator[str]:
        """Without empty ones; `say` hears how many bytes have been read."""
        starts = np.cumsum([0, *map(len, self.chunks)])
        wanted = self.order[start:stop]
        numbers = np.searchsorted(starts, wanted, side="right") - 1
        size = told = 0
        for number, at in zip(numbers.tolist(), (wanted - starts[numbers]).tolist(), strict=True):
            value = self.chunks[number][at]
            size += value.as_buffer().size if value.is_valid else 0
            if text := value.as_py():
                yield text
            if size > told + BATCH // 4:
                told = size
                say(size)


def part_of(folder: Path, number: int) -> Path:
    """The file of a shard's tokens. Of cut documents, NUMBER.lengths.npy next to it has the tokens of each."""
    return folder / f"{number:05}.npy"


def lengths_of(part: Path) -> Path:
    return part.with_suffix(".lengths.npy")


def write_part(
    folder: Path, plan: Plan, number: int, documents: Documents, encode: Encode, say: Callable[[int], object]
) -> None:
    """Tokenise a shard and write its files."""
    texts = documents.texts(plan.bounds[number], plan.bounds[number + 1], say)
    if plan.length is None:
        rows = [np.asarray(ids, plan.dtype) for _, ids in whole(texts, encode, plan.eos)]
    else:
        cut = beginnings(texts, encode, plan.eos, plan.length)
        rows = [np.array(ids, plan.dtype) for _, ids in cut if len(ids) > 1]  # one token predicts nothing
        _save(lengths_of(part_of(folder, number)), np.array([len(row) for row in rows], np.int32))
    _save(part_of(folder, number), np.concatenate(rows) if rows else np.array([], plan.dtype))


def _save(path: Path, array: np.ndarray) -> None:
    with made_whole(path) as half, half.open("wb") as file:
        np.save(file, array)


def main() -> None:
    """Be a worker. Ctrl-C is for the process that started it, which then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer(lambda: _writer(Path(sys.argv[1])))


def _writer(folder: Path) -> Callable[[int], None]:
    plan = Plan.read(folder)
    assert plan.files is not None and plan.tokenizer is not None
    documents = Documents(arrow_chunks(plan.files), np.load(folder / "order.npy", mmap_mode="r"))
    encode = encoder(plan.tokenizer, cut=plan.length is not None)
    return lambda number: write_part(folder, plan, number, documents, encode, lambda size: print(size, flush=True))


def arrow_chunks(files: Iterable[str]) -> list[pa.StringArray]:
    """The texts of Arrow files, mapped into memory."""
    tables = (pa.ipc.open_stream(pa.memory_map(file)).read_all() for file in files)
    return [chunk for table in tables for chunk in table.column("text").chunks]


def encoder(tokenizer: str, cut: bool) -> Encode:
    """A tokenizer in JSON as a function. If it cuts texts, it also adds the special tokens of its template."""
    made = Tokenizer.from_str(tokenizer)
    made.encode_special_tokens = True  # their names are text

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in made.encode_batch_fast(list(texts), add_special_tokens=cut)]

    return encode if cut or not _splits_before_spaces(json.loads(tokenizer)) else ByWords(encode)


def _splits_before_spaces(rules: dict[str, Any]) -> bool:
    """Whether no token reaches from a character into the white space after it: byte-level BPE with GPT-2's expression, in which
    white space is followed by other characters and never the reverse."""
    first = rules["pre_tokenizer"] or {}
    plain = rules["normalizer"] is None and all(token["special"] for token in rules["added_tokens"])
    gpt2 = first.get("type") == "ByteLevel" and first.get("use_regex", True) and not first.get("add_prefix_space")
    return plain and gpt2 and rules["model"]["type"] == "BPE" and not rules["model"].get("dropout")


class ByWords:
    """Tokenises each word, with the white space before it, once, and remembers its ids: some six times faster.

    Only for tokenizers of which each word's ids depend on nothing else. A word is what is between white space; in ASCII, it also ends where
    letters, digits and signs meet, so that `self.x` in code is three words of which most have been seen. An apostrophe ends nothing, because
    GPT-2's expression keeps 's together.
    """

    _SPACE, _SIGN = r"[^\S\x1c-\x1f]", r"!-&(-/:-@\[-`{-~"
    WORD = re.compile(
        rf"{_SPACE}*+(?:[A-Za-z]++(?=[0-9{_SIGN}]|{_SPACE}|\Z)|[0-9]++(?=[A-Za-z{_SIGN}]|{_SPACE}|\Z)"
        rf"|[{_SIGN}]++(?=[A-Za-z0-9]|{_SPACE}|\Z)|[\S\x1c-\x1f]++)|{_SPACE}++"
    )
    """White space as Unicode has it. Python counts four separators, too, which GPT-2's expression does not."""
    MOST = 1 << 23
    """Characters of words that are remembered."""

    def __init__(self, encode: Encode):
        self.encode = encode
        self.known: dict[str, bytes] = {}
        """Words -> their ids, four bytes each."""
        self.size = 0

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.size > self.MOST:
            self.known, self.size = {}, 0
        words = list(map(self.WORD.findall, texts))
        if new := list(set().union(*words).difference(self.known)):
            self.known.update(
                (word, np.array(ids, np.int32).tobytes()) for word, ids in zip(new, self.encode(new), strict=True)
            )
            self.size += sum(map(len, new))
        return [np.frombuffer(b"".join(map(self.known.__getitem__, one)), np.int32) for one in words]


if __name__ == "__main__":
    main()
