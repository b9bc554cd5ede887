"""Where documents come from, how they are split, and one sentence for everything that can be wrong with them."""

import csv
import gzip
import io
import json
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorank.train.data import load_corpus, load_evaluation, sources

L = 16
"""Tokens of a row, as `load` cuts them."""


def test_embedded_is_the_standard_library_without_its_tests(
    monkeypatch, tmp_path, documents, write, load, tokens, numbers
):
    files = [file.as_posix() for file in sources.embedded_files()]
    assert any(file.endswith("/textwrap.py") for file in files)
    assert not any(re.search(r"/(tests?|idle_test|site-packages)/", file) for file in files)
    assert files == [file.as_posix() for file in sources.embedded_files()]

    stdlib = tmp_path / "stdlib"
    for i, text in enumerate(documents(30)):
        write(stdlib / f"m{i}.py", text)
    write(stdlib / "test" / "test_m.py", "document 77\n")
    write(stdlib / "latin.py", b"# -*- coding: latin-1 -*-\n# \xe9\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(stdlib))
    corpus = load("embedded")
    assert set(numbers(corpus, corpus.train)) < set(range(30))
    assert re.fullmatch(r"embedded: 30 documents, 4\.\d kB, \d\.\d k tokens to train on", corpus.description)

    rows, size = load_evaluation("embedded", corpus.tokenizer, sequence_length=L)
    assert tokens(rows) == tokens(corpus.validation)
    assert size.per_token() == corpus.validation_size.per_token()


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".jsonl", ".json", ".parquet", ".csv", ".txt.gz", ".csv.gz"])
def test_every_suffix_gives_the_same_documents(tmp_path, suffix, documents, write, write_jsonl):
    texts = documents(20)
    folder = tmp_path / "da[t]a"
    kind = suffix.removesuffix(".gz")
    if kind in (".txt", ".md", ".py"):
        for i, text in enumerate(texts):
            write(folder / "deep" / f"{i:02}{suffix}", gzip.compress(text.encode()) if kind != suffix else text)
    elif kind == ".parquet":
        folder.mkdir()
        column = pa.array(texts, pa.large_string())
        pq.write_table(pa.table({"id": range(20), "text": column}), folder / "all.parquet")
    elif kind == ".csv":
        rows = io.StringIO(newline="")
        csv.writer(rows).writerows([["id", "text"], *enumerate(texts)])
        plain = rows.getvalue().encode()
        write(folder / f"all{suffix}", gzip.compress(plain) if kind != suffix else plain)
    elif kind == ".json":
        write(folder / "all.json", json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)]))
    else:
        plain = write_jsonl(tmp_path / "plain.jsonl", texts).read_bytes()
        write(folder / f"all{suffix}", gzip.compress(plain) if kind != suffix else plain)
    write(folder / "notes.tsv", "not,read\n")
    write(folder / ".hidden.txt", "not read\n")
    opened = sources.open_source(str(folder), "text", 0, tmp_path / "cache")
    assert sorted(opened.whole["text"]) == sorted(texts)
    read = " from 20 files" if kind in (".txt", ".md", ".py") else ""
    size = f"{sum(map(len, texts)) / 1000:.1f} kB"
    assert opened.description == f"{folder}: 20 documents, {size}{read} (left out: 1 other file)"


def test_malformed_bytes_are_counted(tmp_path, write):
    """Next to what is left out, also when the files come from the cache."""
    write(tmp_path / "a/1.txt", b"the cat " * 500 + b"\xff\xfe")
    write(tmp_path / "a/2.txt", "")
    for _ in range(2):
        opened = sources.open_source(str(tmp_path / "a"), "text", 0, tmp_path / "cache")
        assert opened.description.endswith(
            "1 document, 4.0 kB from 2 files (left out: 1 empty document; not UTF-8: 2 bytes)"
        )


def test_glob_mixed_kinds_and_columns_that_differ(tmp_path, write):
    write(tmp_path / "mix" / "a.txt", "from txt")
    write(tmp_path / "mix" / "empty.txt", "")
    (tmp_path / "mix" / "gone.txt").symlink_to("nowhere")
    write(tmp_path / "mix" / "b.jsonl", '{"text": "from b", "x": 1}\n{"text": null, "x": 1}\n')
    write(tmp_path / "mix" / "c.jsonl", '{"y": [2], "text": "from c"}\n{"y": [2], "text": ""}\n')
    opened = sources.open_source("mix/*", "text", 0, tmp_path / "cache")
    assert sorted(opened.whole["text"]) == ["from b", "from c", "from txt"]


def test_text_may_be_in_another_column(tmp_path, documents, write_jsonl, load, numbers):
    write_jsonl(tmp_path / "a.jsonl", documents(30), column="body")
    corpus = load("a.jsonl", text_column="body")
    assert set(numbers(corpus, corpus.train)) < set(range(30))


def test_no_document_is_on_both_sides_and_none_is_lost(tmp_path, documents, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", documents(200))
    opened = sources.open_source("a.jsonl", "text", 0, tmp_path / "cache")
    train, validation = list(opened.train["text"]), list(opened.validation["text"])
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(documents(200))
    share = len("".join(validation)) / len("".join(train + validation))
    assert 0.05 <= share < 0.06
    assert list(sources.open_source("a.jsonl", "text", 1, tmp_path / "cache").validation["text"]) != validation


@pytest.mark.parametrize(
    "sizes, held_out",
    [
        ([9, 1], [1]),
        ([5, 5], [5]),
        ([400, 10, 10, 300], [10, 10]),  # both do not make 5 %, and the others are too large
        ([90] + [1] * 100, [1] * 10),
    ],
)
def test_validation_takes_no_large_document(sizes, held_out):
    texts = datasets.Dataset.from_dict({"text": ["x" * size for size in sizes]})
    train, validation = sources._split(texts, np.array(sizes))
    assert [len(text) for text in validation["text"]] == held_out
    assert len(train) == len(sizes) - len(held_out)


@pytest.mark.parametrize("most, held_out", [(None, 500), (100, 100), (101, 102), (10**6, 500)])
def test_validation_is_what_evaluation_uses(most, held_out):
    """Of ten thousand documents of 8 bytes, 5 % or as many as surely have so many tokens."""
    texts = datasets.Dataset.from_dict({"text": ["8 bytes."] * 10_000})
    train, validation = sources._split(texts, np.full(10_000, 8), most)
    assert abs(len(validation) - held_out) <= 1 and len(train) + len(validation) == 10_000


@pytest.mark.parametrize("has_lines", [True, False])
def test_a_single_document_is_cut_at_a_line(tmp_path, has_lines, prose, write):
    text = prose(500) if has_lines else "x" * 1000
    write(tmp_path / "a.txt", text)
    opened = sources.open_source("a.txt", "text", 0, tmp_path / "cache")
    (train,), (validation,) = opened.train["text"], opened.validation["text"]
    assert train + validation == text
    assert 0.05 * len(text) <= len(validation) <= 0.1 * len(text)
    assert train.endswith("\n") or "\n" not in text


@pytest.mark.parametrize("name, held_out", [("owner/split:en", range(100, 120)), ("owner/whole", range(5))])
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_hub_data_are_streamed(hub, name, held_out, form, load, tokens, numbers):
    corpus = load(name, text_column="body", documents=form)
    assert isinstance(corpus.train, datasets.IterableDataset)
    assert isinstance(corpus.validation, datasets.Dataset)
    assert corpus.description == f"{name}: streamed"
    assert corpus.train.column_names == corpus.validation.column_names
    found = numbers(corpus, corpus.validation)
    assert found == list(held_out)[: len(found)] and len(found) >= len(held_out) - 1
    trained = set(numbers(corpus, corpus.train.take(1000)))
    assert trained == set(range(100)) - set(held_out)
    rows, size = load_evaluation(name, corpus.tokenizer, sequence_length=L, documents=form, text_column="body")
    assert tokens(rows) == tokens(corpus.validation) and size.per_token() == corpus.validation_size.per_token()


def test_a_hub_data_set_must_have_enough(monkeypatch, load):
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "x"}]))
    for splits, message in (
        ({"test": stream}, "must have a split named train, got .'test'"),
        ({"train": stream}, "only one document"),
    ):
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *_, splits=splits, **__: datasets.IterableDatasetDict(splits)
        )
        with pytest.raises(ValueError, match=message):
            load("owner/name")


def test_nothing_is_printed_and_the_users_settings_stay(tmp_path, capfd, documents, write, write_jsonl, load):
    write_jsonl(tmp_path / "a.jsonl", documents(30))
    write(tmp_path / "bad.jsonl", '{"text": "x"\n{{')
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    load("a.jsonl")
    with pytest.raises(ValueError):
        load("bad.jsonl")
    assert not datasets.are_progress_bars_disabled() and datasets.logging.get_verbosity() == level
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def wrong_files(tmp_path, prose, documents, write, write_jsonl):
    """Files that cannot be used, each for another reason."""
    write(tmp_path / "table.tsv", "a,b\n")
    write(tmp_path / "folder" / "table.tsv", "a,b\n")
    write(tmp_path / "empty" / "a.txt", "")
    write(tmp_path / "empty.jsonl", '{"text": ""}\n{"text": ""}\n')
    write(tmp_path / "latin.txt", b"caf\xe9 " * 100)
    write(tmp_path / "some" / "a.txt", prose(50))
    write(tmp_path / "some" / "b.txt", b"caf\xe9 " * 100)
    write(tmp_path / "broken.jsonl", '{"text": "x"\n{{')
    write(tmp_path / "broken.parquet", "PAR1 but no more")
    write(tmp_path / "numbers.jsonl", '{"text": 1}\n')
    write(tmp_path / "short.txt", "the cat\n" * 3)
    write(tmp_path / "little.txt", prose(40))
    write_jsonl(tmp_path / "good.jsonl", documents(30))
    write_jsonl(tmp_path / "body.jsonl", documents(3), column="body")


@pytest.mark.parametrize(
    "source, options, error, message",
    [
        ("nowhere.txt", {}, FileNotFoundError, "file not found: nowhere.txt; give a file, folder"),
        ("./nowhere", {}, FileNotFoundError, "file not found: ./nowhere"),
        ("a/b/nowhere", {}, FileNotFoundError, "file not found: a/b/nowhere"),
        (
            "table.tsv",
            {},
            ValueError,
            r"data files must end in .txt, .md, .py, .jsonl, .json, .parquet.*, got table.tsv",
        ),
        (
            "folder",
            {},
            ValueError,
            "folder contains no readable file; looked for .txt, .md, .py, .jsonl",
        ),
        ("folder/*.tsv", {}, ValueError, r"folder/\*.tsv contains no readable file; looked for .txt"),
        ("nowhere/*.txt", {}, ValueError, r"nowhere/\*.txt contains no readable file"),
        ("empty", {}, ValueError, "empty contains no text: every document is empty"),
        ("empty.jsonl", {}, ValueError, "empty.jsonl contains no text"),
        ("latin.txt", {}, ValueError, "latin.txt is not UTF-8 text .*position 3"),
        ("some", {}, ValueError, "some/b.txt is not UTF-8 text"),
        ("broken.jsonl", {}, ValueError, "broken.jsonl is not readable as json .*; repair it or leave it out"),
        ("broken.parquet", {}, ValueError, "broken.parquet is not readable as parquet"),
        ("numbers.jsonl", {}, ValueError, "column 'text' of numbers.jsonl must contain text, got a number in row 1;"),
        (
            "body.jsonl",
            {},
            ValueError,
            r"body.jsonl has no column 'text'; set text_column to one of \['id', 'body'\]",
        ),
        (
            "short.txt",
            {},
            ValueError,
            r"training text of short.txt has \d+ tokens, too few .*sequence_length=16;",
        ),
        ("little.txt", {}, ValueError, r"validation text of little.txt has \d+ tokens, too few .*=16"),
        (
            "good.jsonl",
            {"documents": "paked"},
            ValueError,
            "documents must be 'packed', 'separate' or 'padded', got 'paked'",
        ),
        ("good.jsonl", {"sequence_length": 1}, ValueError, "sequence_length must be at least 2, got 1"),
        ("good.jsonl", {"vocab_size": 257}, ValueError, "vocab_size must be at least 258 .*, got 257"),
        (
            "good.jsonl",
            {"tokenizer": "./nowhere"},
            OSError,
            r"\./nowhere: no tokenizer could be loaded .there is no such",
        ),
        (
            "good.jsonl",
            {"tokenizer": "my/t.json"},
            OSError,
            r"my/t.json: no tokenizer could be loaded .there is no such",
        ),
        (
            "good.jsonl",
            {"tokenizer": "gpt2"},
            OSError,
            "gpt2: no tokenizer could be loaded .We couldn't connect",
        ),
        (
            "good.jsonl",
            {"tokenizer": "no-eos"},
            ValueError,
            "tokenizer must have an end-of-sequence token, and 'no-eos' has none",
        ),
        (
            "owner/name",
            {},
            OSError,
            "owner/name is not on disk and could not be opened on the hub .Couldn't reach",
        ),
        ("owner/name:en", {}, OSError, "owner/name:en is not on disk and could not be opened on the hub"),
        ("embeded", {}, OSError, "embeded is not on disk and could not be opened on the hub"),
        (
            "owner/split:en",
            {},
            ValueError,
            r"no text in column 'text'; set text_column to one of \['body', 'url'\]",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(hub, tmp_path, source, options, error, message, load, t5_like, wrong_files):
    t5_like(tmp_path / "no-eos", eos=False)
    with pytest.raises(error, match=message) as raised:
        load(source, **options)
    assert "\n" not in str(raised.value)


def test_several_sources_are_mixed_by_their_weights(tmp_path, documents, write_jsonl, load, numbers):
    write_jsonl(tmp_path / "a.jsonl", documents(40))
    write_jsonl(tmp_path / "b" / "b.jsonl", documents(100)[40:])
    alone = {name: sources.open_source(name, "text", 42, tmp_path / "cache") for name in ("a.jsonl", "b")}
    opened = sources.open_data(["a.jsonl:2.5", "b/:0.5"], "text", 42, tmp_path / "cache")
    seen = [int(text.split()[1]) for text in opened.train["text"]]
    counts = np.bincount(seen, minlength=100)
    for name, weight, part in (("a.jsonl", 2.5, slice(0, 40)), ("b", 0.5, slice(40, 100))):
        assert counts[part].sum() == round(weight * len(alone[name].train))
    assert set(counts[:40]) == {0, 2, 3} and set(counts[40:]) == {0, 1}
    held_out = [text for one in alone.values() for text in one.validation["text"]]
    assert sorted(opened.validation["text"]) == sorted(held_out) and not {*held_out} & {*opened.train["text"]}
    assert seen != sorted(seen) and opened.description.endswith("times 0.5")
    corpus = load_corpus(["a.jsonl", "b"], vocab_size=300, sequence_length=8)
    assert set(numbers(corpus, corpus.train)) | set(numbers(corpus, corpus.validation)) == set(range(100))


@pytest.mark.parametrize(
    "several, message",
    [
        (["a.jsonl", "owner/split:en"], "data must be local if it is several sources, got 'owner/split:en'"),
        (["a.jsonl", "a.jsonl:2"], "data must name each source once, with a positive weight"),
        (["a.jsonl", "b.jsonl:0"], "PATH:WEIGHT with a number up to 1,000 such as 0.3, got 'b.jsonl:0'"),
        (["a.jsonl", "b.jsonl:1e9"], "got 'b.jsonl:1e9'"),
        (["a.jsonl", "b.jsonl:5000"], "got 'b.jsonl:5000'"),
        ("b.jsonl:2", "data must be a path, or of several sources PATH:WEIGHT .*, got 'b.jsonl:2'"),
        (["a.jsonl", "nowhere.jsonl:3"], "file not found: nowhere.jsonl"),
    ],
)
def test_what_is_wrong_with_several_sources(tmp_path, several, message, documents, write_jsonl):
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, documents(30))
    with pytest.raises((ValueError, OSError), match=message):
        load_corpus(several)
