"""Documents as rows, packed and padded, and rows as batches."""

import itertools
import math

import datasets
import pytest
import torch

from lorank.train.data import collate, end_of, form, load_evaluation, load_tokenizer, sequences, sources

L = 16
"""Tokens of a row, as `load` cuts them."""


@pytest.mark.parametrize("piece", [1 << 20, 50])
def test_packing_loses_nothing_but_the_last_remainder(
    tmp_path, monkeypatch, piece, documents, write_jsonl, load, tokens
):
    monkeypatch.setattr("lorank.train.tokens.PIECE", piece)
    monkeypatch.setattr("lorank.train.tokens.BATCH", 200)  # many batches
    write_jsonl(tmp_path / "a.jsonl", documents(100))
    corpus = load("a.jsonl")
    eos = corpus.tokenizer.eos_token_id
    opened = sources.open_source("a.jsonl", "text", 42, tmp_path / "cache")
    for rows, source in ((corpus.train, opened.train), (corpus.validation, opened.validation)):
        packed, text = tokens(rows), "".join(source["text"])
        assert all(len(row["input_ids"]) == L for row in rows)
        assert rows.column_names == ["input_ids"]
        assert text.startswith(corpus.tokenizer.decode([t for t in packed if t != eos]))
        if piece > 50:  # else tokens end with pieces
            whole = [t for text in source["text"] for t in [*corpus.tokenizer(text)["input_ids"], eos]]
            assert packed == whole[: len(whole) // L * L]
            if rows is corpus.validation:
                assert corpus.validation_size.per_token() == len(text) / len(whole)


def test_bytes_per_token_counts_bytes(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", ["ä" * 20, "ö" * 20])
    tokenizer = load_tokenizer(None, [], vocab_size=258)
    _, size = load_evaluation("a.jsonl", tokenizer, sequence_length=L)
    assert size.per_token() == 40 / 41


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_bytes_are_those_of_the_tokens_that_are_read(tmp_path, form, documents, write_jsonl, load):
    """Half of the documents are in letters of three bytes: over all of them, a token is not what it is in the first."""
    write_jsonl(tmp_path / "a.jsonl", [text if i % 2 else "語" * 30 for i, text in enumerate(documents(60))])
    corpus = load("a.jsonl", documents=form)
    rows, size = load_evaluation("a.jsonl", corpus.tokenizer, sequence_length=L, documents=form, max_tokens=200)
    for start, stop in ((0, 3), (0, 8), (3, 8)):
        before, read = (
            sum(sum(row.get("attention_mask", [1] * L)) - 1 for row in rows.select(range(*some)))
            for some in ((0, start), (start, stop))
        )
        ids = [
            [t for t, label in zip(row["input_ids"], row.get("labels", row["input_ids"]), strict=True) if label >= 0]
            for row in rows.select(range(start, stop))
        ]
        text = corpus.tokenizer.decode([t for row in ids for t in row], skip_special_tokens=True)
        assert size.per_token(read, after=before) == pytest.approx(len(text.encode()) / sum(map(len, ids)), rel=0.05)
    assert size.per_token(1, after=10**9) == size.per_token()


def test_bytes_of_padded_rows_are_those_of_the_text_they_hold(tmp_path, prose, write_jsonl, load):
    """A document ten times longer than a row counts as the row's worth of text that it gives."""
    words = [prose(300, seed) for seed in range(40)]
    source = write_jsonl(tmp_path / "long.jsonl", words)
    padded, packed = (load(source, sequence_length=16, documents=form) for form in ("padded", "packed"))
    rows = padded.validation["input_ids"]
    held = "".join(padded.tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    assert padded.validation_size.per_token() == pytest.approx(len(held.encode()) / sum(map(len, rows)))
    # the same kind of text: the same bytes per token, where whole documents over cut rows would give many times more
    assert padded.validation_size.per_token() == pytest.approx(packed.validation_size.per_token(), rel=0.1)


def test_padded_rows(tmp_path, write_jsonl, load):
    write_jsonl(tmp_path / "a.jsonl", ["long " * 50, "ab", "c"] * 10)
    corpus = load("a.jsonl", documents="padded", vocab_size=258)
    eos, pad = corpus.tokenizer.eos_token_id, corpus.tokenizer.pad_token_id
    rows = [*corpus.train, *corpus.validation]
    assert len(rows) == 30 and corpus.description.endswith(f", {len(corpus.train)} sequences to train on")
    for row in rows:
        ids, mask, labels = row["input_ids"], row["attention_mask"], row["labels"]
        kept = sum(mask)
        assert len(ids) == len(labels) == L and mask == [1] * kept + [0] * (L - kept)
        assert labels == ids[:kept] + [-100] * (L - kept)
        assert ids[kept:] == [pad] * (L - kept)
        assert kept == L or ids[kept - 1] == eos
    assert {sum(row["attention_mask"]) for row in rows} == {L, 3, 2}


def test_a_tokenizer_that_ends_texts_itself(tmp_path, prose, write_jsonl, load, tokens, t5_like):
    write_jsonl(tmp_path / "a.jsonl", ["cat sat", prose(40)] * 10)
    name = t5_like(tmp_path / "t5")
    padded = load("a.jsonl", tokenizer=name, documents="padded")
    for row in [*padded.train, *padded.validation]:
        ids = row["input_ids"]
        assert ids.count(1) == 1 and ids[sum(row["attention_mask"]) - 1] == 1  # truncated ones too
    packed = load("a.jsonl", tokenizer=name)
    assert max(len(list(run)) for key, run in itertools.groupby(tokens(packed.train)) if key == 1) == 1
    assert tokens(packed.train).count(1) > 0


def test_without_a_padding_token_eos_pads(tmp_path, write_jsonl, load, t5_like):
    write_jsonl(tmp_path / "a.jsonl", ["cat sat"] * 30)
    corpus = load("a.jsonl", tokenizer=t5_like(tmp_path / "t5", pad=False), documents="padded")
    assert corpus.tokenizer.pad_token_id is None
    row = corpus.train[0]
    assert row["input_ids"][2:] == [1] * (L - 2)
    assert row["labels"][2:] == [1] + [-100] * (L - 3)


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_validation_stops_at_its_cap(tmp_path, form, documents, write_jsonl, load):
    write_jsonl(tmp_path / "a.jsonl", documents(300))
    rows = load("a.jsonl", documents=form, validation_tokens=40).validation
    assert len(rows) == math.ceil(40 / (L - 1))


def test_separate_rows_are_packed_rows_with_positions(tmp_path, documents, write_jsonl, load, tokens):
    """In a random order of documents, each token's place in its document, or in its row if the document began before it."""
    write_jsonl(tmp_path / "a.jsonl", documents(60, words=4))
    packed, separate = (load("a.jsonl", documents=form) for form in ("packed", "separate"))
    assert tokens(packed.train) == tokens(separate.train) and separate.description == packed.description
    end = end_of("separate", packed.tokenizer)
    assert end == packed.tokenizer.eos_token_id and end_of("packed", packed.tokenizer) is None
    batch = collate(list(separate.train), end=end)
    for ids, places, labels in zip(
        *(batch[name].tolist() for name in ("input_ids", "position_ids", "labels")), strict=True
    ):
        place = 0
        for i, token in enumerate(ids):
            place = 0 if i == 0 or ids[i - 1] == end else place + 1
            assert places[i] == place and labels[i] == (token if place else -100)


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_collate(tmp_path, form, documents, write_jsonl, load):
    write_jsonl(tmp_path / "a.jsonl", documents(30))
    corpus = load("a.jsonl", documents=form)
    rows = [corpus.train[i] for i in range(4)]
    batch = collate(rows)
    assert set(batch) == {"input_ids", "labels"} | ({"attention_mask"} if form == "padded" else set())
    assert all(x.dtype == torch.int64 and x.shape == (4, L) for x in batch.values())
    assert batch["input_ids"].tolist() == [row["input_ids"] for row in rows]
    assert batch["labels"].tolist() == [row.get("labels", row["input_ids"]) for row in rows]


def test_an_id_beyond_the_vocabulary_is_refused(hub, load):
    corpus = load("owner/whole", text_column="body")
    rows = list(itertools.islice(corpus.train, 4))
    largest = max(max(row["input_ids"]) for row in rows)
    collate(rows, largest + 1)
    with pytest.raises(
        ValueError, match=f"vocab_size must be above {largest}, a token id of the tokenizer, got {largest}"
    ):
        collate(rows, largest)


def test_a_stream_with_too_little_text_is_refused(monkeypatch, tmp_path, prose, load):
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "x"}] * 5))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDatasetDict({"train": stream}))
    tokenizer = load_tokenizer(None, [prose(50)], vocab_size=300)
    with pytest.raises(ValueError, match="too few"):
        load("owner/name", tokenizer=tokenizer.name_or_path)
    packed = form.Form(tokenizer, L, "packed")
    with pytest.raises(ValueError, match="the text has 10 tokens, too few"):
        next(iter(sequences.make_sequences(stream, packed, "the text", tmp_path)))
