"""The training and validation sequences of a run, and held-out text for an evaluation."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from lorank.train.data.form import Documents as PerRow
from lorank.train.data.form import Form
from lorank.train.data.marks import Marks
from lorank.train.data.sequences import TextSize, check_form, ids_of, make_sequences, text_size_of
from lorank.train.data.sources import (
    Documents,
    Source,
    amount,
    cache_folder,
    is_held_out,
    name_of,
    open_data,
    quiet,
    texts_of,
)
from lorank.train.data.streams import FileStream
from lorank.train.data.tokenizers import identity, load_tokenizer
from lorank.train.seen import packed, share_of
from lorank.train.watching import told
from lorank.train.world import is_first

MOST_TOKENS = 10_000_000  # that are evaluated if it is not said how many
HASHED_BYTES = 256_000_000
MOST_FILES = 1000  # by whose contents text is recognised


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation sequences, and the tokenizer that made them.

    Packed rows have the column input_ids; padded rows also attention_mask and labels (-100 on padding). Each
    contains `sequence_length` integers. Labels are not shifted: the models of transformers do that.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Dataset | IterableDataset
    """A stream never ends: it starts again in another order, so that any run can resume by skipping rows."""
    validation: Dataset
    validation_size: TextSize
    """UTF-8 bytes of validation text per token (tokens that end documents included), for bits per byte."""
    description: str
    """One line for humans: "embedded: 612 documents, 11.8 MB, 3.4 M tokens"."""
    held_out: Documents | None = None
    """The documents that were held out of the training text; None if `validation` is another text."""
    files: Sequence[str] = ()
    """Digests of the contents of the files that are trained on, 1,000 at most; none of a stream."""
    seen: str | None = None
    """A sample of the documents that are trained on, see `lorank.train.seen`; None for a stream."""
    begins: int = 0
    """Before which row a training stream begins."""

    @functools.cached_property
    def fill(self) -> float:
        """Share of positions with text instead of padding, in training rows; for a stream, in validation rows."""
        rows = self.validation if isinstance(self.train, IterableDataset) else self.train
        if "attention_mask" not in rows.column_names:
            return 1.0
        masks = [chunk.flatten().to_numpy() for chunk in rows.data.column("attention_mask").chunks]
        return float(sum(int(mask.sum(dtype=np.int64)) for mask in masks) / sum(map(len, masks)))

    @functools.cached_property
    def largest_id(self) -> int:
        """The largest token id of all rows on disk; those of a stream are unknown."""
        return max(max(map(int, map(np.max, ids_of(rows)))) for rows in (self.train, self.validation) if ids_of(rows))

    @functools.cached_property
    def hash(self) -> str:
        """Of the tokenizer and all token ids; for a stream, of the tokenizer and the validation rows."""
        digest = hashlib.blake2b(identity(self.tokenizer).encode(), digest_size=16)
        chunks = [*ids_of(self.train), *ids_of(self.validation)]
        for ids in told("hashing tokens", chunks, len, sum(map(len, chunks)), "tokens"):
            digest.update(ids.astype(np.int32, copy=False).tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def held_out_hash(self) -> str | None:
        """`hash_of` what was held out of the training text, if anything was."""
        return None if self.held_out is None else hash_of(self.held_out)


def hash_of(documents: Documents) -> str | None:
    """Of the first 256 MB of text, whatever reads it; None for a data set of the hub."""
    if isinstance(documents, IterableDataset):
        return None
    digest, size = xxhash.xxh3_128(), 0
    for text in texts_of(documents):
        whole = text.encode(errors="surrogatepass")
        digest.update(len(whole).to_bytes(8, "little") + whole)
        size += len(whole)
        if size >= HASHED_BYTES:
            break
    return digest.hexdigest()


def seen_of(source: Source, held_out: Documents | Sequence[str]) -> str | None:
    """A sample of the documents that are trained on; None for a stream."""
    if source.sample is None:
        return None
    return packed(source.sample, held_out if isinstance(held_out, list) else texts_of(held_out))  # type: ignore[arg-type]


@quiet()
def load_corpus(
    data: str | list[str] = "embedded",
    *,
    validation: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    sequence_length: int = 256,
    documents: PerRow = "packed",
    text_column: str = "text",
    stream: bool = False,
    seed: int = 42,
    order_seed: int | None = None,
    validation_tokens: int | None = 10_000_000,
    cache_dir: Path | None = None,
    marks: Path | None = None,
    begin: int = 0,
) -> Corpus:
    """Read `data`, hold out validation text, find or train a tokenizer, and cut both parts into sequences.

    Args:
        data: "embedded"; a file, folder or glob of txt, md, py (a file is a document), jsonl, json, parquet, csv
            (a row is one), each also with .gz, .bz2, .xz or .zst; or a hub data set, "owner/name" or "owner/name:config".
            Several local ones as a list, each with a weight if wanted: ["books/", "code/:0.3"]; see `open_sources`.
        validation: another source. By default documents of the same one are held out: of local data 5 %, or as many as have about
            `validation_tokens` if these are fewer; of a hub data set its validation split, or without one its first documents.
        tokenizer: name, folder or tokenizer.json; None trains byte-level BPE of `vocab_size` entries on the training text.
        documents: "packed" lays documents end to end, an end-of-sequence token after each, and cuts windows
            of `sequence_length` tokens; "separate" makes the same rows, see `collate`; "padded" cuts or pads each document to one
            row, as the papers do.
        text_column: of jsonl, json, parquet, csv and hub data.
        stream: read local files while training instead of preparing them: nothing is kept on disk, and a pass has another order
            than the one before. A hub data set always is one. Held out are then the first documents of each large file.
        seed: of the split and the order of documents, and so of a tokenizer trained on them.
        order_seed: of the order of a training stream, by default `seed`. Rows on disk are shuffled by their reader.
        validation_tokens: predicted tokens after which validation ends. None: 10 million, but 5 % are held out however many they are,
            as lorank 0.1 did.
        cache_dir: default $XDG_CACHE_HOME/lorank, or ~/.cache/lorank.
        marks: file of `lorank.train.data.marks`, by which a stream of local files finds a row again.
        begin: the first row of a training stream of local files that is wanted.

    Raises:
        ValueError: an argument or the text cannot be used.
        OSError: a file, the hub or the disk failed.
    """
    check_form(documents, sequence_length)
    cache = cache_folder(cache_dir)
    open_ = partial(open_data, text_column=text_column, cache=cache, validation_tokens=validation_tokens, stream=stream)
    source = open_(data, seed=seed)
    if validation in (None, data):
        train, held_out, what = source.train, source.validation, name_of(data)
    else:
        other = open_(validation, seed=seed)
        what = validation
        train, held_out = source.whole, other.validation if is_held_out(validation) else other.whole
    name = None
    if isinstance(train, IterableDataset):  # reading it only to look up its tokenizer would be slow
        name = repr((data, text_column, seed, train is source.train))
    elif isinstance(train, FileStream):
        name = repr((data, text_column, seed, train.state))
    texts = partial(texts_of, train)
    tok = load_tokenizer(tokenizer, texts, vocab_size=vocab_size, cache_dir=cache, texts_name=name)
    form = Form.of(tok, sequence_length, documents)
    if isinstance(train, IterableDataset) and order_seed not in (None, seed):  # the same documents in another order
        again = open_(data, seed=order_seed)
        train = again.whole if train is source.whole else again.train
    elif isinstance(train, FileStream) and order_seed is not None:
        train = dataclasses.replace(train, seed=order_seed)
    place: dict[str, Any] = {}
    if isinstance(train, FileStream):
        of_what = repr((train.state, train.seed, identity(tok), sequence_length, documents))
        place = {"begin": begin, "marks": marks and Marks(marks, of_what, writes=is_first())}
    rows = make_sequences(train, form, f"the training text of {name_of(data)}", cache, **place)
    what = f"the validation text of {what}"
    held_out_rows = make_sequences(held_out, form, what, cache, validation_tokens or MOST_TOKENS)
    description = source.description
    if isinstance(rows, Dataset):
        tokens = amount(len(rows) * sequence_length, "tokens")
        description += f", {tokens if form.cut is None else f'{len(rows):,} sequences'} to train on"
    size = text_size_of(held_out, form, cache)
    apart = validation not in (None, data)
    files = sorted(source.digests)[:MOST_FILES]
    seen = seen_of(source, [] if apart else source.validation)
    return Corpus(
        tok, rows, held_out_rows, size, description, None if apart else held_out, files, seen, place.get("begin", 0)
    )


@quiet()
def load_evaluation(
    data: str | list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    documents: PerRow = "packed",
    text_column: str = "text",
    stream: bool = False,
    seed: int = 42,
    held_out: bool = False,
    held_out_hash: str | None = None,
    validation_tokens: int | None = 10_000_000,
    max_tokens: int = 10_000_000,
    cache_dir: Path | None = None,
) -> tuple[Dataset, TextSize]:
    """Rows to evaluate on and their bytes per token: the validation part of embedded and hub data; of local files all, or
    if `held_out` the part that `load_corpus` holds out with the same seed and `validation_tokens`.

    Rows end when `max_tokens` are predicted. With `held_out_hash` it is a ValueError if what is held out is not what it was. Other
    arguments and errors are those of `load_corpus`.
    """
    check_form(documents, sequence_length)
    cache = cache_folder(cache_dir)
    documents_read = _read(data, text_column, seed, cache, validation_tokens, stream=stream, held_out=held_out)
    if held_out and held_out_hash not in (None, hash_of(documents_read)):
        raise ValueError(
            f"data={data!r} must be the text of which the run held out a part, but it has changed since, and the run was trained on "
            "part of what would be held out now; restore it, or name another text with --data"
        )
    form = Form.of(tokenizer, sequence_length, documents)
    rows = make_sequences(documents_read, form, f"the text of {name_of(data)}", cache, max_tokens)
    return rows, text_size_of(documents_read, form, cache)


def _read(data: str | list[str], *place: Any, held_out: bool, **how: Any) -> Documents:
    """The documents of an evaluation; arguments are those of `open_data`."""
    opened = open_data(data, *place, **how)
    return opened.validation if held_out or is_held_out(data) else opened.whole


@quiet()
def share_trained_on(
    data: str | list[str],
    samples: Sequence[str],
    *,
    text_column: str = "text",
    stream: bool = False,
    seed: int = 42,
    held_out: bool = False,
    validation_tokens: int | None = 10_000_000,
) -> float:
    """About which share of the documents of an evaluation is in a text that was trained on, of which `Corpus.seen` is a sample; 0 for a data set of
    the hub, which would be downloaded for it. Other arguments and errors are those of `load_evaluation`."""
    documents = _read(data, text_column, seed, cache_folder(), validation_tokens, stream=stream, held_out=held_out)
    return 0.0 if isinstance(documents, IterableDataset) else share_of(texts_of(documents), samples)
