"""Local files that are read while a model trains: what a pass has, what is held out, and how much is in memory."""

import gzip
import itertools
import json
import re

import numpy as np
import pytest

from lorank.train import reading
from lorank.train.data import load_corpus, load_evaluation, streams
from lorank.train.data.marks import Mark, Marks

NUMBER = re.compile(r"document (\d+)\n")


@pytest.fixture
def small(monkeypatch):
    """A pool of few documents, and files that count as large soon."""
    monkeypatch.setattr(streams, "POOL", 3000)
    monkeypatch.setattr(streams, "LARGE", 60)
    monkeypatch.setattr(streams, "OPEN", 3)


def numbers_of(stream):
    return [int(NUMBER.match(text)[1]) for block in stream.iter(7) for text in block["text"]]


def test_the_last_mark_may_be_at_the_row_itself(tmp_path):
    kept = Marks(tmp_path / "marks.jsonl", "a stream", writes=True)
    for row in (0, 5, 9):
        kept.add(Mark(row, [], streams.Place(0, np.random.default_rng(0).bit_generator.state, 0, [])))
    again = Marks(tmp_path / "marks.jsonl", "a stream", writes=False)
    assert [again.last(row).row for row in (0, 4, 5, 8, 9, 20)] == [0, 0, 5, 5, 9, 9]


@pytest.mark.parametrize("changed", ['"row": 9', '"opened": 0', "bit", "[[[["])
def test_a_mark_that_has_changed_does_not_count(tmp_path, changed):
    """Each would lead to other text; the mark before it leads to the same text later."""
    file = tmp_path / "marks.jsonl"
    kept = Marks(file, "a stream", writes=True)
    for row in (0, 5):
        generator = np.random.default_rng(row).bit_generator.state
        kept.add(Mark(row, [7, 8], streams.Place(1, generator, 3, [(2, streams.Reached(1, 40, 30))])))
    *before, last = file.read_text().split("\n")
    other = {'"row": 9': last.replace('"row": 5', '"row": 9'), '"opened": 0': last.replace(", 3, [[2,", ", 0, [[2,")}
    other |= {"bit": last.replace("[7, 8]", "[7, 9]"), "[[[[": "[" * 100_000}
    assert other[changed] != last
    file.write_text("\n".join([*before, other[changed]]))
    assert [mark.row for mark in Marks(file, "a stream", writes=False).known] == [0]


@pytest.fixture
def corpus(documents, write, write_jsonl, tmp_path, small):
    """Two large files of rows, one of them compressed, a small one, and ten texts: documents 0 to 119."""
    texts = documents(120)
    write_jsonl(tmp_path / "c/a.jsonl", texts[:60])
    write_jsonl(tmp_path / "c/small.jsonl", texts[100:110])
    write(tmp_path / "c/b.jsonl.gz", gzip.compress(write_jsonl(tmp_path / "b", texts[60:100]).read_bytes()))
    for i in range(110, 120):
        write(tmp_path / f"c/{i}.txt", texts[i])
    files = sorted((tmp_path / "c").iterdir())
    return streams.streams_of(files, "text", 0, share=0.05)


def test_a_pass_has_each_document_once_in_another_order(corpus):
    whole, train, validation = corpus
    first = numbers_of(whole)
    assert sorted(first) == list(range(120)) and first == numbers_of(whole)
    whole.set_epoch(1)
    assert sorted(second := numbers_of(whole)) == list(range(120)) and second != first
    apart = [abs(one - other) for one, other in itertools.pairwise(first)]
    assert sum(one > 5 for one in apart) > 60  # not in the order of the files
    held_out = numbers_of(validation)
    assert sorted([*numbers_of(train), *held_out]) == list(range(120))
    assert {0, 60} < {*held_out} and len(held_out) < 20  # the first of each large file, and a whole small one


def test_what_is_held_out_is_read_alone(corpus, monkeypatch):
    """Of the first large file only the first block; of files that are seen whole in training nothing."""
    read = []
    before = streams.blocks
    monkeypatch.setattr(streams, "blocks", lambda file, *rest: read.append(file.name) or before(file, *rest))
    *_, validation = corpus
    held_out = [part.file.name for part in validation.parts if part.held_out]
    numbers_of(validation)
    assert sorted(read) == sorted(held_out) and len(read) < len(validation.parts) / 2


def test_weights_say_how_often_a_pass_sees_a_document(corpus):
    whole, *_ = corpus
    counted = numbers_of(streams.mixed([whole], [2.5], seed=0))
    counts = [counted.count(i) for i in range(120)]
    assert {*counts} == {2, 3} and 40 < counts.count(3) < 80
    assert 20 < len(numbers_of(streams.mixed([whole], [0.3], seed=0))) < 55


def test_the_pool_bounds_what_is_in_memory(corpus, monkeypatch):
    """However large files are, no more documents wait than the pool and a block of each open file hold."""
    whole, *_ = corpus
    taken, given = 0, 0
    texts = streams.Reader._texts

    def counting(self, *what):
        nonlocal taken
        for some in texts(self, *what):
            for i in range(0, len(some), 5):
                taken += sum(map(len, some[i : i + 5]))
                yield some[i : i + 5]

    monkeypatch.setattr(streams.Reader, "_texts", counting)
    most = 0
    for block in whole.iter(1):
        given += len(block["text"][0])
        most = max(most, taken - given)
    assert taken == given > 10_000 and most < 3000 + 5 * 300


def test_a_corpus_of_a_stream(tmp_path, documents, write_jsonl, load, numbers, tokens):
    """Nothing is kept in the cache but the vocabulary; the same seed reads the same rows; evaluation reads what was held out."""
    write_jsonl(tmp_path / "a.jsonl", documents(50))
    write_jsonl(tmp_path / "b.jsonl", documents(60)[50:])
    both = ["a.jsonl", "b.jsonl:2"]
    corpus = load_corpus(both, vocab_size=300, sequence_length=16, stream=True)
    again = load_corpus(both, vocab_size=300, sequence_length=16, stream=True)
    other = load_corpus(both, vocab_size=300, sequence_length=16, stream=True, order_seed=1)
    rows, same, elsewhere = (list(itertools.islice(one.train, 600)) for one in (corpus, again, other))
    assert rows == same != elsewhere and corpus.hash == again.hash == other.hash
    held_out = {*numbers(corpus, corpus.validation)}
    assert held_out and not held_out & {*numbers(corpus, rows)} and not held_out & {*numbers(corpus, elsewhere)}
    assert corpus.description == "a.jsonl: 1 file, 8.5 kB, streamed; b.jsonl: 1 file, 1.7 kB, streamed, times 2"
    assert {path.name for path in (tmp_path / "xdg/lorank").iterdir()} <= {"tokenizers", "users"}
    evaluated, size = load_evaluation(both, corpus.tokenizer, sequence_length=16, stream=True, held_out=True)
    assert tokens(evaluated) == tokens(corpus.validation)
    assert size.per_token() == corpus.validation_size.per_token()


@pytest.mark.parametrize("documents_per_row", ["packed", "padded"])
def test_a_stream_goes_on_from_its_marks(tmp_path, corpus, load, monkeypatch, documents_per_row):
    """From any row, in the pass or the next, as if it had been read from its beginning; at most a pool and what lies before it in the open
    files is read again, and of rows of JSON not even that."""
    monkeypatch.setattr(reading, "BLOCK", 400)
    settings = {"vocab_size": 300, "sequence_length": 16, "stream": True, "documents": documents_per_row}
    whole = list(itertools.islice(load_corpus("c", **settings, marks=tmp_path / "marks").train, 900))
    assert len(Marks(tmp_path / "marks", "another", writes=True).known) == 0
    rows = [json.loads(line)["row"] for line in (tmp_path / "marks").read_text().splitlines()[1:]]
    assert rows[0] == 0 and len(rows) > 8
    with (tmp_path / "marks").open("a") as file:
        file.write('\n{"row": 5, "rest"')  # cut off by a crash
    read = []
    before = streams.blocks
    monkeypatch.setattr(
        streams, "blocks", lambda file, *rest: read.append((file.name, rest[-1])) or before(file, *rest)
    )
    for begin in (1, rows[3] - 1, rows[3], 500, 880):
        read.clear()
        later = load_corpus("c", **settings, marks=tmp_path / "marks", begin=begin)
        assert later.begins == begin
        assert list(itertools.islice(later.train, 900 - begin)) == whole[begin:], begin
    assert any(span and span[0] > 0 for name, span in read if name == "a.jsonl"), "at a byte, not from its beginning"
    (tmp_path / "marks").unlink()
    again = load_corpus("c", **settings, marks=tmp_path / "marks", begin=880).train
    assert list(itertools.islice(again, 20)) == whole[880:], "without marks it is only slow"


@pytest.mark.parametrize("sizes", [[60, 45, 15], [40] * 6])
def test_a_stream_goes_on_where_files_have_ended(tmp_path, documents, write_jsonl, load, small, monkeypatch, sizes):
    """From each mark, also where an open file has been read to its last byte."""
    monkeypatch.setattr(reading, "BLOCK", 400)
    texts = iter(documents(sum(sizes)))
    files = {
        write_jsonl(tmp_path / f"c/{number}.jsonl", itertools.islice(texts, size)).stat().st_size
        for number, size in enumerate(sizes)
    }
    settings = {"vocab_size": 300, "sequence_length": 16, "stream": True, "documents": "padded"}
    whole = list(itertools.islice(load("c", **settings, marks=tmp_path / "marks").train, 500))
    marks = [json.loads(line) for line in (tmp_path / "marks").read_text().splitlines()[1:]]
    assert any(reached[1] in files for mark in marks for _, reached in mark["place"][3])
    for row in (mark["row"] for mark in marks):
        later = load("c", **settings, marks=tmp_path / "marks", begin=row).train
        assert list(itertools.islice(later, 500 - row)) == whole[row:], row


def test_rows_without_the_column_may_end_a_file(tmp_path, documents, write, load, small, monkeypatch):
    """Read from a byte on, they are passed over as they are when the file is read from its beginning."""
    monkeypatch.setattr(reading, "BLOCK", 400)
    for number in range(4):
        rows = [{"text": text} for text in documents(20 * number + 20)[20 * number :]] + [{"other": "no text"}] * 30
        write(tmp_path / f"c/{number}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    settings = {"vocab_size": 300, "sequence_length": 16, "stream": True, "documents": "padded"}
    whole = list(itertools.islice(load("c", **settings, marks=tmp_path / "marks").train, 300))
    for line in (tmp_path / "marks").read_text().splitlines()[1:]:
        row = json.loads(line)["row"]
        later = load("c", **settings, marks=tmp_path / "marks", begin=row).train
        assert list(itertools.islice(later, 300 - row)) == whole[row:], row


def test_a_stream_leaves_out_what_it_cannot_read(tmp_path, documents, write, load, small, caplog):
    """A file of two hundred, and the rest of a file that is cut; more end it, and so does the only one."""
    texts = documents(260)
    for number in range(259):
        write(tmp_path / f"c/{number:03}.txt", texts[number])
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[200:])
    packed = gzip.compress(rows.encode(), mtime=0)
    write(tmp_path / "c/cut.jsonl.gz", packed[: len(packed) // 2])
    write(tmp_path / "c/latin.txt", "caf\xe9".encode("latin-1"))
    whole, *_ = streams.streams_of(sorted((tmp_path / "c").iterdir()), "text", 0, share=0.05)
    first = numbers_of(whole)
    assert {*range(259)} <= {*first} and len(first) < 259 + 60
    assert numbers_of(whole) == first, "the next time too"
    for name in ("latin.txt", "cut.jsonl.gz"):
        assert caplog.text.count(f"{name} is left out of the stream from where it cannot be read") == 1
    write(tmp_path / "c/other.txt", "\0")
    whole, *_ = streams.streams_of(sorted((tmp_path / "c").iterdir()), "text", 0, share=0.05)
    with pytest.raises(ValueError, match=r"is not (UTF-8 text|readable as json)"):
        numbers_of(whole)
    only, *_ = streams.streams_of([tmp_path / "c/cut.jsonl.gz"], "text", 0, share=0.05)
    with pytest.raises(ValueError, match=r"cut.jsonl.gz is not readable as json"):
        numbers_of(only)


def test_one_text_cannot_be_a_stream(tmp_path, prose, write, load):
    write(tmp_path / "a.txt", prose(500))
    with pytest.raises(ValueError, match=r"a stream must have several documents, got one, a\.txt; set stream to false"):
        load("a.txt", stream=True)
    with pytest.raises(ValueError, match="every file is empty"):
        load(str(write(tmp_path / "b.jsonl", "")), stream=True)
