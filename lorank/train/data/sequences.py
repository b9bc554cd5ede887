"""Documents as rows of tokens: packed end to end, or each cut or padded to one row; and rows as batches."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from lorank.train.data.sources import Documents, root_cause, texts_of
from lorank.train.data.specials import encode
from lorank.train.data.tokenizers import PIECE, VERSION, Piece, identity, pieces_of

MEASURED_BYTES = 10_000_000  # of validation text in which tokens are counted
BATCH = 1 << 22  # characters tokenised in one call
Row: TypeAlias = dict[str, list[int]]


class Form(NamedTuple):
    """How documents become sequences."""

    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    documents: Literal["packed", "padded"]


def make_sequences(
    documents: Documents, form: Form, what: str, cache: Path, max_tokens: int | None = None
) -> Dataset | IterableDataset:
    """Documents as rows, cached on disk. Rows of a stream are a stream too, unless `max_tokens` ends it."""
    if form.tokenizer.eos_token_id is None:
        name = form.tokenizer.name_or_path
        raise ValueError(f"tokenizer must have an end-of-sequence token, and {name!r} has none; use another")
    columns = ["input_ids"] if form.documents == "packed" else ["input_ids", "attention_mask", "labels"]
    features = Features({column: List(Value("int32"), length=form.sequence_length) for column in columns})
    arguments: dict[str, Any] = {"documents": documents, "form": form, "what": what, "max_tokens": max_tokens}
    if isinstance(documents, IterableDataset):
        if max_tokens is None:
            return IterableDataset.from_generator(_endless, features, arguments)
        return Dataset.from_list(list(_rows(**arguments)), features)
    key = (VERSION, documents._fingerprint, identity(form.tokenizer), form[1:], max_tokens)
    name, folder = Hasher.hash(key), str(cache / "sequences")
    try:
        return Dataset.from_generator(_rows, features, folder, gen_kwargs=arguments, fingerprint=name)
    except DatasetGenerationError as error:
        raise root_cause(error) from None


def _endless(documents: IterableDataset, **arguments: Any) -> Iterator[Row]:
    for epoch in itertools.count():
        documents.set_epoch(epoch)  # another order
        yield from _rows(documents, **arguments)


def _rows(documents: Documents, form: Form, what: str, max_tokens: int | None) -> Iterator[Row]:
    """Rows until `max_tokens` tokens are predicted. Raises ValueError if there is no row."""
    predicted = 0
    for row in (_packed if form.documents == "packed" else _padded)(documents, form):
        yield row
        predicted += sum(row.get("attention_mask", [1] * form.sequence_length)) - 1
        if max_tokens is not None and predicted >= max_tokens:
            return
    if not predicted:
        count = sum(len(ids) for _, ids in _tokens(documents, form.tokenizer))
        needs = f"one sequence of sequence_length={form.sequence_length}"
        raise ValueError(
            f"{what} has {count:,} tokens, too few for {needs}; give more text or a shorter sequence_length"
        )


def _packed(documents: Documents, form: Form) -> Iterator[Row]:
    """Windows over documents laid end to end."""
    rest: list[int] = []
    for _, ids in _tokens(documents, form.tokenizer):
        rest += ids
        whole = len(rest) - len(rest) % form.sequence_length
        for start in range(0, whole, form.sequence_length):
            yield {"input_ids": rest[start : start + form.sequence_length]}
        del rest[:whole]


def _padded(documents: Documents, form: Form) -> Iterator[Row]:
    """One row per document."""
    tokenizer, length, _ = form
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for _, ids in _beginnings(documents, form):
        if len(ids) > 1:  # one token predicts nothing
            n = length - len(ids)
            mask = [1] * len(ids) + [0] * n
            yield {"input_ids": ids + [pad] * n, "attention_mask": mask, "labels": ids + [-100] * n}


def _beginnings(documents: Documents, form: Form) -> Iterator[tuple["Piece", list[int]]]:
    """Documents with the token ids that fit in a row, special tokens included. An eos is added where it is missing and fits."""
    tokenizer, length, _ = form
    beginnings = (Piece(text[:PIECE], True) for text in texts_of(documents))
    for piece, ids in _encode(beginnings, tokenizer, truncation=True, max_length=length):
        if len(ids) < length and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        yield piece, ids


def bytes_per_token_of(documents: Documents, form: Form) -> float:
    """UTF-8 bytes per token of the text in the rows."""
    size = tokens = 0
    packed = form.documents == "packed"
    for piece, ids in _tokens(documents, form.tokenizer) if packed else _beginnings(documents, form):
        fits = packed or len(ids) < form.sequence_length
        text = piece.text if fits else form.tokenizer.decode(ids, skip_special_tokens=True)
        size += len(str(text).encode())
        tokens += len(ids)
        if size >= MEASURED_BYTES:
            break
    return size / tokens


def _tokens(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Piece, list[int]]]:
    """Documents piece by piece with their token ids, and an eos after the last piece of each."""
    pieces = itertools.chain.from_iterable(map(pieces_of, texts_of(documents)))
    for piece, ids in _encode(pieces, tokenizer, add_special_tokens=False):
        yield piece, [*ids, tokenizer.eos_token_id] if piece.is_last else ids


def _encode(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Iterator[tuple[Piece, list[int]]]:
    """Pieces with their token ids. Many are tokenised in one call, which uses all cores."""
    for batch in _batches(pieces):
        texts = [piece.text for piece in batch]
        yield from zip(batch, encode(tokenizer, texts, **options), strict=True)


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


def ids_of(rows: Dataset | IterableDataset) -> list[np.ndarray]:
    """The token ids of rows on disk, chunk by chunk and without copies; nothing for a stream."""
    if isinstance(rows, IterableDataset):
        return []
    return [chunk.flatten().to_numpy() for chunk in rows.data.column("input_ids").chunks if len(chunk)]


def collate(rows: Sequence[Mapping[str, Sequence[int]]], vocab_size: int | None = None) -> dict[str, torch.Tensor]:
    """Rows as one batch of int64 tensors [batch, sequence_length]. Packed rows are their own labels.

    Raises:
        ValueError: an id is not below `vocab_size`. An embedding would only report an index out of range.
    """
    columns = {name: np.array([row[name] for row in rows], dtype=np.int64) for name in rows[0]}
    if vocab_size is not None:
        check_ids(int(columns["input_ids"].max()), vocab_size)
    batch = {name: torch.from_numpy(column) for name, column in columns.items()}
    batch.setdefault("labels", batch["input_ids"].clone())
    return batch


def check_ids(largest: int, vocab_size: int) -> None:
    """Raise ValueError if the largest token id is outside the vocabulary."""
    if largest >= vocab_size:
        raise ValueError(
            f"vocab_size must be above {largest}, a token id of the tokenizer, got {vocab_size}; leave it out to use all of them"
        )


def check_form(documents: str, sequence_length: int) -> None:
    """Raise ValueError if documents cannot become such rows."""
    if documents not in ("packed", "padded"):
        raise ValueError(f"documents must be 'packed' or 'padded', got {documents!r}")
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
