"""Documents of the cache as files of token ids, shard by shard: the part of preparing a corpus that all cores do at once.

    python -m lorank.train.tokens FOLDER

is a worker (`lorank.train.workers`): it writes FOLDER/NUMBER.npy for each number of a shard, and says how many bytes of text it
has tokenised so far. FOLDER/plan.json says which documents, and by which tokenizer. A file has its final name only once it is
whole, so what is there need not be done again.

A worker starts soon and takes little memory, because it imports neither torch nor transformers.
"""

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import gigatoken
import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from lorank.panics import no_panic
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


def tokenizing(name: str = "") -> contextlib.AbstractContextManager[None]:
    """Around a call of a tokenizer, the rules of which may be anybody's: an expression in them may take too many steps."""
    return no_panic(f"the tokenizer{f' {name!r}' if name else ''} cannot read the text", "use another tokenizer")


def encoder(tokenizer: str, cut: bool) -> Encode:
    """A tokenizer in JSON as a function. If it cuts texts, it also adds the special tokens of its template."""
    made = Tokenizer.from_str(tokenizer)
    made.encode_special_tokens = True  # their names are text

    def encode(texts: Sequence[str]) -> list[list[int]]:
        with tokenizing():
            return [found.ids for found in made.encode_batch_fast(list(texts), add_special_tokens=cut)]

    quick = None if cut else _quick(json.loads(tokenizer))
    if quick is None or [ids.tolist() for ids in quick([ODD])] != encode([ODD]):
        return encode
    return quick


ODD = "It's  they'LL\n\n \tx.y ='re'[3:]#\r\n 12345 ²½ <|endoftext|> Ünïcodé e\u0301 ǅ ß ﬁ 日本語。한국어 ไทย हिन्दी العربية ١٢٣ \u00a0\u2028\u3000\u200d👩\u200d🚀 "
"""Text on which tokenizers differ if they differ at all."""


MOST_IDS = 1 << 20
"""gigatoken has a table of all numbers up to the largest id."""


def _quick(rules: dict[str, Any]) -> "Quick | None":
    """None if gigatoken does not know these rules, or reads them otherwise."""
    model = rules["model"]
    if model["type"] != "BPE" or model.get("dropout") or max(model["vocab"].values(), default=0) >= MOST_IDS:
        return None
    if any(not token["special"] for token in rules["added_tokens"]):
        return None
    try:
        return Quick(json.dumps({**rules, "added_tokens": [], "post_processor": None}))
    except (RuntimeError, ValueError):
        return None


class Quick:
    """BPE by gigatoken, which has the same ids as `tokenizers` some thirty times faster.

    Except for letters of the last years: gigatoken 0.10 knows the 4,657 that Unicode 17 added, and tokenizers 0.23 splits them from
    their neighbours as it does signs.
    """

    MOST = 1 << 25
    """Characters after which it begins anew, because it remembers each word it has seen, in some 90 bytes."""

    def __init__(self, rules: str):
        self.rules = rules
        self._begin()

    def _begin(self) -> None:
        self.made, self.seen = gigatoken.Tokenizer.from_json(self.rules), 0

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        self.seen += sum(map(len, texts))
        if self.seen > self.MOST:
            self._begin()
        with tokenizing():
            return [self.made.encode(text) for text in texts]


if __name__ == "__main__":
    main()
