"""What is UTF-8 text, and what only looks so.

A few malformed bytes, as a copy that was cut or a disk leave them, become U+FFFD and are counted. Refused are UTF-16, UTF-32 and binary
data, known by NUL bytes or by many other control characters; ISO-2022, known by the escape sequence before its two-byte characters; and
what has more malformed bytes, as text of one byte a character has.
"""

import codecs
from pathlib import Path

CONTROLS = bytes(code for code in (*range(32), 127) if code not in b"\t\n\r\f\b\x1b")
"""Control characters that are rare in text. Terminals write escapes, and a backspace to print bold; form feeds divide pages."""
CONTROL_SHARE = 0.01
"""The largest share of them in a file, besides one. Of UTF-16 they are half in scripts whose high byte is one, and in Indian scripts a twentieth."""
ISO_2022 = b"\x1b$"
"""What comes before two-byte characters in ISO-2022-JP, -KR and -CN; terminals use no such sequence."""
MALFORMED_SHARE = 0.001
"""The largest share of malformed bytes in a file of text. In Latin-1 each letter with an accent is one: of French 4 in a hundred."""


class UnreadableError(ValueError):
    """A file that holds no text, or not where it was looked for."""


def refuse_other_encodings(file: Path, data: bytes) -> None:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UnreadableError(f"{file} is not UTF-8 text but UTF-16 or UTF-32; convert it to UTF-8 or leave it out")
    if (position := data.find(b"\0")) >= 0:
        raise UnreadableError(
            f"{file} is not UTF-8 text: byte {position} is NUL, as in UTF-16 or in binary data; convert it to UTF-8 or leave it out"
        )


def refuse_control_characters(file: Path, data: bytes) -> None:
    """Refuse what can be decoded as UTF-8 by chance."""
    if ISO_2022 in data:
        raise UnreadableError(
            f"{file} is not UTF-8 text: byte {data.index(ISO_2022)} begins an escape sequence of ISO-2022; convert it to UTF-8 or leave it out"
        )
    data = data.rstrip(b"\x1a")  # the end of a file in DOS
    count = len(data) - len(data.translate(None, CONTROLS))
    if count > 1 + CONTROL_SHARE * len(data):
        raise UnreadableError(
            f"{file} is not UTF-8 text: {100 * count / len(data):.0f} % of it are control characters, as in UTF-16 or in binary data; "
            "convert it to UTF-8 or leave it out"
        )


def decoded(file: Path, data: bytes) -> tuple[str, int, str]:
    """The text of a file, how many pieces of malformed bytes have become U+FFFD in it, and where the first is.

    Raises:
        UnreadableError: they are too many.
    """
    try:
        return data.decode(), 0, ""
    except UnicodeDecodeError as error:
        text = data.decode(errors="replace")
        malformed = text.count("\ufffd") - data.count("\ufffd".encode())
        if malformed > MALFORMED_SHARE * len(data):
            raise UnreadableError(f"{file} is not UTF-8 text ({error}); repair it or leave it out") from None
        return text, malformed, f"byte {error.start}: {error.reason}"
