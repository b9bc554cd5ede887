"""Training and validation rows: their seeds, their cache, their streams."""

import gzip
import itertools
import logging

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from lorank.train.data import collate, load_evaluation, rows, tokenizers

L = 16
"""Tokens of a row, as `load` cuts them."""


def test_validation_from_another_source(tmp_path, prose, documents, write_jsonl, load, tokens, numbers):
    write_jsonl(tmp_path / "a.jsonl", documents(30))
    write_jsonl(tmp_path / "b.jsonl", [f"document {i}\n{prose(30)}" for i in range(100, 110)])
    corpus = load("a.jsonl", validation="b.jsonl", sequence_length=8)
    assert set(numbers(corpus, corpus.train)) == set(range(30))
    assert set(numbers(corpus, corpus.validation)) == set(range(100, 110))
    rows, _ = load_evaluation("b.jsonl", corpus.tokenizer, sequence_length=8)
    assert tokens(rows) == tokens(corpus.validation)
    same = load("a.jsonl", validation="a.jsonl")
    assert not set(numbers(same, same.train)) & set(numbers(same, same.validation))


def test_same_seed_same_corpus_whatever_the_cache(tmp_path, documents, write_jsonl, load, tokens):
    write_jsonl(tmp_path / "a.jsonl", documents(50))
    one, two = (load("a.jsonl", cache_dir=tmp_path / name) for name in ("one", "two"))
    assert one.tokenizer.get_vocab() == two.tokenizer.get_vocab()
    assert tokens(one.train) == tokens(two.train) and tokens(one.validation) == tokens(two.validation)
    assert tokens(load("a.jsonl", seed=1, cache_dir=tmp_path / "one").validation) != tokens(one.validation)


def test_a_second_run_reads_the_cache(tmp_path, monkeypatch, documents, write_jsonl, load, tokens):
    write_jsonl(tmp_path / "a.jsonl", documents(50))
    first = load("a.jsonl")
    monkeypatch.setattr(tokenizers, "_train_tokenizer", None)  # neither may be called
    monkeypatch.setattr(rows, "write_part", None)
    second = load("a.jsonl")
    assert tokens(first.train) == tokens(second.train)
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert {path.name for path in (tmp_path / "xdg").iterdir()} == {"lorank"}
    assert not list((tmp_path / "xdg" / "lorank" / "tokenizers").glob("tmp*"))


def test_nothing_stale_comes_from_the_cache(tmp_path, documents, write, write_jsonl, load, tokens, t5_like):
    name = t5_like(tmp_path / "t5")
    write_jsonl(tmp_path / "a.jsonl", documents(50))
    packed = load("a.jsonl")
    for other in (
        load("a.jsonl", tokenizer=name),
        load("a.jsonl", vocab_size=280),
        load("a.jsonl", sequence_length=8),
    ):
        assert tokens(other.train) != tokens(packed.train)
    assert load("a.jsonl", documents="padded").train.column_names != packed.train.column_names
    assert tokens(load("a.jsonl", seed=7).train) != tokens(packed.train)
    write_jsonl(tmp_path / "a.jsonl", [text.upper() for text in documents(50)])
    assert "DOCUMENT" in packed.tokenizer.decode(tokens(load("a.jsonl", tokenizer=packed.tokenizer.name_or_path).train))
    for text in ("abc " * 30, "xyz " * 30):
        write(tmp_path / "b.txt.gz", gzip.compress(text.encode()))
        corpus = load("b.txt.gz", sequence_length=2)
        assert text.startswith(corpus.tokenizer.decode(tokens(corpus.train)))


def test_an_unwritable_cache_is_a_warning(tmp_path, caplog, documents, write, write_jsonl, load):
    write_jsonl(tmp_path / "a.jsonl", documents(30))
    blocked = write(tmp_path / "file", "in the way") / "cache"
    with caplog.at_level(logging.WARNING):
        corpus = load("a.jsonl", cache_dir=blocked)
    assert len(corpus.train) > 0
    assert f"cannot write to the cache {blocked}" in caplog.text


def test_a_stream_is_shuffled_by_seed_and_never_ends(hub, load, tokens, numbers):
    first, again, other = (load("owner/whole", text_column="body", seed=seed) for seed in (1, 1, 2))
    once = 90 * 40 // L  # rows of about one pass
    rows = [tokens(corpus.train.take(4 * once)) for corpus in (first, again, other)]
    assert rows[0] == rows[1] != rows[2]
    assert tokens(first.train.take(4 * once)) == rows[0]  # the same once more
    order = numbers(first, first.train.take(4 * once))
    assert len(order) > 190
    assert order[:95] != order[95:190]
    assert abs(len(set(order[:95])) - 95) <= 1


def test_order_seed_changes_only_the_order_of_a_stream(hub, load, tokens, numbers):
    one, other = (load("owner/whole", text_column="body", seed=1, order_seed=seed) for seed in (1, 2))
    assert one.hash == other.hash and one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert tokens(one.train.take(40)) != tokens(other.train.take(40))
    assert set(numbers(other, other.train.take(1000))) == set(range(5, 100))


def test_a_stream_resumes_by_skipping(hub, load):
    corpus = load("owner/whole", text_column="body")
    loader = DataLoader(corpus.train, batch_size=4, collate_fn=collate)
    straight = [batch["input_ids"] for batch in itertools.islice(loader, 8)]
    resumed = [batch["input_ids"] for batch in itertools.islice(skip_first_batches(loader, 5), 3)]
    assert torch.equal(torch.cat(straight[5:]), torch.cat(resumed))


def test_local_data_validated_on_a_hub_split_and_the_reverse(hub, tmp_path, documents, write_jsonl, load, numbers):
    write_jsonl(tmp_path / "a.jsonl", documents(30), column="body")
    local = load("a.jsonl", validation="owner/split:en", text_column="body")
    assert set(numbers(local, local.train)) == set(range(30)) and min(numbers(local, local.validation)) == 100
    streamed = load("owner/whole", validation="a.jsonl", text_column="body")
    assert set(numbers(streamed, streamed.train.take(1000))) == set(range(100))


def test_a_corpus_knows_its_largest_id_and_its_hash(tmp_path, documents, write_jsonl, load, tokens):
    source = write_jsonl(tmp_path / "a.jsonl", documents(200))
    corpus, again = load(source), load(source)
    assert corpus.largest_id == max(max(tokens(corpus.train)), max(tokens(corpus.validation)))
    assert corpus.hash == again.hash
    assert corpus.hash != load(source, seed=1).hash, "another order"
    changed = documents(200)
    changed[100] = changed[100].upper()
    assert corpus.hash != load(write_jsonl(tmp_path / "b.jsonl", changed)).hash


def test_fill_is_the_share_of_positions_that_hold_text(tmp_path, documents, write_jsonl, load):
    source = write_jsonl(tmp_path / "short.jsonl", documents(100, words=3))
    padded, packed = (load(source, sequence_length=32, documents=form) for form in ("padded", "packed"))
    mask = np.array(padded.train["attention_mask"])
    assert padded.fill == pytest.approx(mask.mean())
    assert 0 < padded.fill < 0.9
    assert packed.fill == 1.0
