"""Sources, split, tokenizer, sequences, caches, and a sentence for everything that can be wrong with them."""

import gzip
import itertools
import json
import logging
import math
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import skip_first_batches
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import AutoConfig, PreTrainedTokenizerFast

from lorank.train.data import (
    Corpus,
    collate,
    load_corpus,
    load_evaluation,
    load_tokenizer,
    sequences,
    sources,
    tokenizers,
)

L = 16
WORDS = str.split("the cat sat on a mat and saw red green blue fish swim over every hill in one wild night")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test touches the home folder or the network, or depends on where it runs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)


def prose(words: int, seed: int = 0) -> str:
    """Lines of ten random words, `words` in all."""
    chosen = np.random.default_rng(seed).choice(WORDS, words)
    return "".join(" ".join(line) + "\n" for line in np.split(chosen, range(10, words, 10)))


def documents(count: int, words: int = 30) -> list[str]:
    return [f"document {i}\n{prose(words, seed=i)}" for i in range(count)]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    return write(path, "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))


def load(source: str | Path, **options):
    return load_corpus(str(source), **{"vocab_size": 300, "sequence_length": L, **options})


def tokens(rows) -> list[int]:
    return [token for row in rows for token in row["input_ids"]]


def numbers(corpus: Corpus, rows) -> list[int]:
    """Which of `documents` occur in packed rows."""
    return [int(n) for n in re.findall(r"document (\d+)\n", corpus.tokenizer.decode(tokens(rows)))]


# ----------------------------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------------------------


def test_embedded_is_the_standard_library_without_its_tests(monkeypatch, tmp_path):
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

    rows, bytes_per_token = load_evaluation("embedded", corpus.tokenizer, sequence_length=L)
    assert tokens(rows) == tokens(corpus.validation)
    assert bytes_per_token == corpus.validation_bytes_per_token


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.gz"])
def test_every_suffix_gives_the_same_documents(tmp_path, suffix):
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
    elif kind == ".json":
        write(folder / "all.json", json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)]))
    else:
        plain = write_jsonl(tmp_path / "plain.jsonl", texts).read_bytes()
        write(folder / f"all{suffix}", gzip.compress(plain) if kind != suffix else plain)
    write(folder / "notes.csv", "not,read\n")
    write(folder / ".hidden.txt", "not read\n")
    opened = sources.open_source(str(folder), "text", 0, tmp_path / "cache")
    assert sorted(opened.whole["text"]) == sorted(texts)
    assert opened.description == f"{folder}: 20 documents, {sum(map(len, texts)) / 1000:.1f} kB"


def test_glob_mixed_kinds_and_columns_that_differ(tmp_path):
    write(tmp_path / "mix" / "a.txt", "from txt")
    write(tmp_path / "mix" / "empty.txt", "")
    (tmp_path / "mix" / "gone.txt").symlink_to("nowhere")
    write(tmp_path / "mix" / "b.jsonl", '{"text": "from b", "x": 1}\n{"text": null, "x": 1}\n')
    write(tmp_path / "mix" / "c.jsonl", '{"y": [2], "text": "from c"}\n{"y": [2], "text": ""}\n')
    opened = sources.open_source("mix/*", "text", 0, tmp_path / "cache")
    assert sorted(opened.whole["text"]) == ["from b", "from c", "from txt"]


def test_text_column(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", documents(30), column="body")
    corpus = load("a.jsonl", text_column="body")
    assert set(numbers(corpus, corpus.train)) < set(range(30))


# ----------------------------------------------------------------------------------------------------------
# Split
# ----------------------------------------------------------------------------------------------------------


def test_no_document_is_on_both_sides_and_none_is_lost(tmp_path):
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
def test_validation_takes_no_large_document_and_leaves_one_to_train_on(sizes, held_out):
    texts = datasets.Dataset.from_dict({"text": ["x" * size for size in sizes]})
    train, validation = sources._split(texts, np.array(sizes))
    assert [len(text) for text in validation["text"]] == held_out
    assert len(train) == len(sizes) - len(held_out)


@pytest.mark.parametrize("text", [prose(500), "x" * 1000])
def test_a_single_document_is_cut_at_a_line(tmp_path, text):
    write(tmp_path / "a.txt", text)
    opened = sources.open_source("a.txt", "text", 0, tmp_path / "cache")
    (train,), (validation,) = opened.train["text"], opened.validation["text"]
    assert train + validation == text
    assert 0.05 * len(text) <= len(validation) <= 0.1 * len(text)
    assert train.endswith("\n") or "\n" not in text


def test_validation_from_another_source(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", documents(30))
    write_jsonl(tmp_path / "b.jsonl", [f"document {i}\n{prose(30)}" for i in range(100, 110)])
    corpus = load("a.jsonl", validation="b.jsonl", sequence_length=8)
    assert set(numbers(corpus, corpus.train)) == set(range(30))
    assert set(numbers(corpus, corpus.validation)) == set(range(100, 110))
    rows, _ = load_evaluation("b.jsonl", corpus.tokenizer, sequence_length=8)
    assert tokens(rows) == tokens(corpus.validation)
    same = load("a.jsonl", validation="a.jsonl")
    assert not set(numbers(same, same.train)) & set(numbers(same, same.validation))


# ----------------------------------------------------------------------------------------------------------
# Sequences
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1 << 20, 50])
def test_packing_loses_nothing_but_the_last_remainder(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tokenizers, "PIECE", piece)
    monkeypatch.setattr(sequences, "BATCH", 200)  # many batches
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
                assert corpus.validation_bytes_per_token == len(text) / len(whole)


def test_pieces_make_up_the_text(monkeypatch):
    monkeypatch.setattr(tokenizers, "PIECE", 10)
    for text in ("", "short", "x" * 10, "x" * 25, "a line\nanother line\nlast", "0123456789\n0"):
        pieces = list(tokenizers.pieces_of(text))
        assert "".join(piece.text for piece in pieces) == text
        assert max(len(piece.text) for piece in pieces) <= 10
        assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert tokenizers.pieces_of("a line\nanother line").__next__().text == "a line\n"


def test_bytes_per_token_counts_bytes(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["ä" * 20, "ö" * 20])
    tokenizer = load_tokenizer(None, [], vocab_size=258)
    _, ratio = load_evaluation("a.jsonl", tokenizer, sequence_length=L)
    assert ratio == 40 / 41


def test_padding(tmp_path):
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


def t5_like(folder: Path, *, pad: bool = True, eos: bool = True) -> str:
    """A word tokenizer that, as T5's, puts an end of sequence behind every text itself."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(set(WORDS))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if eos:
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>"} if pad else {}
    special |= {"eos_token": "</s>"} if eos else {}
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_that_ends_texts_itself(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["cat sat", prose(40)] * 10)
    name = t5_like(tmp_path / "t5")
    padded = load("a.jsonl", tokenizer=name, documents="padded")
    for row in [*padded.train, *padded.validation]:
        ids = row["input_ids"]
        assert ids.count(1) == 1 and ids[sum(row["attention_mask"]) - 1] == 1  # truncated ones too
    packed = load("a.jsonl", tokenizer=name)
    assert max(len(list(run)) for key, run in itertools.groupby(tokens(packed.train)) if key == 1) == 1
    assert tokens(packed.train).count(1) > 0


def test_without_a_padding_token_eos_pads_and_is_not_learnt_there(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["cat sat"] * 30)
    corpus = load("a.jsonl", tokenizer=t5_like(tmp_path / "t5", pad=False), documents="padded")
    assert corpus.tokenizer.pad_token_id is None
    row = corpus.train[0]
    assert row["input_ids"][2:] == [1] * (L - 2)
    assert row["labels"][2:] == [1] + [-100] * (L - 3)


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_validation_stops_at_its_cap(tmp_path, form):
    write_jsonl(tmp_path / "a.jsonl", documents(300))
    rows = load("a.jsonl", documents=form, validation_tokens=40).validation
    assert len(rows) == math.ceil(40 / (L - 1))


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_collate(tmp_path, form):
    write_jsonl(tmp_path / "a.jsonl", documents(30))
    corpus = load("a.jsonl", documents=form)
    rows = [corpus.train[i] for i in range(4)]
    batch = collate(rows)
    assert set(batch) == {"input_ids", "labels"} | ({"attention_mask"} if form == "padded" else set())
    assert all(x.dtype == torch.int64 and x.shape == (4, L) for x in batch.values())
    assert batch["input_ids"].tolist() == [row["input_ids"] for row in rows]
    assert batch["labels"].tolist() == [row.get("labels", row["input_ids"]) for row in rows]


# ----------------------------------------------------------------------------------------------------------
# Determinism and caches
# ----------------------------------------------------------------------------------------------------------


def test_same_seed_same_corpus_whatever_the_cache(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", documents(50))
    one, two = (load("a.jsonl", cache_dir=tmp_path / name) for name in ("one", "two"))
    assert one.tokenizer.get_vocab() == two.tokenizer.get_vocab()
    assert tokens(one.train) == tokens(two.train) and tokens(one.validation) == tokens(two.validation)
    assert tokens(load("a.jsonl", seed=1, cache_dir=tmp_path / "one").validation) != tokens(one.validation)


def test_a_second_run_reads_the_cache(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", documents(50))
    first = load("a.jsonl")
    monkeypatch.setattr(tokenizers, "_train_tokenizer", None)  # neither may be called
    monkeypatch.setattr(sequences, "_packed", None)
    second = load("a.jsonl")
    assert tokens(first.train) == tokens(second.train)
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert {path.name for path in (tmp_path / "xdg").iterdir()} == {"lorank"}
    assert not list((tmp_path / "xdg" / "lorank" / "tokenizers").glob("tmp*"))


def test_nothing_stale_comes_from_the_cache(tmp_path):
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


def test_a_tokenizer_in_use_is_known_by_what_it_does(tmp_path):
    tokenizer = load_tokenizer(None, [prose(100)], vocab_size=300)
    before = tokenizers.identity(tokenizer)
    tokenizer(["some text"] * 2, truncation=True, max_length=3, padding="max_length")
    assert tokenizers.identity(tokenizer) == before
    assert tokenizers.identity(load_tokenizer(None, [prose(100)], vocab_size=280)) != before


def test_an_unwritable_cache_is_a_warning(tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", documents(30))
    blocked = write(tmp_path / "file", "in the way") / "cache"
    with caplog.at_level(logging.WARNING):
        corpus = load("a.jsonl", cache_dir=blocked)
    assert len(corpus.train) > 0
    assert f"cannot write to the cache {blocked}" in caplog.text


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen3", "llama"])
def test_a_folder_with_a_model_alone_has_no_tokenizer(kind, tmp_path):
    """transformers makes one without a vocabulary for some types, which reads every text as none."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_disk_that_is_full_when_the_tokenizer_is_kept(monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    assert len(load_tokenizer(None, [prose(100)], vocab_size=300)) == 300
    assert "could not be cached" in caplog.text and "No space left" in caplog.text


def test_nothing_is_printed_and_the_users_settings_stay(tmp_path, capfd):
    write_jsonl(tmp_path / "a.jsonl", documents(30))
    write(tmp_path / "bad.jsonl", '{"text": "x"\n{{')
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    load("a.jsonl")
    with pytest.raises(ValueError):
        load("bad.jsonl")
    assert not datasets.are_progress_bars_disabled() and datasets.logging.get_verbosity() == level
    assert capfd.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------


def test_trained_tokenizer():
    read = []

    def texts():
        read.append(True)
        yield prose(2000)

    tokenizer = load_tokenizer(None, texts, vocab_size=300, texts_name="prose")
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>" and tokenizer.pad_token == "<|pad|>"
    for text in ("the cat", " é €\n\tx  ", "日本"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    again = load_tokenizer(None, texts, vocab_size=300, texts_name="prose")
    assert again.get_vocab() == tokenizer.get_vocab() and len(read) == 1
    assert load_tokenizer(None, [prose(2000)], vocab_size=300).get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_learns_from_a_limited_sample(monkeypatch):
    monkeypatch.setattr(tokenizers, "TOKENIZER_CHARACTERS", 50)
    monkeypatch.setattr(tokenizers, "PIECE", 20)
    assert sum(map(len, tokenizers.first_pieces(itertools.repeat("x" * 7), 50))) == 56
    assert len(load_tokenizer(None, itertools.repeat(prose(20)), vocab_size=300)) <= 300


# ----------------------------------------------------------------------------------------------------------
# Hub
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub with two data sets; loaders of files work as ever."""
    whole = datasets.load_dataset

    def rows(first, last):
        for i in range(first, last):
            yield {"body": f"document {i}\n{prose(30, seed=i)}", "url": f"example.org/{i}"}

    def stream(first, last):
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"first": first, "last": last})

    def load_dataset(path, name=None, **options):
        if path not in ("owner/split", "owner/whole"):
            return whole(path, name, **options)
        assert options == {"streaming": True} and name == ("en" if path == "owner/split" else None)
        splits = {"train": stream(0, 100)}
        if path == "owner/split":
            splits["validation"] = stream(100, 120)
        return datasets.IterableDatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("name, held_out", [("owner/split:en", range(100, 120)), ("owner/whole", range(5))])
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_hub(hub, name, held_out, form):
    corpus = load(name, text_column="body", documents=form)
    assert isinstance(corpus.train, datasets.IterableDataset)
    assert isinstance(corpus.validation, datasets.Dataset)
    assert corpus.description == f"{name}: streamed"
    assert corpus.train.column_names == corpus.validation.column_names
    found = numbers(corpus, corpus.validation)
    assert found == list(held_out)[: len(found)] and len(found) >= len(held_out) - 1
    trained = set(numbers(corpus, corpus.train.take(1000)))
    assert trained == set(range(100)) - set(held_out)
    rows, ratio = load_evaluation(name, corpus.tokenizer, sequence_length=L, documents=form, text_column="body")
    assert tokens(rows) == tokens(corpus.validation) and ratio == corpus.validation_bytes_per_token


def test_a_stream_is_shuffled_by_seed_and_never_ends(hub):
    first, again, other = (load("owner/whole", text_column="body", seed=seed) for seed in (1, 1, 2))
    once = 90 * 40 // L  # rows of about one pass
    rows = [tokens(corpus.train.take(4 * once)) for corpus in (first, again, other)]
    assert rows[0] == rows[1] != rows[2]
    assert tokens(first.train.take(4 * once)) == rows[0]  # the same once more
    order = numbers(first, first.train.take(4 * once))
    assert len(order) > 190
    assert order[:95] != order[95:190]
    assert abs(len(set(order[:95])) - 95) <= 1


def test_a_stream_is_read_in_another_order_with_the_same_words_and_the_same_text_held_out(hub):
    one, other = (load("owner/whole", text_column="body", seed=1, order_seed=seed) for seed in (1, 2))
    assert one.hash == other.hash and one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert tokens(one.train.take(40)) != tokens(other.train.take(40))
    assert set(numbers(other, other.train.take(1000))) == set(range(5, 100))


def test_a_stream_resumes_by_skipping(hub):
    corpus = load("owner/whole", text_column="body")
    loader = DataLoader(corpus.train, batch_size=4, collate_fn=collate)
    straight = [batch["input_ids"] for batch in itertools.islice(loader, 8)]
    resumed = [batch["input_ids"] for batch in itertools.islice(skip_first_batches(loader, 5), 3)]
    assert torch.equal(torch.cat(straight[5:]), torch.cat(resumed))


def test_the_tokenizer_of_a_stream_is_found_without_reading(hub, monkeypatch):
    first = load("owner/whole", text_column="body").tokenizer
    monkeypatch.setattr(tokenizers, "_train_tokenizer", None)
    assert load("owner/whole", text_column="body").tokenizer.get_vocab() == first.get_vocab()


def test_local_data_validated_on_a_hub_split_and_the_reverse(hub, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", documents(30), column="body")
    local = load("a.jsonl", validation="owner/split:en", text_column="body")
    assert set(numbers(local, local.train)) == set(range(30)) and min(numbers(local, local.validation)) == 100
    streamed = load("owner/whole", validation="a.jsonl", text_column="body")
    assert set(numbers(streamed, streamed.train.take(1000))) == set(range(100))


# ----------------------------------------------------------------------------------------------------------
# One sentence for everything that is wrong
# ----------------------------------------------------------------------------------------------------------


def wrong_files(tmp_path: Path) -> None:
    write(tmp_path / "table.csv", "a,b\n")
    write(tmp_path / "folder" / "table.csv", "a,b\n")
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
            "table.csv",
            {},
            ValueError,
            r"data files must end in .txt, .md, .py, .jsonl, .json, .parquet.*, got table.csv",
        ),
        (
            "folder",
            {},
            ValueError,
            "folder contains no readable file; looked for .txt, .md, .py, .jsonl",
        ),
        ("folder/*.csv", {}, ValueError, r"folder/\*.csv contains no readable file; looked for .txt"),
        ("nowhere/*.txt", {}, ValueError, r"nowhere/\*.txt contains no readable file"),
        ("empty", {}, ValueError, "empty contains no text: every document is empty"),
        ("empty.jsonl", {}, ValueError, "empty.jsonl contains no text"),
        ("latin.txt", {}, ValueError, "latin.txt is not UTF-8 text .*position 3"),
        ("some", {}, ValueError, "some/b.txt is not UTF-8 text"),
        ("broken.jsonl", {}, ValueError, "broken.jsonl is not readable as json .*; repair it or leave it out"),
        ("broken.parquet", {}, ValueError, "broken.parquet is not readable as parquet"),
        ("numbers.jsonl", {}, ValueError, "column 'text' of numbers.jsonl must contain text, got int64"),
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
            "documents must be 'packed' or 'padded', got 'paked'",
        ),
        ("good.jsonl", {"sequence_length": 1}, ValueError, "sequence_length must be at least 2, got 1"),
        ("good.jsonl", {"vocab_size": 257}, ValueError, "vocab_size must be at least 258 .*, got 257"),
        ("good.jsonl", {"tokenizer": "./nowhere"}, OSError, r"\./nowhere: no tokenizer could be loaded"),
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
def test_error(hub, tmp_path, source, options, error, message):
    wrong_files(tmp_path)
    t5_like(tmp_path / "no-eos", eos=False)
    with pytest.raises(error, match=message) as raised:
        load(source, **options)
    assert "\n" not in str(raised.value)


def test_a_hub_data_set_without_train_split(monkeypatch):
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


def test_a_stream_without_enough_text_says_so_instead_of_going_round_for_ever(monkeypatch, tmp_path):
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "x"}] * 5))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDatasetDict({"train": stream}))
    tokenizer = load_tokenizer(None, [prose(50)], vocab_size=300)
    with pytest.raises(ValueError, match="too few"):
        load("owner/name", tokenizer=tokenizer.name_or_path)
    form = sequences.Form(tokenizer, L, "packed")
    with pytest.raises(ValueError, match="the text has 10 tokens, too few"):
        next(iter(sequences.make_sequences(stream, form, "the text", tmp_path)))


def test_bytes_of_padded_rows_are_those_of_the_text_they_hold(tmp_path):
    """A document ten times longer than a row counts as the row's worth of text that it gives."""
    words = [prose(300, seed) for seed in range(40)]
    source = write_jsonl(tmp_path / "long.jsonl", words)
    padded, packed = (load(source, sequence_length=16, documents=form) for form in ("padded", "packed"))
    rows = padded.validation["input_ids"]
    held = "".join(padded.tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    assert padded.validation_bytes_per_token == pytest.approx(len(held.encode()) / sum(map(len, rows)))
    # the same kind of text: the same bytes per token, where whole documents over cut rows would give many times more
    assert padded.validation_bytes_per_token == pytest.approx(packed.validation_bytes_per_token, rel=0.1)


def test_a_corpus_knows_its_largest_id_and_its_hash(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(200))
    corpus, again = load(source), load(source)
    assert corpus.largest_id == max(max(tokens(corpus.train)), max(tokens(corpus.validation)))
    assert corpus.hash == again.hash
    assert corpus.hash != load(source, seed=1).hash, "another order"
    changed = documents(200)
    changed[100] = changed[100].upper()
    assert corpus.hash != load(write_jsonl(tmp_path / "b.jsonl", changed)).hash


def test_an_id_beyond_the_vocabulary_is_one_sentence(hub):
    corpus = load("owner/whole", text_column="body")
    rows = list(itertools.islice(corpus.train, 4))
    largest = max(max(row["input_ids"]) for row in rows)
    collate(rows, largest + 1)
    with pytest.raises(
        ValueError, match=f"vocab_size must be above {largest}, a token id of the tokenizer, got {largest}"
    ):
        collate(rows, largest)


def test_fill_is_the_share_of_positions_that_hold_text(tmp_path):
    source = write_jsonl(tmp_path / "short.jsonl", documents(100, words=3))
    padded, packed = (load(source, sequence_length=32, documents=form) for form in ("padded", "packed"))
    mask = np.array(padded.train["attention_mask"])
    assert padded.fill == pytest.approx(mask.mean())
    assert 0 < padded.fill < 0.9
    assert packed.fill == 1.0
