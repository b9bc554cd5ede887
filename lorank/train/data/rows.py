"""Documents as rows on disk, made by all cores and mapped into memory.

    documents  ->  shards of 32 MB of text  ->  KEY.parts/NUMBER.npy, their token ids  ->  KEY.arrow, the rows

Shards are tokenised in any order, each by one worker (`lorank.train.tokens`). Rows are cut from all tokens laid end to end, so
they do not depend on shards or cores. What was finished before an interruption is not done again. Ids of vocabularies of at most
65,536 entries take two bytes.
"""

import dataclasses
import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.fingerprint import Hasher
from filelock import FileLock

from lorank.train.data.cache import use
from lorank.train.data.form import Form
from lorank.train.data.tokenizers import VERSION, identity
from lorank.train.tokens import Documents, Plan, arrow_chunks, lengths_of, part_of, write_part
from lorank.train.watching import tell
from lorank.train.workers import Workers, cores
from lorank.whole import made_whole

SHARD = 32 << 20  # bytes of text that are tokenised by one process
FEW = 1  # shards that are tokenised in this process
ROWS = 1 << 20  # tokens that are written at once


def make_rows(documents: Dataset, form: Form, max_tokens: int | None, cache: Path) -> Dataset:
    """Rows of documents, from the cache if they are there; none if the text fills none.

    Args:
        max_tokens: predicted tokens after which rows end.

    Raises:
        OSError: a file could not be read or written.
        ValueError: the tokenizer cannot read a text.
    """
    key = key_of(documents, form, max_tokens)
    kept, parts = cache / f"{key}.arrow", cache / f"{key}.parts"
    cache.mkdir(parents=True, exist_ok=True)
    use(kept)
    try:
        with FileLock(cache / f"{key}.lock"):  # one process of a node prepares, the others wait
            if not kept.exists():
                _write_rows(_tokenised(documents, form, max_tokens, parts), form, max_tokens, kept)
                shutil.rmtree(parts, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                f"the disk of the cache {cache.parent} is full; free some space or set XDG_CACHE_HOME"
            ) from error
        raise
    return Dataset.from_file(str(kept))


def key_of(documents: Dataset, form: Form, max_tokens: int | None) -> str:
    """The name of rows in the cache."""
    return Hasher.hash((VERSION, documents._fingerprint, identity(form.tokenizer), form[1:], max_tokens))


def _tokenised(documents: Dataset, form: Form, max_tokens: int | None, folder: Path) -> list[Path]:
    """Files of the tokens of all shards, or of as many of the first as `max_tokens` needs."""
    column, order = documents.data.column("text"), _order(documents)
    ends = np.cumsum(pc.fill_null(pc.binary_length(column), 0).to_numpy()[order])  # bytes [documents]
    bounds = _bounds(ends)
    plan = Plan(bounds=bounds, eos=form.tokenizer.eos_token_id, length=form.cut, dtype=form.dtype)
    workers = min(len(bounds) - 1, cores())
    files = [found["filename"] for found in documents.cache_files]
    if workers > 1 and len(bounds) - 1 > FEW and sum(map(len, arrow_chunks(files))) == len(column):
        plan = dataclasses.replace(plan, files=files, tokenizer=form.rules)
    _begin(folder, plan, order)
    sizes = np.diff(np.concatenate([[0], ends])[bounds]).tolist()
    work = Work(folder, plan, Documents(column.chunks, order), form, sizes)
    numbers = list(range(len(sizes)))
    if max_tokens is None:
        work.do(numbers, workers)
        return [part_of(folder, number) for number in numbers]
    parts: list[Path] = []
    predicted = 0
    for start in range(0, len(numbers), workers):
        some = numbers[start : start + workers]
        work.do(some, workers)
        parts += [part_of(folder, number) for number in some]
        predicted += sum(_predicted(part_of(folder, number), form) for number in some)
        if predicted >= max_tokens + form.sequence_length:
            break
    return parts


def _order(documents: Dataset) -> np.ndarray:
    """Where each document is in the files."""
    if documents._indices is None:
        return np.arange(len(documents))
    return documents._indices.column(0).to_numpy().astype(np.int64)


def _bounds(ends: np.ndarray) -> list[int]:
    """Numbers of the documents with which shards begin, and at last that of all."""
    shards = np.arange(SHARD, ends[-1], SHARD)
    return list(dict.fromkeys([0, *(np.searchsorted(ends, shards) + 1).tolist(), len(ends)]))


def _begin(folder: Path, plan: Plan, order: np.ndarray) -> None:
    """Make a folder for shards. Files of another plan, from an older version of lorank, are deleted."""
    shards = [{**dataclasses.asdict(one), "files": None, "tokenizer": None} for one in _plans(folder, plan)]
    if len(shards) == 2 and shards[0] != shards[1]:
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(dataclasses.asdict(plan)))
    np.save(folder / "order.npy", order)


def _plans(folder: Path, plan: Plan) -> Iterator[Plan]:
    yield plan
    if folder.exists():
        try:
            yield Plan.read(folder)
        except (OSError, ValueError, TypeError):  # half a file, or other fields
            yield dataclasses.replace(plan, bounds=[])


def _predicted(part: Path, form: Form) -> int:
    """Tokens that rows of a shard predict, without those that its neighbours complete."""
    if form.cut is None:
        length = form.sequence_length
        return int(len(np.load(part, mmap_mode="r")) // length * (length - 1))
    lengths = np.load(lengths_of(part))
    return int(lengths.sum()) - len(lengths)


class Work:
    """Shards that are tokenised, here or by workers."""

    def __init__(self, folder: Path, plan: Plan, documents: Documents, form: Form, sizes: Sequence[int]):
        self.folder, self.plan, self.documents, self.form, self.sizes = folder, plan, documents, form, sizes
        self.done = [0] * len(sizes)
        """Bytes of text of each shard."""

    def do(self, numbers: Iterable[int], workers: int) -> None:
        """Tokenise shards whose files are not there yet."""
        missing = [number for number in numbers if not part_of(self.folder, number).exists()]
        for number in {*numbers} - {*missing}:
            self.done[number] = self.sizes[number]
        if missing and self.plan.tokenizer is not None:
            self._by_workers(missing, min(workers, len(missing)))
        elif missing:
            encode = self.form.quick
            for number in missing:
                write_part(self.folder, self.plan, number, self.documents, encode, partial(self._say, number))
                self._say(number, self.sizes[number])

    def _say(self, number: int, size: int) -> None:
        self._heard(number, size)
        self._tell()

    def _tell(self) -> None:
        tell("tokenising", sum(self.done), sum(self.sizes), "B")

    def _by_workers(self, numbers: Sequence[int], workers: int) -> None:
        for number in Workers("lorank.train.tokens", self.folder, self._heard, self._tell).do(numbers, workers):
            self.done[number] = self.sizes[number]
        self._tell()

    def _heard(self, number: int, size: int) -> None:
        self.done[number] = size


def _write_rows(parts: Iterable[Path], form: Form, max_tokens: int | None, kept: Path) -> None:
    """Rows from shards in their order, to one file."""
    length = form.sequence_length
    kinds = {"input_ids": form.dtype, "attention_mask": "uint8", "labels": "int32"}
    types = {name: pa.list_(pa.from_numpy_dtype(np.dtype(kinds[name])), length) for name in form.columns}
    parts = list(parts)
    whole = sum(part.stat().st_size for part in parts) // np.dtype(form.dtype).itemsize  # and a few for headers
    blocks = _until(_packed(parts, length) if form.cut is None else _padded(parts, form), form, max_tokens)
    done = 0
    with (
        made_whole(kept) as half,
        pa.OSFile(str(half), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema(types)) as writer,
    ):
        for rows in blocks:
            columns = [pa.FixedSizeListArray.from_arrays(pa.array(rows[name].ravel()), length) for name in types]
            writer.write_batch(pa.record_batch(columns, schema=pa.schema(types)))
            mask = rows.get("attention_mask")
            done += rows["input_ids"].size if mask is None else int(mask.sum(dtype=np.int64))
            tell("packing", done, max(done, whole if max_tokens is None else min(whole, max_tokens)), "tokens")


def _packed(parts: Iterable[Path], length: int) -> Iterator[dict[str, np.ndarray]]:
    """Windows [rows, length] over all tokens laid end to end."""
    rest = None
    for part in parts:
        ids = np.load(part, mmap_mode="r")
        ids = ids if rest is None else np.concatenate([rest, ids])
        whole = len(ids) // length * length
        each = max(1, ROWS // length) * length
        for start in range(0, whole, each):
            yield {"input_ids": np.asarray(ids[start : min(start + each, whole)]).reshape(-1, length)}
        rest = np.array(ids[whole:])


def _padded(parts: Iterable[Path], form: Form) -> Iterator[dict[str, np.ndarray]]:
    """A row for each document."""
    length = form.sequence_length
    each = max(1, ROWS // length)
    for part in parts:
        ids, lengths = np.load(part, mmap_mode="r"), np.load(lengths_of(part))
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        for start in range(0, len(lengths), each):
            some = lengths[start : start + each]
            mask = np.arange(length) < some[:, None]
            rows = np.full(mask.shape, form.padding, form.dtype)
            labels = np.full(mask.shape, -100, np.int32)
            rows[mask] = labels[mask] = ids[ends[start] : ends[start + len(some)]]
            yield {"input_ids": rows, "attention_mask": mask.astype(np.uint8), "labels": labels}


def _until(
    blocks: Iterable[dict[str, np.ndarray]], form: Form, max_tokens: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """Rows up to that with which `max_tokens` tokens are predicted."""
    before = 0
    for block in blocks:
        mask = block.get("attention_mask")
        tokens = np.full(len(block["input_ids"]), form.sequence_length) if mask is None else mask.sum(1, dtype=np.int64)
        predicted = before + np.cumsum(tokens - 1)
        if max_tokens is not None and predicted[-1] >= max_tokens:
            count = int(np.searchsorted(predicted, max_tokens)) + 1
            yield {name: rows[:count] for name, rows in block.items()}
            return
        yield block
        before = int(predicted[-1])
