"""Documents of files in the cache: by what the files contain, and the same whether one process reads them or several."""

import json
import os
import subprocess

import pytest

from lorank.train import reading, texts
from lorank.train.data import documents
from lorank.train.data.documents import read_documents
from lorank.train.reading import Tally
from lorank.train.watching import watched_by
from lorank.train.workers import Workers

pytestmark = pytest.mark.usefixtures("forked_processes")


def test_the_cache_knows_files_by_what_they_contain(tmp_path, write, monkeypatch):
    """Neither the time of change nor the size tells that a file was written anew; a name or place changes nothing."""
    cache = tmp_path / "cache"
    for word in ("cat", "dog"):
        file = write(tmp_path / "a.txt", f"the {word} sat")
        os.utime(file, (1_600_000_000, 1_600_000_000))
        found, *_ = read_documents([file], "text", cache)
        assert found["text"][:] == [f"the {word} sat"]
    moved = write(tmp_path / "deep" / "b.txt", "the dog sat")
    monkeypatch.setattr(texts, "blocks", None)
    again, tally, *_ = read_documents([moved], "text", cache)
    assert again["text"][:] == ["the dog sat"] and (tally.documents, tally.bytes) == (1, 11)
    assert again._fingerprint == found._fingerprint


def test_only_groups_with_changes_are_read_again(tmp_path, write, monkeypatch):
    monkeypatch.setattr(documents, "GROUP", 10)
    shards = [write(tmp_path / f"{i}.txt", f"document {i}") for i in range(5)]
    read_documents(shards, "text", tmp_path / "cache")
    write(shards[2], "changed")
    read, blocks = [], texts.blocks
    monkeypatch.setattr(texts, "blocks", lambda file, *rest: read.append(file.name) or blocks(file, *rest))
    found, tally, *_ = read_documents(shards, "text", tmp_path / "cache")
    assert found["text"][:] == ["document 0", "document 1", "changed", "document 3", "document 4"]
    assert "2.txt" in read and not {"0.txt", "1.txt", "4.txt"} & set(read) and tally.files == 5


def test_a_file_that_changes_while_it_is_read_is_not_cached(tmp_path, write, monkeypatch):
    file, blocks = write(tmp_path / "a.txt", "before"), texts.blocks

    def slow(*arguments):
        yield from blocks(*arguments)
        file.write_text("after all")

    monkeypatch.setattr(texts, "blocks", slow)
    with pytest.raises(OSError, match="a.txt changed while it was read"):
        read_documents([file], "text", tmp_path / "cache")
    assert not [*(tmp_path / "cache").rglob("*.arrow")]


def test_a_full_disk_is_one_sentence(tmp_path, write, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="the disk of the cache .* is full; free some space or set XDG_CACHE_HOME"):
        read_documents([write(tmp_path / "a.txt", "a")], "text", tmp_path / "cache")


@pytest.fixture
def parts(monkeypatch):
    """Parts of some lines, for two workers."""
    monkeypatch.setattr(documents, "PART", 400)
    monkeypatch.setattr(documents, "FEW_BYTES", 400)
    monkeypatch.setattr(documents, "cores", lambda: 2)


def rows(count, other=()):
    """Lines of JSON with empty documents, an escape and other columns; `other` replaces lines."""
    made = [json.dumps({"id": [i], "text": "" if i % 9 == 8 else f"dócument {i}\n" * (i % 5)}) for i in range(count)]
    for at, line in dict(other).items():
        made[at] = line
    return "\n".join(made) + "\n"


def read_both(files, cache, monkeypatch, caplog):
    """(documents, counts, warnings) of parts and of one process, or the error instead."""
    found = []
    for name, size in (("parts", documents.PART), ("whole", 1 << 30)):
        caplog.clear()
        monkeypatch.setattr(documents, "PART", size)
        try:
            made, tally, *_ = read_documents(files, "text", cache / name)
            found.append((made["text"][:], tally, made._fingerprint, caplog.messages[:]))
        except (ValueError, OSError) as error:
            found.append((type(error), str(error)))
    return found


BAD = {10: "{", 11: "[]", 90: '{"text": "half \\ud800"}'}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, []),
        ({299: '{"text": "torn'}, ["left out 1 of 300 lines, which cannot be read (line 300: Invalid control"]),
        (BAD, ["left out 3 of 300 lines, which cannot be read (line 11: Expecting"]),
        ({i: "{" for i in range(100, 130)}, "is not readable as json (line 101: Expecting"),
        ({150: '{"text": 5}'}, "must contain text, got a number in row 151"),
        ({i: '{"body": "x"}' for i in range(300)}, "has no column 'text'"),
        ({i: '{"body": "x"}' for i in range(150, 300)}, []),
        ({7: '{"text": "' + "long " * 300 + '"}'}, []),
    ],
)
def test_parts_of_a_file_are_read_as_the_whole(tmp_path, write, parts, monkeypatch, caplog, other, said):
    if other is not BAD:
        monkeypatch.setattr(documents, "cores", lambda: 1)  # parts all the same, and no time for processes to start
    files = [write(tmp_path / "a.txt", "first"), write(tmp_path / "b.jsonl", rows(300, other))]
    files += [write(tmp_path / "c.txt", "last")]
    by_parts, whole = read_both(files, tmp_path, monkeypatch, caplog)
    assert by_parts == whole
    if isinstance(said, str):
        assert said in whole[1]
    else:
        assert len(whole[3]) == len(said) and all(map(str.__contains__, whole[3], said))
        assert whole[0][0] == "first" and whole[0][-1] == "last" and whole[1].files == 3
    kept = {path.name for path in (tmp_path / "parts/documents").iterdir()}
    assert not [name for name in kept if name.startswith(".")], kept


def test_every_file_is_cut_at_ends_of_lines(tmp_path, write):
    text = rows(100).replace("\n", "\r\n").encode()
    file = write(tmp_path / "a.jsonl", text)
    cuts = reading.cuts_of(file, 300)
    assert len(cuts) > 10 and cuts[0] == 0 and cuts[-1] == len(text)
    assert all(text[at - 1 : at] == b"\n" for at in cuts[1:])
    for name, data in (("a.txt", text), ("b.json", b"[" + text), ("c.jsonl", b"x" * 2000), ("d.jsonl", b"")):
        assert reading.cuts_of(write(tmp_path / name, data), 300) == [0, len(data)]


def test_an_interruption_keeps_the_parts_that_are_finished(tmp_path, write, parts, monkeypatch):
    file, one, asked = write(tmp_path / "a.jsonl", rows(300)), Workers.one, []

    def third_time(self, number):
        asked.append(number)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return one(self, number)

    monkeypatch.setattr(Workers, "one", third_time)
    with pytest.raises(KeyboardInterrupt):
        read_documents([file], "text", tmp_path / "cache")
    kept = {path.stem for path in (tmp_path / "cache").rglob("*.arrow")}
    assert kept
    asked.clear()
    monkeypatch.setattr(Workers, "one", lambda self, number: asked.append(number) or one(self, number))
    heard = []
    with watched_by(lambda what, done, total, unit: heard.append((what, done, total))):
        found, tally, *_ = read_documents([file], "text", tmp_path / "cache")
    assert tally == Tally(files=1, documents=len(found), bytes=tally.bytes, empty=300 - len(found))
    assert len(asked) + len(kept) == len(found.cache_files)
    size = file.stat().st_size
    assert heard[-1] == ("reading", size, size)


def test_a_worker_that_fails_is_one_sentence(tmp_path, write, parts, monkeypatch):
    file, start = write(tmp_path / "a.jsonl", rows(300)), subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: start(["false"], **options))
    with pytest.raises(OSError, match=r"a process that worked in .* died \(exit code 1\)"):
        read_documents([file], "text", tmp_path / "cache")
