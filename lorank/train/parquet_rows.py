"""One column of a Parquet file, block by block.

A file of a few kB may hold any amount of text: in a dictionary, or as the beginning of the values after it, a value is stored once
for any number of rows, and pages may be compressed. So rows are decoded so few at a time that they fit in memory.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROWS = 1024  # of a block, if they are not long
MOST = 1 << 28  # bytes of rows that are decoded at once, if there are several
LARGE = 1 << 31  # bytes of a group of rows
SHARE = 1000  # of these in a byte of the file; of text it is some ten


def column_of(table: pq.ParquetFile, source: Path | pa.BufferReader, column: str) -> Iterator[pa.Array]:
    """The values of a column as strings. `source` is where the table is.

    Raises:
        ValueError: they are not UTF-8, or more than is compressed to so few bytes of text.
    """
    rows = rows_at_once(source, table.metadata, column)
    some: list[pa.Array] = []
    for batch in table.iter_batches(batch_size=rows, columns=[column]):
        block = batch.column(batch.schema.get_field_index(column))  # a.b also selects b inside a
        if isinstance(block, pa.ExtensionArray):
            block = block.storage
        if isinstance(block, pa.DictionaryArray):
            block = block.dictionary_decode()
        block.validate(full=True)  # UTF-8
        some.append(block.cast(pa.string()))
        if rows * len(some) >= ROWS or sum(one.nbytes for one in some) >= MOST // 16:
            yield pa.concat_arrays(some)
            some = []
    if some:
        yield pa.concat_arrays(some)


def rows_at_once(source: Path | pa.BufferReader, metadata: pq.FileMetaData, column: str) -> int:
    """Rows that take less than `MOST` when they are decoded; one, if it may take more.

    Raises:
        ValueError: see `column_of`.
    """
    leaf = next((i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column), None)
    if leaf is None:
        return ROWS  # it has no values
    table = pq.ParquetFile(source, metadata=metadata, read_dictionary=[column])
    longest = 1
    for number in range(metadata.num_row_groups):
        chunk = metadata.row_group(number).column(leaf)
        size, stored = chunk.total_uncompressed_size, chunk.total_compressed_size
        if size >= LARGE and size > SHARE * stored:
            raise ValueError(f"a group of its rows has {size:,} bytes in {stored:,}, as no text does")
        if "DELTA_BYTE_ARRAY" in chunk.encodings:
            longest = max(longest, size)
        elif chunk.has_dictionary_page:
            first = next(table.iter_batches(1, row_groups=[number], columns=[column]), None)
            known = first.column(first.schema.get_field_index(column)) if first else None
            if isinstance(known, pa.ExtensionArray):
                known = known.storage
            if isinstance(known, pa.DictionaryArray):
                longest = max(longest, pc.max(pc.binary_length(known.dictionary)).as_py() or 0)
    return max(1, min(ROWS, MOST // longest))
