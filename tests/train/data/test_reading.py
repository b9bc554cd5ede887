"""The text of one file: every kind and compression, what is left out, and what is refused."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorank.train import json_rows, parquet_rows, reading
from lorank.train.reading import Tally, blocks

ROWS = '{"text": "one", "n": 1}\n{"text": "two"}\n'


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.fixture
def read(tmp_path, write):
    """read("a.jsonl", data): its texts, and what was left out; with data=None, of the file that is there."""

    def read(name, data, column="text"):
        tally = Tally()
        file = tmp_path / name if data is None else write(tmp_path / name, data)
        texts = [text for block, _ in blocks(file, column, tally) for text in block.to_pylist()]
        assert (tally.files, tally.documents, tally.bytes) == (1, len(texts), len("".join(texts).encode()))
        return texts, (tally.empty, tally.malformed or tally.invalid)

    return read


@pytest.mark.parametrize(
    ("name", "data", "texts"),
    [
        ("a.txt", "one\r\ntwo\rthree\n", ["one\ntwo\nthree\n"]),
        ("a.JSONL", ROWS, ["one", "two"]),
        ("a.jsonl", f"\n\n{ROWS}  \n", ["one", "two"]),
        ("a.jsonl", '[{"text": "one"},\n {"text": "two"}]\n', ["one", "two"]),
        ("a.json", ROWS, ["one", "two"]),
        ("a.json", '["one", "two"]', ["one", "two"]),
        ("a.json", '{\n "text": "one"\n}\n{\n "text": "two"\n}', ["one", "two"]),
        ("a.jsonl", '{"text": "2020-01-01"}\n{"text": "12"}', ["2020-01-01", "12"]),
        ("a.jsonl", '{"text": "a\\u0000b"}', ["a\0b"]),
        (
            "a.csv",
            '\ufeffn,text\r\n1,"one, ""1"""\r\n2,"two\nlines"\r\n3,NA\r\n4,2020-01-01\r\n',
            ['one, "1"', "two\nlines", "NA", "2020-01-01"],
        ),
    ],
)
def test_a_string_is_text_however_it_is_written(read, name, data, texts):
    assert read(name, data) == (texts, (0, 0))


def test_other_columns_may_hold_anything(read):
    """They may change their type in a row, be numbers of any size, or be missing."""
    values = [None, "late", 1, "2020-01-01", [1, {}], {"deep": [[[]]]}, True, 1e300]
    rows = [json.dumps({"meta": value, "text": str(i)}) for i, value in enumerate(values)]
    rows += ['{"text": "digits", "meta": ' + "9" * 5000 + "}", '{"text": "none"}']
    texts, left = read("a.jsonl", "\n".join(rows))
    assert texts == [*map(str, range(len(values))), "digits", "none"] and left == (0, 0)


@pytest.mark.parametrize("end", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_compressed_files_are_read(read, tmp_path, name, end):
    data = ROWS.encode()
    if name == "a.parquet":
        pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / name)
        data = (tmp_path / name).read_bytes()
    expected = [ROWS] if name == "a.txt" else ["one", "two"]
    assert read(name + end, COMPRESS[end](data)) == (expected, (0, 0))
    if name == "a.jsonl":
        assert read(name + end, COMPRESS[end](data) * 2)[0] == expected * 2, "one archive behind another"
        assert read(name + end, COMPRESS[end](b"")) == ([], (0, 0))
        with pytest.raises(ValueError, match=f"a.jsonl{end} is not readable as json .*; repair it or leave it out$"):
            read(name + end, COMPRESS[end](data * 100)[:-12])
    assert read(name + end, b"") == ([], (name == "a.txt", 0)), "an empty file"


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a,
        lambda a: a.cast(pa.large_string()),
        lambda a: a.cast(pa.string_view()),
        lambda a: a.dictionary_encode(),
        lambda a: a.cast(pa.large_string()).dictionary_encode(),
    ],
)
def test_every_arrow_type_of_text_is_text(read, tmp_path, make):
    pq.write_table(pa.table({"text": make(pa.array(["one", None, "", "two"]))}), tmp_path / "a.parquet")
    assert read("a.parquet", None) == (["one", "two"], (2, 0))


def test_documents_without_text_are_counted(read, tmp_path):
    assert read("a.jsonl", '{"x": 1}\n{"text": null}\n{"text": ""}\n{"text": "a"}') == (["a"], (3, 0))
    for column in (pa.array([], pa.string()), pa.array([], pa.int64())):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        assert read("a.parquet", None) == ([], (0, 0)), "a shard without rows has no type to look at"
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    assert read("a.parquet", None) == ([], (3, 0))


def test_a_byte_order_mark_is_no_text(read, tmp_path):
    mark = "\ufeff"
    assert read("a.txt", mark + "one") == (["one"], (0, 0))
    assert read("a.jsonl", (mark + ROWS) * 2)[0] == ["one", "two"] * 2, "as cat puts files together"
    assert read("a.json", mark + '[{"text": "one"}]')[0] == ["one"]
    assert read("a.jsonl", json.dumps({"text": mark + "one"}))[0] == ["one"]
    pq.write_table(pa.table({"text": [mark + "one", "a" + mark]}), tmp_path / "a.parquet")
    assert read("a.parquet", None)[0] == ["one", "a" + mark]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", "the cat sat"), ("a.md", "кот сел"), ("a.jsonl", ROWS), ("a.json", "[]")]
)
def test_utf_16_and_32_are_refused(read, name, text, encoding):
    with pytest.raises(ValueError, match=f"{name} is not UTF-8 text.*; convert it to UTF-8 or leave it out$"):
        read(name, text.encode(encoding))


@pytest.mark.parametrize(
    ("bad", "said"), [(b"\xff", "invalid start byte"), (b"\xe2\x82", "invalid continuation byte"), (b"\xc3", "byte")]
)
def test_a_few_malformed_bytes_are_replaced_and_counted(read, caplog, bad, said):
    """Each run of bytes that begins a character and does not end it is one, as Unicode recommends."""
    data = b"the cat " * 200
    texts, left = read("a.txt", data + bad + data + "\ufffd".encode() + bad)
    assert texts == [f"{'the cat ' * 200}\ufffd{'the cat ' * 200}\ufffd\ufffd"] and left == (0, 2)
    assert (
        f"a.txt: 2 of {2 * len(data) + 3 + 2 * len(bad)} bytes are not UTF-8 and become U+FFFD (byte 1600: "
        in caplog.text
    )
    assert said in caplog.text


def test_text_in_latin_1_is_refused(read):
    """One letter in a hundred, as in Dutch or Italian."""
    with pytest.raises(
        ValueError, match=r"a.txt is not UTF-8 text \('utf-8' codec can't decode byte 0xe9 in position 5"
    ):
        read("a.txt", ("perch\xe9 " + "no " * 30).encode("latin-1") * 50)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("привет" * 5, "utf-16-be"),
        ("привет" * 5, "utf-16-le"),
        ("एकराजाकाराज्यबहुतबडाथा", "utf-16-be"),
        ("سلامكيف" * 3, "utf-16-le"),
        ("日本語の文章です。", "iso-2022-jp"),
        ("한국어 문장입니다", "iso-2022-kr"),
    ],
)
def test_other_encodings_without_a_nul_byte_are_refused(read, text, encoding):
    data = text.encode(encoding)
    assert b"\0" not in data and data.decode()
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text: .*; convert it to UTF-8 or leave it out$"):
        read("a.txt", data)


@pytest.mark.parametrize(
    "text",
    [
        "page one\fpage two",
        "\x1b[1m\x1b[32mINFO\x1b(B\x1b[m started\n" * 9,
        "N\bNA\bAM\bME\bE\n",
        "the end\n\x1a",
        "it\x92s a page that was read as Latin-1",
        "a bell \x07",
    ],
)
def test_control_characters_that_texts_have_are_text(read, text):
    assert read("a.txt", text) == ([text], (0, 0))


@pytest.mark.parametrize("names", [["text", "text"], ["n", "text", "text"]])
def test_a_column_that_is_there_twice_is_refused(read, tmp_path, names):
    pq.write_table(pa.table([["a"]] * len(names), names=names), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet must have one column 'text', got several of that name"):
        read("a.parquet", None)
    twice = '{"text": "one", "text": "two"}'
    for name, data in (("a.jsonl", twice), ("a.json", f"[{twice}]"), ("a.json", twice.replace(",", ",\n"))):
        with pytest.raises(ValueError, match=r"not readable as json \(.*several entries 'text'"):
            read(name, data)


def test_other_columns_may_be_there_twice(read, tmp_path):
    nested = pa.array([{"b": "nested"}])
    pq.write_table(pa.table([nested, ["a"], ["x"], ["y"]], names=["a", "a.b", "n", "n"]), tmp_path / "a.parquet")
    assert read("a.parquet", None, "a.b")[0] == ["a"]
    assert read("a.jsonl", '{"n": 1, "n": 2, "text": "one", "m": {"text": "b", "text": "text"}}')[0] == ["one"]


def test_a_few_broken_lines_are_left_out_and_said(read, caplog):
    assert read("a.jsonl", ROWS * 100 + '{"text": "cut o')[1] == (0, 1)
    assert "a.jsonl: left out 1 of 201 lines, which cannot be read (line 201: Unterminated" in caplog.text


def test_rows_with_half_a_character_are_unreadable_lines(read):
    half, whole = '{"text": "\\ud800"}', '{"text": "\\ud83d\\ude00"}'
    for name, data in (("a.jsonl", "\n".join), ("a.json", lambda rows: f"[{','.join(rows)}]")):
        assert read(name, data([half] + [whole] * 99)) == (["😀"] * 99, (0, 1))
        for rows in ([half], [half] * 2 + [whole] * 99):
            with pytest.raises(ValueError, match=f"{name} is not readable as json .*'text' has half a character"):
                read(name, data(rows))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", ROWS + '{"text": "cut o', r"not readable as json \(line 3: Unterminated string"),
        ("a.jsonl", '"a"\n"b"\n', r"not readable as json \(line 1: it is not an object"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"not readable as json \(line 1: 'utf-8' codec"),
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 text \(.*; repair it or leave it out"),
        ("a.json", '[{"text": "one"}, {"te', "not readable as json"),
        ("a.json", '[{"text": "one"}', r"not readable as json \(its list has no end"),
        ("a.json", '[{"text": "one"}] and', "there is more after the end of its list"),
        ("a.json", "[1, 2]", "must have objects as rows, got a number in row 1"),
        ("a.json", '{"text": ["a", "b"]}', "column 'text' of .* must contain text, got a list in row 1"),
        ("a.jsonl", '{"text": "a"}\n{"text": true}', "must contain text, got true or false in row 2"),
        ("a.jsonl", '{"a": 1, "b": 2}', r"has no column 'text'; set text_column to one of \['a', 'b'\] or leave the file"),
        ("a.parquet", "PAR1", "not readable as parquet"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_says_is_refused(read, name, data, message):
    with pytest.raises(ValueError, match=message) as refusal:
        read(name, data)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("column", [[1], [b"a"], [["a"]], [{"a": "b"}]])
def test_a_column_of_another_type_is_refused(read, tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'text' of .*a.parquet must contain text, got "):
        read("a.parquet", None)


def test_large_values_are_read_piece_by_piece(read, monkeypatch):
    monkeypatch.setattr(reading, "BUFFER", 16)
    monkeypatch.setattr(reading, "BLOCK", 50)
    texts = ["x" * size for size in (1, 100, 15, 16, 17, 3)]
    for name, data in (
        ("a.json", json.dumps([{"text": text} for text in texts])),
        ("b.json", "\n".join(json.dumps({"text": text}, indent=1) for text in texts)),
        ("c.jsonl", "\n".join(json.dumps({"text": text}) for text in texts)),
    ):
        assert read(name, data)[0] == texts


@pytest.mark.parametrize("end", ["", *COMPRESS])
def test_no_more_is_decompressed_than_may_be_read(read, monkeypatch, end):
    """A file of a few kB may hold many GB."""
    for module in (reading, json_rows):
        monkeypatch.setattr(module, "LONGEST", 1000)
        monkeypatch.setattr(module, "BUFFER", 100)
    monkeypatch.setattr(reading, "MOST", 1000)
    text, whole = "x" * 100_000, "must be smaller than 2 GiB"
    for name, data, message in (
        ("a.txt", text, whole),
        ("a.jsonl", f'{{"text": "a"}}\n{{"text": "{text}"}}\n', r"as json \(line 2: a row has more than 512 MiB\)"),
        ("a.json", f'[{{"text": "{text}"}}]', r"as json \(a row has more than 512 MiB\); repair it"),
        *([("a.parquet", text, whole)] if end else []),
    ):
        with pytest.raises(ValueError, match=message):
            read(name + end, COMPRESS[end](data.encode()) if end else data)


def test_long_rows_of_parquet_are_decoded_few_at_a_time(tmp_path, read, monkeypatch):
    """In a dictionary, or as the beginning of the next ones, a value is stored once for any number of rows."""
    monkeypatch.setattr(parquet_rows, "MOST", 10_000)
    texts, file = ["z" * 3000] * 24 + ["y"], tmp_path / "a.parquet"
    other = [{"text": "x" * 9}] * 25
    for columns, options, rows in (
        ({"other": other, "text": texts}, {}, 3),
        ({"text": texts}, {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}, 1),
        ({"text": ["a"] * 25}, {}, 1024),
    ):
        pq.write_table(pa.table(columns), file, row_group_size=13, **options)
        assert parquet_rows.rows_at_once(file, pq.read_metadata(file), "text") == rows
        assert read("a.parquet", None)[0] == columns["text"]


def test_parquet_that_is_small_for_its_text_is_refused(tmp_path, read, monkeypatch):
    monkeypatch.setattr(parquet_rows, "LARGE", 1_000_000)
    pq.write_table(pa.table({"text": ["z" * 2_000_000]}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"as parquet \(a group of its rows has 2,0.* as no text does\); repair it"):
        read("a.parquet", None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("n,body\n1,one\n", r"a.csv has no column 'text'; set text_column to one of \['n', 'body'\]"),
        ("text,text\none,two\n", "a.csv must have one column 'text'"),
        ("n,text\n1,one\ntwo\n", "a.csv is not readable as csv .*Expected 2 columns, got 1"),
        (
            'n,text\n1,one\n2,"two\n3,three\n',
            "a.csv is not readable as csv .*a quote before the last value is never closed",
        ),
        ('text,n\none,1\ntwo,"2\nthree,3\nsaid ""so""', "a.csv is not readable as csv .*is never closed"),
        ("n,text\n1,caf\xe9\n".encode("latin-1"), "a.csv is not readable as csv .*UTF8"),
        ("n,text\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_table_that_is_no_table(read, rows, message):
    with pytest.raises(ValueError, match=message):
        read("a.csv", rows)


@pytest.mark.parametrize("end", ["", "\n", "\r\n\r\n"])
def test_the_last_value_of_a_table_may_have_lines_and_quotes(read, end):
    assert read("a.csv", f'text,n\n"one\n""two""",1\nthree,"4\n""5"""{end}')[0] == ['one\n"two"', "three"]
