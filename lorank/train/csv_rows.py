"""One column of a file with commas between its values, block by block."""

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv

ROW = 1 << 25  # bytes that the longest row may have
TAIL = 1 << 12  # bytes


def column_of(stream: BinaryIO, column: str, last: str) -> Iterator[pa.Array]:
    """The values of a column as strings. `last` is the name of the last one.

    Raises:
        ValueError: the rows cannot be read, or a quote is never closed, so that all that follows it would be one value.
    """
    kinds = {last: pa.binary(), column: pa.string()}
    wanted = pa.csv.ConvertOptions(include_columns=[column, *({last} - {column})], column_types=kinds)
    rows = pa.csv.ParseOptions(newlines_in_values=True)
    source, value = _Remembered(stream), None
    with pa.csv.open_csv(
        source, read_options=pa.csv.ReadOptions(block_size=ROW), parse_options=rows, convert_options=wanted
    ) as reader:
        for batch in reader:
            yield batch.column(0)
            if len(batch):
                value = batch.column(batch.num_columns - 1)[-1]
    has_lines = value is not None and value.is_valid and b"\n" in value.as_buffer().to_pybytes()
    end = source.tail.rstrip()
    quotes = len(end) - len(end.rstrip(b'"'))
    if has_lines and quotes % 2 == 0:  # two are one that belongs to the value
        raise ValueError("a quote before the last value is never closed")


class _Remembered(io.RawIOBase):
    """A stream whose last bytes are remembered."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.tail = stream, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self.stream.read(len(buffer))
        buffer[: len(found)] = found
        self.tail = (self.tail + found[-TAIL:])[-TAIL:]
        return len(found)
