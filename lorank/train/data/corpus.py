"""The training and validation sequences of a run, and held-out text for an evaluation."""

import functools
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from lorank.train.data.sequences import Form, bytes_per_token_of, check_form, ids_of, make_sequences
from lorank.train.data.sources import cache_folder, open_for_evaluation, open_source, quantity, quiet, texts_of
from lorank.train.data.tokenizers import identity, load_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Training and validation sequences, and the tokenizer that made them.

    Packed rows have the column input_ids; padded rows also attention_mask and labels (-100 on padding). Each
    contains `sequence_length` integers. Labels are not shifted: the models of transformers do that.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Dataset | IterableDataset
    """A stream never ends: it starts again in another order, so that any run can resume by skipping rows."""
    validation: Dataset
    validation_bytes_per_token: float
    """UTF-8 bytes of validation text per token (tokens that end documents included), for bits per byte."""
    description: str
    """One line for humans: "embedded: 612 documents, 11.8 MB, 3.4 M tokens"."""

    @functools.cached_property
    def fill(self) -> float:
        """Share of positions with text instead of padding, in training rows; for a stream, in validation rows."""
        rows = self.validation if isinstance(self.train, IterableDataset) else self.train
        if "attention_mask" not in rows.column_names:
            return 1.0
        return float(
            np.mean([chunk.flatten().to_numpy().mean() for chunk in rows.data.column("attention_mask").chunks])
        )

    @functools.cached_property
    def largest_id(self) -> int:
        """The largest token id of all rows on disk; those of a stream are unknown."""
        return max(max(map(int, map(np.max, ids_of(rows)))) for rows in (self.train, self.validation) if ids_of(rows))

    @functools.cached_property
    def hash(self) -> str:
        """Of the tokenizer and all token ids; for a stream, of the tokenizer and the validation rows."""
        digest = hashlib.blake2b(identity(self.tokenizer).encode(), digest_size=16)
        for rows in (self.train, self.validation):
            for ids in ids_of(rows):
                digest.update(ids.tobytes())
        return digest.hexdigest()


@quiet()
def load_corpus(
    data: str = "embedded",
    *,
    validation: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    sequence_length: int = 256,
    documents: Literal["packed", "padded"] = "packed",
    text_column: str = "text",
    seed: int = 42,
    order_seed: int | None = None,
    validation_tokens: int = 10_000_000,
    cache_dir: Path | None = None,
) -> Corpus:
    """Read `data`, hold out validation text, find or train a tokenizer, and cut both parts into sequences.

    Args:
        data: "embedded"; a file, folder or glob of txt, md, py (a file is a document), jsonl, json, parquet
            (a row is one), each also with .gz, .bz2, .xz or .zst; or a hub data set, "owner/name" or "owner/name:config".
        validation: another source, used whole. By default 5 % of local documents; of a hub data set its
            validation split, or without one its first documents, which training skips.
        tokenizer: name or folder; None trains byte-level BPE of `vocab_size` entries on the training text.
        documents: "packed" lays documents end to end, an end-of-sequence token after each, and cuts windows
            of `sequence_length` tokens; "padded" cuts or pads each document to one row, as the papers do.
        text_column: of jsonl, json, parquet and hub data.
        seed: of the split and the order of documents, and so of a tokenizer trained on them.
        order_seed: of the order of a training stream, by default `seed`. Rows on disk are shuffled by their reader.
        validation_tokens: predicted tokens after which validation ends.
        cache_dir: default $XDG_CACHE_HOME/lorank, or ~/.cache/lorank.

    Raises:
        ValueError: an argument or the text cannot be used.
        OSError: a file, the hub or the disk failed.
    """
    check_form(documents, sequence_length)
    cache = cache_folder(cache_dir)
    source = open_source(data, text_column, seed, cache)
    if validation in (None, data):
        validation, train, held_out = data, source.train, source.validation
    else:
        train, held_out = source.whole, open_for_evaluation(validation, text_column, seed, cache)
    name = None
    if isinstance(train, IterableDataset):  # reading it only to look up its tokenizer would be slow
        name = repr((data, text_column, seed, train is source.train))
    texts = partial(texts_of, train)
    tok = load_tokenizer(tokenizer, texts, vocab_size=vocab_size, cache_dir=cache, texts_name=name)
    form = Form(tok, sequence_length, documents)
    if isinstance(train, IterableDataset) and order_seed not in (None, seed):  # the same documents in another order
        again = open_source(data, text_column, order_seed, cache)  # type: ignore[arg-type]
        train = again.whole if train is source.whole else again.train
    rows = make_sequences(train, form, f"the training text of {data}", cache)
    what = f"the validation text of {validation}"
    held_out_rows = make_sequences(held_out, form, what, cache, validation_tokens)
    description = source.description
    if isinstance(rows, Dataset):
        tokens = quantity(len(rows) * sequence_length, "tokens")
        description += f", {tokens if documents == 'packed' else f'{len(rows):,} sequences'} to train on"
    return Corpus(tok, rows, held_out_rows, bytes_per_token_of(held_out, form), description)


@quiet()
def load_evaluation(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    documents: Literal["packed", "padded"] = "packed",
    text_column: str = "text",
    seed: int = 42,
    held_out: bool = False,
    validation_tokens: int = 10_000_000,
    cache_dir: Path | None = None,
) -> tuple[Dataset, float]:
    """Rows to evaluate on and their bytes per token: the validation part of embedded and hub data; of local files all, or
    if `held_out` the part that `load_corpus` holds out with the same seed.

    Arguments and errors are those of `load_corpus`.
    """
    check_form(documents, sequence_length)
    cache = cache_folder(cache_dir)
    held_out = open_for_evaluation(data, text_column, seed, cache, held_out)
    form = Form(tokenizer, sequence_length, documents)
    rows = make_sequences(held_out, form, f"the text of {data}", cache, validation_tokens)
    return rows, bytes_per_token_of(held_out, form)
