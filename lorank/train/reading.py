"""The text of one file, block by block, whatever else the file holds.

Only the column that was asked for is read: a string in it is text, whatever it looks like, and other columns may hold
anything. Left out and counted are documents without text, and lines of JSON that cannot be read if they are at most one in
a hundred; beyond that the file is refused. A byte-order mark is no text. What is text at all is in `lorank.train.encodings`.
"""

import bz2
import codecs
import csv
import dataclasses
import functools
import gzip
import io
import logging
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lorank.train import csv_rows, parquet_rows
from lorank.train.csv_rows import ROW
from lorank.train.encodings import UnreadableError, decoded, refuse_control_characters, refuse_other_encodings
from lorank.train.json_rows import BUFFER, JSON, LONGEST, TOO_LONG, check_once, is_json, is_utf8, values

logger = logging.getLogger(__name__)
KINDS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = f"{', '.join(KINDS)} (or these with {', '.join(COMPRESSED)})"
BLOCK = 1 << 22  # characters of a block
MOST = 1 << 31  # bytes of a file that is read as a whole: Arrow has no longer strings
INVALID_SHARE = 0.01
FEW = 10  # lines that cannot be read, however few lines there are so far
BROKEN = (pa.ArrowException, EOFError, OSError, RecursionError, ValueError, zlib.error, lzma.LZMAError)
"""What the readers of a damaged file raise."""
NAMES = {bool: "true or false", float: "a number", list: "a list", dict: "an object"}


@dataclasses.dataclass
class Tally:
    """What was read, and what was left out."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    """Of text in UTF-8."""
    empty: int = 0
    """Documents without text."""
    invalid: int = 0
    """Lines that cannot be read."""
    malformed: int = 0
    """Pieces of bytes in files of text that are not UTF-8, which have become U+FFFD."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def kind_of(file: Path) -> str:
    """ "text", "json", "parquet" or "csv" by a file's name, "" for any other."""
    return KINDS.get(_suffix(file), "")


def _suffix(file: Path) -> str:
    """The end of a file's name in small letters, without that of a compressed file."""
    name = file.name.lower()
    return Path(next((name.removesuffix(end) for end in COMPRESSED if name.endswith(end)), name)).suffix


def blocks(
    file: Path, column: str, tally: Tally, part: tuple[int, int] | None = None
) -> Iterator[tuple[pa.Array, int]]:
    """The documents of a file as string arrays without empty ones, which are counted in `tally`, and each time how many bytes of
    the file have been read (of Parquet: 0).

    Args:
        part: which bytes are read, from the beginning of a line to that of another or the end of the file; None: all.

    Raises:
        ValueError: the file is not what its name says, or `column` holds no text.
        OSError: it cannot be read from its disk.
    """
    kind, start = kind_of(file), part[0] if part else 0
    tally.files += not start
    if not file.stat().st_size:
        tally.empty += kind == "text"
        return
    try:
        with (
            open(file, "rb", buffering=BUFFER) as raw,
            _opened(file, raw) if part is None else _part(file, raw, *part) as stream,
        ):
            json_ = functools.partial(_json, start=start if part else None)
            read: Any = {"text": _text, "json": json_, "parquet": _parquet, "csv": _csv}[kind]
            for block in read(file, stream, column, tally):
                yield _counted(block, tally), raw.tell() - start
    except UnreadableError:
        raise
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{file} is not UTF-8 text ({error}); repair it or leave it out") from None
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UnreadableError(f"{file} is not readable as {kind} ({reason}); repair it or leave it out") from error


def _opened(file: Path, raw: BinaryIO) -> BinaryIO:
    """What a file contains, decompressed."""
    end = file.suffix.lower()
    if end not in COMPRESSED:
        return raw
    if end == ".zst":
        return io.BufferedReader(pa.input_stream(raw, compression="zstd"), BUFFER)
    stream: Any = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[end].open(raw)
    return io.BufferedReader(stream, BUFFER)


class _Bytes(io.RawIOBase):
    """Those of a file up to an end."""

    def __init__(self, raw: BinaryIO, end: int):
        self.raw, self.end = raw, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self.raw.read(min(len(buffer), self.end - self.raw.tell()))
        buffer[: len(found)] = found
        return len(found)


def _part(file: Path, raw: BinaryIO, start: int, end: int) -> BinaryIO:
    raw.seek(start)
    return raw if end == file.stat().st_size else io.BufferedReader(_Bytes(raw, end), BUFFER)


def cuts_of(file: Path, size: int) -> list[int]:
    """Bytes between which parts of a file of about `size` bytes can be read each by itself: 0, ends of lines, and the end of the
    file. Only files with `rows_at_lines` have such parts."""
    whole = file.stat().st_size
    cuts = [0]
    if whole >= 2 * size and rows_at_lines(file):
        with open(file, "rb") as stream:
            for at in range(size, whole, size):
                stream.seek(max(at, cuts[-1]))
                if stream.readline(ROW).endswith(b"\n") and stream.tell() < whole:
                    cuts.append(stream.tell())
    return [*cuts, whole]


def rows_at_lines(file: Path) -> bool:
    """Whether a file is JSON with a row a line, not compressed: it can be read from any line on."""
    if file.suffix.lower() not in (".jsonl", ".json"):
        return False
    with open(file, "rb") as stream:
        return _is_by_line(file, stream.read(BUFFER))


def _counted(block: pa.Array, tally: Tally) -> pa.Array:
    """A block without empty documents, and without a mark at the beginning of any."""
    if pc.any(pc.starts_with(block, "\ufeff")).as_py():
        block = pa.array([text and text.lstrip("\ufeff") for text in block.to_pylist()], pa.string())
    sizes = pc.fill_null(pc.binary_length(block), 0)
    block = block.filter(pc.greater(sizes, 0))
    tally.documents += len(block)
    tally.empty += len(sizes) - len(block)
    tally.bytes += pc.sum(sizes).as_py() or 0
    return block


def _text(file: Path, stream: BinaryIO, column: str, tally: Tally) -> Iterator[pa.Array]:
    """The whole file, with ends of lines as "\\n"."""
    data = _whole(stream)
    if data is None:
        raise UnreadableError(f"{file} must be smaller than 2 GiB, because a file of text is one document; split it")
    refuse_other_encodings(file, data)
    text, malformed, first = decoded(file, data)
    refuse_control_characters(file, data)
    if malformed:
        tally.malformed += malformed
        warn_of(file, malformed, len(data), first)
    yield pa.array([text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text], pa.string())


def _whole(stream: BinaryIO) -> bytes | None:
    """All that is left of a stream, which may be any amount if it is decompressed; None if it is not below `MOST`."""
    found = io.BytesIO()
    while part := stream.read(BUFFER):
        found.write(part)
        if found.tell() >= MOST:
            return None
    return found.getvalue()


def _parquet(file: Path, stream: BinaryIO, column: str, tally: Tally) -> Iterator[pa.Array]:
    source: Path | pa.BufferReader = file
    if file.suffix.lower() in COMPRESSED:
        if (data := _whole(stream)) is None:
            raise UnreadableError(
                f"{file} must be smaller than 2 GiB when it is decompressed; keep it as Parquet alone"
            )
        source = pa.BufferReader(data)
    with pq.ParquetFile(source) as table:
        schema = table.schema_arrow
        if not table.metadata.num_rows:
            return
        if column not in schema.names:
            raise _no_column(file, column, schema.names)
        if schema.names.count(column) > 1:
            raise _several_columns(file, column)
        kind = schema.field(column).type
        if not _holds_text(kind):
            raise UnreadableError(f"column {column!r} of {file} must contain text, got {kind}; set another text_column")
        yield from parquet_rows.column_of(table, source, column)


def _csv(file: Path, stream: BinaryIO, column: str, tally: Tally) -> Iterator[pa.Array]:
    """A column of rows with commas between their values and names in the first line."""
    head = stream.peek(BUFFER)  # type: ignore[attr-defined]
    refuse_other_encodings(file, head)
    names = next(csv.reader(io.StringIO(head.decode("utf-8-sig", "replace"), newline="")), [])
    if column not in names:
        raise _no_column(file, column, names)
    if names.count(column) > 1:
        raise _several_columns(file, column)
    yield from csv_rows.column_of(stream, column, names[-1])


def _holds_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def _is_by_line(file: Path, head: bytes) -> bool:
    """Whether a file of JSON has a row a line, by its beginning."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    return not start.startswith(b"[") and (_suffix(file) != ".json" or is_json(start.partition(b"\n")[0]))


def _json(file: Path, stream: BinaryIO, column: str, tally: Tally, start: int | None = None) -> Iterator[pa.Array]:
    """Rows of JSON: one a line, or a list of them, or in a .json file one after another over several lines each. `start` is where a
    part of a file begins."""
    head = stream.peek(BUFFER)  # type: ignore[attr-defined]
    refuse_other_encodings(file, head)
    by_line = start is not None or _is_by_line(file, head)
    rows = _lines(file, stream, column, tally, start) if by_line else values(stream, column)
    texts: list[str | None] = []
    size, found, names = 0, False, None
    count, before = 0, tally.invalid
    for number, row in rows:
        count += 1
        if isinstance(row, str):
            row = {column: row}
        elif not isinstance(row, dict):
            raise UnreadableError(
                f"{file} must have objects as rows, got {NAMES.get(type(row), 'null')} in row {number}"
            )
        found = found or column in row
        names = list(row) if names is None else names
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise UnreadableError(
                f"column {column!r} of {file} must contain text, got {NAMES[type(text)]} in row {number}; set another text_column"
            )
        texts.append(text)
        size += len(text or "")
        if size >= BLOCK:
            yield _string_array(texts, tally)
            texts, size = [], 0
    if names is not None and not found and not start:  # a later part may have no row with the column
        raise _no_column(file, column, names)
    if texts:
        yield _string_array(texts, tally)
    if not by_line and tally.invalid - before > INVALID_SHARE * count:
        raise UnreadableError(
            f"{file} is not readable as json (in {tally.invalid - before} of {count} rows, {column!r} has half a character, which is "
            "not UTF-8); repair it or leave it out"
        )


def _no_column(file: Path, column: str, names: list[str]) -> UnreadableError:
    return UnreadableError(f"{file} has no column {column!r}; set text_column to one of {names} or leave the file out")


def _several_columns(file: Path, column: str) -> UnreadableError:
    return UnreadableError(f"{file} must have one column {column!r}, got several of that name; rename them")


def _lines(file: Path, stream: BinaryIO, column: str, tally: Tally, start: int | None) -> Iterator[tuple[int, Any]]:
    """A row for each line that is not empty. Few lines that are no object are left out; of a part of a file, `FEW` whatever its length."""
    count = invalid = 0
    first = ""
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST + 1), b""), 1):
        if len(line) > LONGEST:
            raise ValueError(f"line {number + _lines_before(file, start or 0)}: {TOO_LONG}")
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.isspace() or not line:
            continue
        count += 1
        try:
            row = JSON.decode(text := line.decode())
            if not isinstance(row, dict):
                raise ValueError("it is not an object")
            check_once(text, column)
            if "\\u" in text and not is_utf8(row.get(column)):
                raise ValueError(f"{column!r} has half a character, which is no UTF-8")
        except (ValueError, RecursionError) as error:
            refuse_other_encodings(file, line)
            invalid += 1
            first = first or f"line {number + _lines_before(file, start or 0)}: {error}"
            if invalid > FEW + INVALID_SHARE * count:
                break
        else:
            yield number, row
    if invalid > max(INVALID_SHARE * count, FEW if start is not None else 0):
        raise UnreadableError(f"{file} is not readable as json ({first}); repair it or leave it out")
    if invalid:
        tally.invalid += invalid
        warn_of(file, invalid, count, first)


def warn_of(file: Path | str, found: int, count: int, first: str) -> None:
    """Say how many of its lines, or of its bytes if it is a file of text, could not be read."""
    if kind_of(Path(file)) == "text":
        logger.warning("%s: %d of %d bytes are not UTF-8 and become U+FFFD (%s)", file, found, count, first)
    else:
        logger.warning("%s: left out %d of %d lines, which cannot be read (%s)", file, found, count, first)


def _lines_before(file: Path, end: int) -> int:
    """How many lines end before a byte of a file."""
    with open(file, "rb") as stream:
        return sum(stream.read(min(BUFFER, end - at)).count(b"\n") for at in range(0, end, BUFFER))


def _string_array(texts: list[str | None], tally: Tally) -> pa.Array:
    """Texts as Arrow keeps them. Halves of a character, which JSON can write, are no UTF-8: such rows are left out."""
    try:
        return pa.array(texts, pa.string())
    except (UnicodeEncodeError, pa.ArrowException):
        kept = [text for text in texts if is_utf8(text)]
        tally.invalid += len(texts) - len(kept)
        return pa.array(kept, pa.string())
