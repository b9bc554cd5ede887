"""Rows made by several processes are those that one makes, and what was finished is not done again."""

import os
import subprocess

import pytest

from lorank.train import tokens
from lorank.train.data import load_tokenizer, rows, sequences, sources, specials
from lorank.train.data.form import Form
from lorank.train.watching import watched_by
from lorank.train.workers import Workers

pytestmark = pytest.mark.usefixtures("forked_processes")

L = 16


@pytest.fixture(autouse=True)
def shards(monkeypatch):
    """Shards of a few documents each, for two workers."""
    monkeypatch.setattr(rows, "SHARD", 2000)
    monkeypatch.setattr(rows, "cores", lambda: 2)
    monkeypatch.setattr(rows, "ROWS", 5 * L)


@pytest.fixture
def documents_of_a_file(tmp_path, documents, prose, write_jsonl):
    """Fifty documents in a random order; one is longer than shards, and one names a special token."""
    texts = documents(50)
    texts[7] = "é" + prose(900)
    texts[8] = "a page about <|endoftext|> and its like"
    write_jsonl(tmp_path / "a.jsonl", texts)
    return sources.open_source("a.jsonl", "text", 0, tmp_path / "cache").train


@pytest.fixture
def tokenizer(prose):
    return load_tokenizer(None, [prose(500)], vocab_size=300)


def one_by_one(documents, form, max_tokens=None):
    """The rows as a stream makes them: the clear way, in one process and without shards."""
    return list(sequences._rows(documents, form, "the text", max_tokens))


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("max_tokens", [None, 200])
def test_shards_change_no_row(tmp_path, monkeypatch, documents_of_a_file, tokenizer, kind, max_tokens):
    form = Form(tokenizer, L, kind)
    expected = one_by_one(documents_of_a_file, form, max_tokens)
    made = rows.make_rows(documents_of_a_file, form, max_tokens, tmp_path / "workers")
    assert list(made) == expected
    assert made.features["input_ids"].feature.dtype == "uint16"
    monkeypatch.setattr(rows, "cores", lambda: 1)
    assert list(rows.make_rows(documents_of_a_file, form, max_tokens, tmp_path / "alone")) == expected
    assert sorted(path.suffix for path in (tmp_path / "alone").iterdir()) == [".arrow", ".lock"]


def test_an_interruption_keeps_what_is_finished(tmp_path, monkeypatch, documents_of_a_file, tokenizer):
    form, before, heard = Form(tokenizer, L, "packed"), Workers.one, []

    def third_time(self, number):
        heard.append(number)
        if len(heard) == 3:
            raise KeyboardInterrupt
        before(self, number)

    monkeypatch.setattr(Workers, "one", third_time)
    with pytest.raises(KeyboardInterrupt):
        rows.make_rows(documents_of_a_file, form, None, tmp_path)
    [folder] = tmp_path.glob("*.parts")
    kept = sorted(path.name for path in folder.glob("[0-9]*.npy"))
    assert kept
    started, work = [], Workers.one
    monkeypatch.setattr(Workers, "one", lambda self, n: started.append(n) or before(self, n))
    assert list(rows.make_rows(documents_of_a_file, form, None, tmp_path)) == one_by_one(documents_of_a_file, form)
    assert work is third_time and not {f"{n:05}.npy" for n in started} & set(kept) and started
    assert not folder.exists()


def test_a_worker_that_dies_is_one_sentence(tmp_path, monkeypatch, documents_of_a_file, tokenizer):
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: start(["false"], **options))
    with pytest.raises(OSError, match=r"a process that worked in .* died \(exit code 1\); is there enough memory"):
        rows.make_rows(documents_of_a_file, Form(tokenizer, L, "packed"), None, tmp_path)


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, documents_of_a_file, tokenizer):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(rows, "cores", lambda: 1)
    with pytest.raises(OSError, match="the disk of the cache .* is full; free some space or set XDG_CACHE_HOME"):
        rows.make_rows(documents_of_a_file, Form(tokenizer, L, "packed"), None, tmp_path / "cache" / "rows")
    assert not [*tmp_path.rglob(".*")]


def test_tokenising_tells_how_far_it_is(tmp_path, documents_of_a_file, tokenizer):
    heard = []
    with watched_by(lambda what, done, total, unit: heard.append((what, done, total, unit))):
        rows.make_rows(documents_of_a_file, Form(tokenizer, L, "packed"), None, tmp_path)
    size = sum(len(text.encode()) for text in documents_of_a_file["text"])
    amounts = [done for what, done, total, unit in heard if (what, total, unit) == ("tokenising", size, "B")]
    assert amounts == sorted(amounts) and amounts[-1] == size
    packed = [(done, total) for what, done, total, unit in heard if (what, unit) == ("packing", "tokens")]
    assert len(amounts) + len(packed) == len(heard) and len(packed) > 1 and packed == sorted(packed)
    done, total = packed[-1]
    assert done <= total < 1.5 * done


@pytest.mark.parametrize("cut", [None, 5])
def test_a_worker_tokenises_as_transformers_does(tmp_path, t5_like, prose, tokenizer, cut):
    texts = ["", " the  cat\n", "日本 é <|endoftext|> </s>", prose(30)]
    for one in (tokenizer, load_tokenizer("bytes"), load_tokenizer(t5_like(tmp_path / "t5"))):
        form = Form(one, L if cut is None else cut, "packed" if cut is None else "padded")
        rules = specials.rules_of(one, cut)
        assert rules is not None
        assert [list(ids) for ids in tokens.encoder(rules, cut is not None)(texts)] == form.encode(texts)


def test_a_large_vocabulary_takes_four_bytes(tokenizer, monkeypatch):
    form = Form(tokenizer, L, "packed")
    assert form.dtype == "uint16"
    for size, dtype in ((1 << 16, "uint16"), ((1 << 16) + 1, "int32")):
        monkeypatch.setattr("lorank.train.data.form.rows_of", lambda _, size=size: size)
        assert form.dtype == dtype
