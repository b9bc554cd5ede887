"""JSON values of a text, strictly: no name twice, no half of a character."""

import codecs
import functools
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

BUFFER = 1 << 20  # bytes read at once
LONGEST = 1 << 29  # bytes or characters that a row may have
TOO_LONG = "a row has more than 512 MiB"
SPACE = re.compile(r"[\s,]*")
JSON = json.JSONDecoder(
    parse_int=float
)  # Python's integers have a limit of digits, in columns that nobody asked for too
PAIRS = json.JSONDecoder(parse_int=float, object_pairs_hook=tuple)


def is_json(line: bytes) -> bool:
    try:
        JSON.decode(line.decode())
    except ValueError:
        return False
    return True


@functools.cache
def _spellings(column: str) -> set[str]:
    """A column's name in JSON, with other letters than ASCII's escaped and not."""
    return {json.dumps(column), json.dumps(column, ensure_ascii=False)}


def check_once(row: str, column: str) -> None:
    """Raises ValueError for an object that has a column several times, of which JSON would give the last."""
    if sum(map(row.count, _spellings(column))) > 1:
        pairs = PAIRS.decode(row)
        if isinstance(pairs, tuple) and [name for name, _ in pairs].count(column) > 1:
            raise ValueError(f"an object has several entries {column!r}")


def values(stream: BinaryIO, column: str) -> Iterator[tuple[int, Any]]:
    """JSON values one after another, or the elements of a list, without keeping all of them."""
    reader = codecs.getreader("utf-8-sig")(stream)
    text = reader.read(BUFFER)
    at, number, amount, at_end = SPACE.match(text).end(), 0, BUFFER, False  # type: ignore[union-attr]
    is_list = text.startswith("[", at)
    at += is_list
    while True:
        at = SPACE.match(text, at).end()  # type: ignore[union-attr]
        if is_list and text.startswith("]", at):
            if (text[at + 1 :] + reader.read(BUFFER)).strip():
                raise ValueError("there is more after the end of its list")
            return
        if at < len(text):
            try:
                value, end = JSON.raw_decode(text, at)
            except json.JSONDecodeError:
                if at_end:
                    raise
                if len(text) - at > LONGEST:
                    raise ValueError(TOO_LONG) from None
            else:
                number += 1
                check_once(text[at:end], column)
                yield number, value
                at, amount = end, BUFFER
                continue
        if at_end:
            if is_list:
                raise ValueError("its list has no end")
            return
        more = reader.read(min(amount, LONGEST + 1 - (len(text) - at)))
        text, at, amount, at_end = text[at:] + more, 0, 2 * amount, not more


def is_utf8(text: Any) -> bool:
    """Whether a text can be encoded. What is no text is another's concern."""
    try:
        _ = isinstance(text, str) and text.encode()
    except UnicodeEncodeError:
        return False
    return True
