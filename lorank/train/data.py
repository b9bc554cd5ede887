"""Text in, token sequences out: where documents come from, how they are split, tokenised and cut.

    source  ->  documents  ->  training | validation  ->  tokenizer  ->  sequences [rows, sequence_length]

A source is `embedded` (the running interpreter's own standard library), local files, or a data set of the
hub, which is streamed. Files, caches and streams are the business of `datasets`, BPE that of `tokenizers`. No
document is on both sides of the split; packing loses no token but those that do not fill the last sequence.
"""

import atexit
import contextlib
import errno
import functools
import glob
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorank.train.hub import asked_if_reachable

logger = logging.getLogger(__name__)

VERSION = 1  # part of every cache key; raise it when the same text should give other tokens or sequences
VALIDATION_SHARE = 0.05
SHUFFLE_BUFFER = 10_000  # documents of a stream
TOKENIZER_CHARACTERS = 50_000_000  # a tokenizer learns from so much training text at most
MEASURED_BYTES = 10_000_000  # tokens are counted in so much validation text at most
PIECE = 1 << 20  # characters tokenised as one text at most: long texts then use all cores, but not all memory
BATCH = 1 << 22  # characters tokenised in one call
LOADERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
SUFFIXES = f"{', '.join(LOADERS)} (or these with .gz)"
NOT_EMBEDDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

Documents: TypeAlias = Dataset | IterableDataset  # one column, text; one row, one document
Row: TypeAlias = dict[str, list[int]]


@dataclass(frozen=True)
class Corpus:
    """Training and validation sequences, and the tokenizer that made them.

    Packed rows have the column input_ids; padded rows also attention_mask and labels (-100 on padding). Each
    holds `sequence_length` integers. Labels are not shifted: the models of transformers do that.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Dataset | IterableDataset
    """A stream never ends: it begins anew in another order, so that skipping rows resumes any run."""
    validation: Dataset
    validation_bytes_per_token: float
    """UTF-8 bytes of validation text per token, the tokens that end documents included, for bits per byte."""
    description: str
    """One line for humans: "embedded: 612 documents, 11.8 MB, 3.4 M tokens"."""

    @functools.cached_property
    def fill(self) -> float:
        """Share of the positions of training rows that hold text, not padding; of a stream, of its validation rows."""
        rows = self.validation if isinstance(self.train, IterableDataset) else self.train
        if "attention_mask" not in rows.column_names:
            return 1.0
        return float(
            np.mean([chunk.flatten().to_numpy().mean() for chunk in rows.data.column("attention_mask").chunks])
        )

    @functools.cached_property
    def largest_id(self) -> int:
        """The largest token id of the rows; those of a stream are not known."""
        return max(max(map(int, map(np.max, _ids(rows)))) for rows in (self.train, self.validation) if _ids(rows))

    @functools.cached_property
    def hash(self) -> str:
        """Of the tokenizer and of all token ids; of a stream, of its tokenizer and its validation rows."""
        digest = hashlib.blake2b(_identity(self.tokenizer).encode(), digest_size=16)
        for rows in (self.train, self.validation):
            for ids in _ids(rows):
                digest.update(ids.tobytes())
        return digest.hexdigest()


class Source(NamedTuple):
    """Documents in a seeded random order, and their two parts."""

    whole: Documents
    train: Documents
    validation: Documents
    description: str


class Form(NamedTuple):
    """How documents become sequences."""

    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    documents: Literal["packed", "padded"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or log lines of `datasets` inside; the user's own settings come back afterwards."""
    insisted = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None  # by environment variable
    bars = not insisted and not datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


@_quiet()
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
    """Read `data`, set validation text apart, find or train a tokenizer, and cut both parts into sequences.

    Args:
        data: "embedded"; a file, folder or glob of txt, md, py (a file is a document), jsonl, json, parquet
            (a row is one), each also with .gz; or a hub data set, "owner/name" or "owner/name:config".
        validation: another such source, used whole. By default 5 % of local documents; of a hub data set its
            validation split, or without one its first documents, which training skips.
        tokenizer: name or folder; None trains byte-level BPE of `vocab_size` entries on the training text.
        documents: "packed" lays documents end to end, an end-of-sequence token after each, and cuts windows
            of `sequence_length` tokens; "padded" cuts or pads each document to one row, as the papers do.
        text_column: of jsonl, json, parquet and hub data.
        seed: of the split, of the order of documents, and so of the tokenizer that is trained on them.
        order_seed: of the order in which a stream is trained on, if another than `seed`. Rows on disk are shuffled by whoever
            reads them.
        validation_tokens: predicted tokens after which validation ends.
        cache_dir: default $XDG_CACHE_HOME/lorank, or ~/.cache/lorank.

    Raises:
        ValueError: an argument or the text cannot be used.
        OSError: a file, the hub or the disk let us down.
    """
    _check(documents, sequence_length)
    cache = cache_folder(cache_dir)
    source = _open(data, text_column, seed, cache)
    if validation in (None, data):
        validation, train, held_out = data, source.train, source.validation
    else:
        train, held_out = source.whole, _open_for_evaluation(validation, text_column, seed, cache)
    name = None
    if isinstance(train, IterableDataset):  # too slow to read just to find out whether its tokenizer is known
        name = repr((data, text_column, seed, train is source.train))
    texts = partial(_texts, train)
    tok = load_tokenizer(tokenizer, texts, vocab_size=vocab_size, cache_dir=cache, texts_name=name)
    form = Form(tok, sequence_length, documents)
    if isinstance(train, IterableDataset) and order_seed not in (None, seed):  # the same documents in another order
        again = _open(data, text_column, order_seed, cache)  # type: ignore[arg-type]
        train = again.whole if train is source.whole else again.train
    rows = _sequences(train, form, f"the training text of {data}", cache)
    what = f"the validation text of {validation}"
    held_out_rows = _sequences(held_out, form, what, cache, validation_tokens)
    description = source.description
    if isinstance(rows, Dataset):
        tokens = _quantity(len(rows) * sequence_length, "tokens")
        description += f", {tokens if documents == 'packed' else f'{len(rows):,} sequences'} to train on"
    return Corpus(tok, rows, held_out_rows, _bytes_per_token(held_out, form), description)


@_quiet()
def load_evaluation(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    documents: Literal["packed", "padded"] = "packed",
    text_column: str = "text",
    seed: int = 42,
    validation_tokens: int = 10_000_000,
    cache_dir: Path | None = None,
) -> tuple[Dataset, float]:
    """Rows to evaluate on, and bytes per token: files whole, of embedded and hub data the validation part.

    Arguments and errors are those of `load_corpus`.
    """
    _check(documents, sequence_length)
    cache = cache_folder(cache_dir)
    held_out = _open_for_evaluation(data, text_column, seed, cache)
    form = Form(tokenizer, sequence_length, documents)
    rows = _sequences(held_out, form, f"the text of {data}", cache, validation_tokens)
    return rows, _bytes_per_token(held_out, form)


def collate(rows: Sequence[Mapping[str, Sequence[int]]], vocab_size: int | None = None) -> dict[str, torch.Tensor]:
    """Rows as one batch of int64 tensors [batch, sequence_length]; packed rows are their own labels.

    Raises:
        ValueError: an id is not below `vocab_size` (an embedding would only say that an index is out of range).
    """
    columns = {name: np.array([row[name] for row in rows], dtype=np.int64) for name in rows[0]}
    if vocab_size is not None:
        check_ids(int(columns["input_ids"].max()), vocab_size)
    batch = {name: torch.from_numpy(column) for name, column in columns.items()}
    batch.setdefault("labels", batch["input_ids"].clone())
    return batch


def check_ids(largest: int, vocab_size: int) -> None:
    """Raises ValueError if a vocabulary does not hold the largest token id."""
    if largest >= vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for the tokenizer, which gives id {largest}; leave it out"
        )


def _check(documents: str, sequence_length: int) -> None:
    if documents not in ("packed", "padded"):
        raise ValueError(f"documents={documents!r} is unknown; choose packed or padded")
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length} leaves nothing to predict; take at least 2")


def cache_folder(cache_dir: Path | None = None) -> Path:
    """The cache folder; if it cannot be written, one that lasts as long as the process."""
    folder = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lorank"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16))
            return folder
    except OSError as error:
        logger.warning("the cache %s cannot be written, the next run will tokenise again: %s", folder, error)
        temporary = tempfile.mkdtemp(prefix="lorank-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _root(error: BaseException) -> BaseException:
    """What `datasets` wrapped."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _quantity(number: float, unit: str) -> str:
    """As in 11.8 MB or 3.4 M tokens."""
    power = 1 + (number >= 999_950) + (number >= 999_950_000)
    return f"{number / 1000**power:.1f} {' kMG'[power]}{'' if unit == 'B' else ' '}{unit}"


# ------------------------------------------------------------------------------------------------------------
# Documents
# ------------------------------------------------------------------------------------------------------------


def _open(source: str, text_column: str, seed: int, cache: Path) -> Source:
    if _is_hub(source):
        return _open_hub(source, text_column, seed)
    kinds: dict[str, list[Path]] = {}
    for file in _embedded_files() if source == "embedded" else _local_files(source):
        if file.stat().st_size:
            kinds.setdefault(_loader(file), []).append(file)
    parts = [_read(loader, files, text_column, cache) for loader, files in kinds.items()]
    documents = datasets.concatenate_datasets(parts) if parts else Dataset.from_dict({"text": [""]})
    texts = documents.data.column("text")
    sizes = pyarrow.compute.binary_length(texts).fill_null(0).to_numpy()  # bytes [documents]
    order = np.random.default_rng(seed).permutation(np.flatnonzero(sizes))
    if not order.size:
        raise ValueError(f"{source} holds no text: every document is empty")
    documents, sizes = documents.select(order), sizes[order]
    count = f"{len(sizes):,} document{'s' * (len(sizes) > 1)}"
    description = f"{source}: {count}, {_quantity(sizes.sum(), 'B')}"
    return Source(documents, *_split(documents, sizes), description)


def _open_for_evaluation(source: str, text_column: str, seed: int, cache: Path) -> Documents:
    opened = _open(source, text_column, seed, cache)
    return opened.validation if source == "embedded" or _is_hub(source) else opened.whole


def _split(documents: Dataset, sizes: np.ndarray) -> tuple[Dataset, Dataset]:
    """Training and validation; the latter is the first documents of modest size, till they are 5 % of it."""
    if len(documents) == 1:
        text = documents[0]["text"]
        late, early = (int((1 - part) * len(text)) for part in (VALIDATION_SHARE, 2 * VALIDATION_SHARE))
        cut = text.rfind("\n", early, late) + 1 or late
        return Dataset.from_dict({"text": [text[:cut]]}), Dataset.from_dict({"text": [text[cut:]]})
    share = VALIDATION_SHARE * sizes.sum()
    small = np.flatnonzero(sizes <= max(share, sizes.min()))
    held_out = small[: np.searchsorted(np.cumsum(sizes[small]), share) + 1][: len(sizes) - 1]
    return documents.select(np.setdiff1d(np.arange(len(sizes)), held_out)), documents.select(held_out)


def _embedded_files() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(folder, NOT_EMBEDDED) if file.suffix == ".py" and _is_text(file)]
    if not files:
        raise FileNotFoundError(f"Python's own .py files, the embedded corpus, are not in {folder}; name data")
    return files


def _is_text(file: Path) -> bool:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        file.read_text(encoding="utf-8")
        return True
    return False


def _local_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        if not _loader(path):
            raise ValueError(f"{source} has no suffix that says how to read it; known are {SUFFIXES}")
        return [path]
    if path.is_dir():
        found: Iterable[Path] = _walk(path)
    elif set("*?[") & set(source):
        found = map(Path, sorted(glob.glob(str(path), recursive=True)))
    else:
        raise FileNotFoundError(f"file not found: {source}; name a file, folder, glob or hub data set")
    files = [file for file in found if _loader(file) and file.is_file()]
    if not files:
        raise ValueError(f"{source} holds no file that can be read; looked for {SUFFIXES}")
    return files


def _walk(folder: Path, skip: Iterable[str] = ()) -> Iterator[Path]:
    """Files at any depth in a fixed order, but for hidden ones."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _loader(file: Path) -> str:
    """Which loader of `datasets` reads a file; "" if none does."""
    return LOADERS.get(Path(file.name.lower().removesuffix(".gz")).suffix, "")


def _read(loader: str, files: list[Path], text_column: str, cache: Path) -> Dataset:
    """Documents of files of one kind; unchanged files come from the cache of `datasets`."""
    column = "text" if loader == "text" else text_column
    options = {"sample_by": "document"} if loader == "text" else {}
    names = [glob.escape(str(file)) for file in files]
    folder = str(cache / "documents")
    try:
        rows = datasets.load_dataset(loader, data_files=names, split="train", cache_dir=folder, **options)
    except Exception as error:  # pyarrow, pandas, datasets and the file system each raise their own
        cause = _root(error)
        if "disk space" in str(cause) or getattr(cause, "errno", None) == errno.ENOSPC:
            raise OSError(f"the disk of the cache {cache} is full; free some space or set XDG_CACHE_HOME") from error
        if len(files) > 1:  # one by one, to name the culprit, or because columns differ from file to file
            return datasets.concatenate_datasets([_read(loader, [file], text_column, cache) for file in files])
        kind = OSError if isinstance(cause, OSError) else ValueError
        wrong = "is not UTF-8 text" if isinstance(cause, UnicodeDecodeError) else f"is not readable as {loader}"
        raise kind(f"{files[0]} {wrong} ({_first_line(cause)}); mend it or leave it out") from error
    if column not in rows.column_names:
        raise ValueError(f"{files[0]} has no column {column!r}; set text_column to one of {rows.column_names}")
    dtype = getattr(rows.features[column], "dtype", "list")
    if dtype not in ("string", "large_string"):
        raise ValueError(f"column {column!r} of {files[0]} holds {dtype}, not text; set another text_column")
    rows = _only(column, rows)
    return rows if dtype == "string" else rows.cast_column("text", Value("string"))


def _only(column: str, rows: Any) -> Any:
    """Rows with one of their columns, under the name text."""
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def _is_hub(source: str) -> bool:
    """Whether a name can only mean a hub data set: nothing is there, and it does not look like a path."""
    if source == "embedded" or source.startswith((".", "/", "~")) or _loader(Path(source)):
        return False
    return not Path(source).exists() and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source))


def _open_hub(source: str, text_column: str, seed: int) -> Source:
    """Streams; without a validation split their first documents, 5 % at most, are held out."""
    name, _, config = source.partition(":")
    try:
        with asked_if_reachable():
            splits = datasets.load_dataset(name, config or None, streaming=True)
            first = {split: list(splits[split].take(1)) for split in ("train", "validation") if split in splits}
    except Exception as error:  # the network, the hub and every builder raise their own
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"{source} is not on disk, and the hub does not open it ({_first_line(error)})") from error
    if "train" not in first:
        raise ValueError(f"{source} has no split named train; it has {list(splits)}")
    streams = {}
    for split, rows in first.items():
        columns = list(rows[0]) if rows else []
        if text_column not in columns or not isinstance(rows[0][text_column], str | None):
            raise ValueError(f"{source} has no text in column {text_column!r}; set text_column, of {columns}")
        streams[split] = _only(text_column, splits[split])
    whole = train = streams["train"]
    validation = streams.get("validation")
    if validation is None:
        seen = sum(1 for _ in whole.take(SHUFFLE_BUFFER))
        if seen < 2:
            raise ValueError(f"{source} has one document and no validation split; name other validation data")
        count = max(1, int(VALIDATION_SHARE * seen))
        train, validation = whole.skip(count), whole.take(count)
    whole, train = (stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) for stream in (whole, train))
    return Source(whole, train, validation, f"{source}: streamed")


# ------------------------------------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------------------------------------


def load_tokenizer(
    name_or_path: str | None,
    texts: Iterable[str] | Callable[[], Iterable[str]] = (),
    *,
    vocab_size: int = 4096,
    cache_dir: Path | None = None,
    texts_name: str | None = None,
) -> PreTrainedTokenizerBase:
    """A tokenizer by name or folder; "bytes", whose tokens are bytes; or byte-level BPE trained on `texts`, or once trained on them and kept.

    Args:
        texts: or what returns them; not more than 50 million characters are read.
        vocab_size: entries at most, 256 bytes, <|endoftext|> (eos and bos) and <|pad|> among them.
        texts_name: stands for the texts in the cache; with None their hash does, and they are read for it.

    Raises:
        OSError: no tokenizer could be loaded.
        ValueError: the vocabulary does not even hold all bytes.
    """
    if name_or_path == "bytes":
        return byte_tokenizer()
    if name_or_path is not None:
        try:
            with asked_if_reachable():
                found = AutoTokenizer.from_pretrained(os.path.expanduser(name_or_path), trust_remote_code=False)
        except Exception as error:  # the hub, a file or its parser
            raise OSError(f"{name_or_path}: no tokenizer could be loaded ({_first_line(error)})") from error
        if found.get_vocab().keys() <= found.get_added_vocab().keys():  # of some types, where there are no files
            raise OSError(f"{name_or_path}: no tokenizer could be loaded (its vocabulary is empty)")
        return found
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size} is too small; 256 bytes and 2 special tokens need 258")
    texts = _first(texts() if callable(texts) else texts, TOKENIZER_CHARACTERS)
    if texts_name is None:
        texts = list(texts)
        texts_name = "".join(hashlib.blake2b(text.encode()).hexdigest() for text in texts)
    folder = cache_folder(cache_dir) / "tokenizers" / Hasher.hash((VERSION, texts_name, vocab_size))
    if not folder.exists():
        tokenizer = _train_tokenizer(texts, vocab_size)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as part:
                tokenizer.save_pretrained(f"{part}/whole")
                os.rename(f"{part}/whole", folder)
        except OSError as error:
            if not folder.exists():  # if it does, another process was faster
                logger.warning("the tokenizer is not kept for the next run: %s", error)
                return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Each byte is the token of its number; byte 0 ends and begins documents, and is left out where a text has it."""
    named = sorted(pre_tokenizers.ByteLevel.alphabet())  # stand-ins for those bytes that cannot be printed
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert sorted(vocabulary) == named
    del vocabulary[chr(256)]
    tokenizer = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, **vocabulary}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    end, pad = "<|endoftext|>", "<|pad|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[end, pad],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=pad)


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides a tokenizer's output, but for the truncation its last call set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash(tokenizer)
    rules = json.dumps({**json.loads(backend.to_str()), "truncation": None, "padding": None})
    return Hasher.hash((rules, tokenizer.eos_token_id, tokenizer.pad_token_id))


# ------------------------------------------------------------------------------------------------------------
# Sequences
# ------------------------------------------------------------------------------------------------------------


def _sequences(
    documents: Documents, form: Form, what: str, cache: Path, max_tokens: int | None = None
) -> Dataset | IterableDataset:
    """Documents as rows, kept in the cache; a stream's are a stream too unless `max_tokens` ends them."""
    if form.tokenizer.eos_token_id is None:
        name = form.tokenizer.name_or_path
        raise ValueError(f"tokenizer {name!r} has no end-of-sequence token to end documents with; take another")
    columns = ["input_ids"] if form.documents == "packed" else ["input_ids", "attention_mask", "labels"]
    features = Features({column: List(Value("int32"), length=form.sequence_length) for column in columns})
    arguments: dict[str, Any] = {"documents": documents, "form": form, "what": what, "max_tokens": max_tokens}
    if isinstance(documents, IterableDataset):
        if max_tokens is None:
            return IterableDataset.from_generator(_endless, features, arguments)
        return Dataset.from_list(list(_rows(**arguments)), features)
    key = (VERSION, documents._fingerprint, _identity(form.tokenizer), form[1:], max_tokens)
    name, folder = Hasher.hash(key), str(cache / "sequences")
    try:
        return Dataset.from_generator(_rows, features, folder, gen_kwargs=arguments, fingerprint=name)
    except DatasetGenerationError as error:
        raise _root(error) from None


def _endless(documents: IterableDataset, **arguments: Any) -> Iterator[Row]:
    for epoch in itertools.count():
        documents.set_epoch(epoch)  # another order
        yield from _rows(documents, **arguments)


def _rows(documents: Documents, form: Form, what: str, max_tokens: int | None) -> Iterator[Row]:
    """Rows until they predict `max_tokens` tokens; ValueError if there is not one."""
    predicted = 0
    for row in (_packed if form.documents == "packed" else _padded)(documents, form):
        yield row
        predicted += sum(row.get("attention_mask", [1] * form.sequence_length)) - 1
        if max_tokens is not None and predicted >= max_tokens:
            return
    if not predicted:
        count = sum(len(ids) for _, ids in _tokens(documents, form.tokenizer))
        needs = f"one sequence of sequence_length={form.sequence_length}"
        raise ValueError(f"{what} has {count:,} tokens, too few for {needs}; give more text or shorten it")


def _packed(documents: Documents, form: Form) -> Iterator[Row]:
    """Windows of documents laid end to end."""
    rest: list[int] = []
    for _, ids in _tokens(documents, form.tokenizer):
        rest += ids
        whole = len(rest) - len(rest) % form.sequence_length
        for start in range(0, whole, form.sequence_length):
            yield {"input_ids": rest[start : start + form.sequence_length]}
        del rest[:whole]


def _padded(documents: Documents, form: Form) -> Iterator[Row]:
    """One row a document."""
    tokenizer, length, _ = form
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for _, ids in _beginnings(documents, form):
        if len(ids) > 1:  # one token predicts nothing
            n = length - len(ids)
            mask = [1] * len(ids) + [0] * n
            yield {"input_ids": ids + [pad] * n, "attention_mask": mask, "labels": ids + [-100] * n}


def _beginnings(documents: Documents, form: Form) -> Iterator[tuple["Piece", list[int]]]:
    """Documents with the token ids that fit in a row: their tokenizer's own special ones, and eos if it lacks and has
    room."""
    tokenizer, length, _ = form
    beginnings = (Piece(text[:PIECE], True) for text in _texts(documents))
    for piece, ids in _encode(beginnings, tokenizer, truncation=True, max_length=length):
        if len(ids) < length and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        yield piece, ids


def _bytes_per_token(documents: Documents, form: Form) -> float:
    """UTF-8 bytes per token of the text that is in the rows."""
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


class Piece(NamedTuple):
    """Part of a document, small enough to be tokenised as one text."""

    text: str
    is_last: bool


def _tokens(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Piece, list[int]]]:
    """Documents piece by piece with their token ids, eos after the last piece of each."""
    pieces = itertools.chain.from_iterable(map(_pieces, _texts(documents)))
    for piece, ids in _encode(pieces, tokenizer, add_special_tokens=False):
        yield piece, [*ids, tokenizer.eos_token_id] if piece.is_last else ids


def _encode(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Iterator[tuple[Piece, list[int]]]:
    """Pieces with their token ids, many in one call, which then uses all cores."""
    for batch in _batches(pieces):
        texts = [piece.text for piece in batch]
        yield from zip(batch, tokenizer(texts, verbose=False, **options)["input_ids"], strict=True)


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


def _pieces(text: str) -> Iterator[Piece]:
    """A text in pieces that end with a line where they can."""
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield Piece(text[start:cut], False)
        start = cut
    yield Piece(text[start:], True)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Texts, piece by piece, up to so many characters."""
    for piece in itertools.chain.from_iterable(map(_pieces, texts)):
        if characters <= 0:
            return
        yield piece.text
        characters -= len(piece.text)


def _ids(rows: Dataset | IterableDataset) -> list[np.ndarray]:
    """The token ids of rows on disk, chunk by chunk, not copied; of a stream, none."""
    if isinstance(rows, IterableDataset):
        return []
    return [chunk.flatten().to_numpy() for chunk in rows.data.column("input_ids").chunks if len(chunk)]


def _texts(documents: Documents) -> Iterator[str]:
    for block in documents.iter(batch_size=64):
        yield from filter(None, block["text"])
