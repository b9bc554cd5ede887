"""Documents as rows of tokens: packed end to end, or each cut or padded to one row; and rows as batches."""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, IterableDataset, List, Value

from lorank.loss import IGNORED
from lorank.train import tokens
from lorank.train.data.cache import use
from lorank.train.data.form import Documents as PerRow
from lorank.train.data.form import Form
from lorank.train.data.marks import Mark, Marks
from lorank.train.data.rows import key_of, make_rows
from lorank.train.data.sources import Documents, texts_of
from lorank.train.data.streams import FileStream
from lorank.train.watching import tell
from lorank.whole import made_whole

MEASURED_BYTES = 10_000_000  # of validation text in which tokens are counted
Row: TypeAlias = dict[str, list[int]]


def make_sequences(
    documents: Documents, form: Form, what: str, cache: Path, max_tokens: int | None = None, **place: Any
) -> Dataset | IterableDataset:
    """Documents as rows, cached on disk. Rows of a stream are a stream too, unless `max_tokens` ends it; of local files, they begin at
    a `place`: a row `begin`, by `marks`."""
    if form.tokenizer.eos_token_id is None:
        name = form.tokenizer.name_or_path
        raise ValueError(f"tokenizer must have an end-of-sequence token, and {name!r} has none; use another")
    arguments: dict[str, Any] = {"documents": documents, "form": form, "what": what, "max_tokens": max_tokens}
    if not isinstance(documents, Dataset):
        if max_tokens is None:
            features = Features({name: List(Value("int32"), length=form.sequence_length) for name in form.columns})
            if isinstance(documents, FileStream):
                return IterableDataset.from_generator(_endless, features, {**arguments, **place})
            return IterableDataset.from_generator(_endless_of_hub, features, arguments)
        return _kept(_rows(**arguments), form)
    rows = make_rows(documents, form, max_tokens, cache / "rows")
    if not len(rows):
        raise _too_few(documents, form, what)
    return rows


def _kept(rows: Iterator[Row], form: Form) -> Dataset:
    """Rows in memory, four bytes a token."""
    tables = []
    while some := list(itertools.islice(rows, 1024)):
        columns = {name: np.array([row[name] for row in some], np.int32).ravel() for name in form.columns}
        arrays = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(ids), form.sequence_length)
            for name, ids in columns.items()
        }
        tables.append(pa.table(arrays))
    return Dataset(pa.concat_tables(tables))


def _endless(
    documents: FileStream, form: Form, what: str, max_tokens: int | None, begin: int = 0, marks: Marks | None = None
) -> Iterator[Row]:
    """The rows of all passes from row `begin` on, which marks help to find."""
    mark = marks and marks.last(begin)
    count, rest, place = (mark.row, [*mark.rest], mark.place) if mark else (0, [], None)
    for epoch in itertools.count(place.epoch if place else 0):
        documents.set_epoch(epoch)  # another order
        before = count if place is None else -1
        for here, texts in documents.pools(place):
            if marks is not None:
                marks.add(Mark(count, [*map(int, rest)], here))
            for row in _rows_of(_tokens(texts, form), form, rest):
                if count >= begin:
                    yield row
                count += 1
        if count == before:
            raise _too_few(documents, form, what)
        rest, place = [], None


def _endless_of_hub(documents: IterableDataset, **arguments: Any) -> Iterator[Row]:
    for epoch in itertools.count():
        documents.set_epoch(epoch)  # another order
        yield from _rows(documents, **arguments)


def _rows(documents: Documents, form: Form, what: str, max_tokens: int | None) -> Iterator[Row]:
    """Rows until `max_tokens` tokens are predicted. Raises ValueError if there is no row."""
    predicted = 0
    for row in _rows_of(_tokens(documents, form), form, []):
        yield row
        predicted += sum(row.get("attention_mask", [1] * form.sequence_length)) - 1
        if max_tokens is not None:
            tell("packing", min(predicted, max_tokens), max_tokens, "tokens")
            if predicted >= max_tokens:
                return
    if not predicted:
        raise _too_few(documents, form, what)


def _too_few(documents: Documents, form: Form, what: str) -> ValueError:
    count = sum(len(ids) for _, ids in _tokens(documents, form))
    needs = f"one sequence of sequence_length={form.sequence_length}"
    return ValueError(f"{what} has {count:,} tokens, too few for {needs}; give more text or a shorter sequence_length")


def _rows_of(pieces: Iterable[tuple[tokens.Piece, tokens.Ids]], form: Form, rest: list[int]) -> Iterator[Row]:
    """Rows of documents after those whose last tokens are `rest`, which becomes the tokens that fill no row."""
    return _packed(pieces, form, rest) if form.documents == "packed" else _padded(pieces, form)


def _packed(pieces: Iterable[tuple[tokens.Piece, tokens.Ids]], form: Form, rest: list[int]) -> Iterator[Row]:
    """Windows over documents laid end to end."""
    for _, ids in pieces:
        rest += ids
        whole = len(rest) - len(rest) % form.sequence_length
        for start in range(0, whole, form.sequence_length):
            yield {"input_ids": rest[start : start + form.sequence_length]}
        del rest[:whole]


def _padded(pieces: Iterable[tuple[tokens.Piece, tokens.Ids]], form: Form) -> Iterator[Row]:
    """One row per document."""
    for _, ids in pieces:
        if len(ids) > 1:  # one token predicts nothing
            n = form.sequence_length - len(ids)
            mask = [1] * len(ids) + [0] * n
            yield {"input_ids": [*ids, *[form.padding] * n], "attention_mask": mask, "labels": [*ids, *[IGNORED] * n]}


class TextSize(NamedTuple):
    """How much text the tokens of some documents stand for, counted from the first document to the end of each piece."""

    predicted: np.ndarray
    """Tokens that rows predict, [pieces], float64."""
    tokens: np.ndarray
    bytes: np.ndarray
    """Of UTF-8."""

    def per_token(self, predicted: float = math.inf, after: float = 0) -> float:
        """Bytes per token of the text in which so many tokens are predicted, those that come `after` so many others; interpolated between
        the ends of pieces. Where that is not measured, it is that of all."""
        x, tokens, size = (np.concatenate([[0.0], column]) for column in self)
        ends = np.minimum([after, after + predicted], x[-1])
        read = np.diff(np.interp(ends, x, tokens))[0]
        return float(np.diff(np.interp(ends, x, size))[0] / read if read else size[-1] / tokens[-1])


def text_size_of(documents: Documents, form: Form, cache: Path) -> TextSize:
    """How much text is in the rows; of documents on disk it is measured once."""
    if not isinstance(documents, Dataset):
        return _measured(documents, form)
    kept = cache / "rows" / f"{key_of(documents, form, None)}.size.npy"
    use(kept)
    with contextlib.suppress(OSError, ValueError):
        return TextSize(*np.load(kept))
    found = _measured(documents, form)
    with contextlib.suppress(OSError), made_whole(kept) as half, half.open("wb") as file:  # it is only measured again
        np.save(file, np.stack(found))
    return found


def _measured(documents: Documents, form: Form) -> TextSize:
    packed, length = form.documents == "packed", form.sequence_length
    size = tokens = predicted = 0.0
    ends = []
    for piece, ids in _tokens(documents, form, form.quick):
        if not packed and len(ids) < 2:  # which fills no row
            continue
        text = piece.text if packed or len(ids) < length else form.tokenizer.decode(ids, skip_special_tokens=True)
        size += len(str(text).encode())
        tokens += len(ids)
        predicted += len(ids) * (length - 1) / length if packed else len(ids) - 1
        ends.append((predicted, tokens, size))
        tell("measuring bytes per token", int(size), MEASURED_BYTES, "B")
        if size >= MEASURED_BYTES:
            break
    return TextSize(*np.array(ends).T)


def _tokens(
    documents: Documents | list[str], form: Form, encode: tokens.Encode | None = None
) -> Iterator[tuple[tokens.Piece, tokens.Ids]]:
    """Documents with the tokens that a row may have of them: packed piece by piece, padded the beginning of each."""
    texts = filter(None, documents) if isinstance(documents, list) else texts_of(documents)
    eos, encode = form.tokenizer.eos_token_id, encode or form.encode
    if form.documents == "packed":
        return tokens.whole(texts, encode, eos)
    return tokens.beginnings(texts, encode, eos, form.sequence_length)


def ids_of(rows: Dataset | IterableDataset) -> list[np.ndarray]:
    """The token ids of rows on disk, chunk by chunk and without copies; nothing for a stream."""
    if isinstance(rows, IterableDataset):
        return []
    return [chunk.flatten().to_numpy() for chunk in rows.data.column("input_ids").chunks if len(chunk)]


def collate(
    rows: Sequence[Mapping[str, Sequence[int]]], vocab_size: int | None = None, end: int | None = None
) -> dict[str, torch.Tensor]:
    """Rows as one batch of int64 tensors [batch, sequence_length]. Packed rows are their own labels.

    Args:
        end: the id that ends a document, if documents are to be separate: then there are also position_ids, which are 0 at the
            first token of each document, by which models of transformers know what a token may see; and that token, which
            nothing before it foretells, is not predicted. The rest of a document that began in another row counts as one.

    Raises:
        ValueError: an id is not below `vocab_size`. An embedding would only report an index out of range.
    """
    columns = {name: np.array([row[name] for row in rows], dtype=np.int64) for name in rows[0]}
    if vocab_size is not None:
        check_ids(int(columns["input_ids"].max()), vocab_size)
    batch = {name: torch.from_numpy(column) for name, column in columns.items()}
    batch.setdefault("labels", batch["input_ids"].clone())
    if end is not None:
        batch["position_ids"] = positions_after(batch["input_ids"], end)
        batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORED)
    return batch


def positions_after(ids: torch.Tensor, end: int) -> torch.Tensor:
    """Of each token of rows [b, n], its place in its document.

    >>> positions_after(torch.tensor([[5, 6, 0, 7, 0, 8]]), end=0)
    tensor([[0, 1, 2, 0, 1, 0]])
    """
    places = torch.arange(ids.shape[1]).expand_as(ids)
    begins = torch.nn.functional.pad(ids[:, :-1] == end, (1, 0), value=True)
    return places - torch.where(begins, places, 0).cummax(1).values


def check_ids(largest: int, vocab_size: int) -> None:
    """Raise ValueError if the largest token id is outside the vocabulary."""
    if largest >= vocab_size:
        raise ValueError(
            f"vocab_size must be above {largest}, a token id of the tokenizer, got {vocab_size}; leave it out to use all of them"
        )


def check_form(documents: str, sequence_length: int) -> None:
    """Raise ValueError if documents cannot become such rows."""
    if documents not in get_args(PerRow):
        raise ValueError(f"documents must be 'packed', 'separate' or 'padded', got {documents!r}")
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
