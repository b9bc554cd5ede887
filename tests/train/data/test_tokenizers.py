"""Tokenizers that are trained, loaded and cached, and the pieces that they read."""

import itertools
import os
import shutil

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import AutoConfig

from lorank.train import bpe, tokens
from lorank.train.data import load_tokenizer, tokenizers
from lorank.train.watching import watched_by


def test_a_trained_tokenizer(prose):
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


def test_a_tokenizer_learns_from_a_limited_sample(monkeypatch, prose):
    monkeypatch.setattr(tokenizers, "TOKENIZER_CHARACTERS", 50)
    monkeypatch.setattr(tokens, "PIECE", 20)
    assert sum(map(len, tokenizers.first_pieces(itertools.repeat("x" * 7), 50))) == 56
    assert len(load_tokenizer(None, itertools.repeat(prose(20)), vocab_size=300)) <= 300


def test_parts_have_the_words_of_the_text():
    """A vocabulary is learnt from words and how often they occur, so it is the same."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    random = np.random.default_rng(0)
    signs = [
        *"ab1'.s",
        " ",
        "\n",
        "\t",
        "\r",
        "\x0b",
        "\x1c",
        "\x1f",
        "\x85",
        "\xa0",
        "\u2028",
        "\u3000",
        "\u200b",
        "日",
        "é",
        "'ll",
    ]
    for _ in range(300):
        text = "".join(random.choice(signs, random.integers(1, 40)))
        parts = list(bpe.at_spaces(text, int(random.integers(1, 6))))
        assert "".join(parts) == text
        assert [word for part in parts for word, _ in words.pre_tokenize_str(part)] == [
            word for word, _ in words.pre_tokenize_str(text)
        ]
    assert max(map(len, bpe.at_spaces("some words and more\n" * 1000))) < 5000


def test_learning_from_long_text_says_so_and_can_be_stopped(monkeypatch, prose):
    """It is the vocabulary that is learnt in this process."""
    texts, said = [prose(2000, seed) for seed in range(10)], []
    size = sum(map(len, texts))
    short = load_tokenizer(None, texts, vocab_size=300, texts_name="short")
    monkeypatch.setattr(tokenizers, "LONG_CHARACTERS", 20_000)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # as where a pipe is not UTF-8; tokens are
    with watched_by(lambda what, done, total, unit: said.append((what, done, total))):
        long = load_tokenizer(None, texts, vocab_size=300)
    assert long.backend_tokenizer.to_str() == short.backend_tokenizer.to_str()
    assert [what for what, done, _ in said if not done] == [
        f"learning a vocabulary of 300 tokens from {size / 1000:.1f} k characters",
        "merging tokens to a vocabulary",
    ]
    assert ("learning a vocabulary", size, size) in said

    def stop(what, done, total, unit):
        if what.startswith("merging"):
            raise KeyboardInterrupt

    with watched_by(stop), pytest.raises(KeyboardInterrupt):
        load_tokenizer(None, texts, vocab_size=301)
    with pytest.raises(OSError, match=r"learnt a vocabulary died \(exit code 1\)"):
        bpe.learnt_apart(texts, "none")


def test_pieces_make_up_the_text(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 10)
    for text in ("", "short", "x" * 10, "x" * 25, "a line\nanother line\nlast", "0123456789\n0"):
        pieces = list(tokens.pieces_of(text))
        assert "".join(piece.text for piece in pieces) == text
        assert max(len(piece.text) for piece in pieces) <= 10
        assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert tokens.pieces_of("a line\nanother line").__next__().text == "a line\n"


def test_a_tokenizer_in_use_is_known_by_what_it_does(tmp_path, prose):
    tokenizer = load_tokenizer(None, [prose(100)], vocab_size=300)
    before = tokenizers.identity(tokenizer)
    tokenizer(["some text"] * 2, truncation=True, max_length=3, padding="max_length")
    assert tokenizers.identity(tokenizer) == before
    assert tokenizers.identity(load_tokenizer(None, [prose(100)], vocab_size=280)) != before


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen3", "llama"])
def test_a_folder_with_a_model_alone_has_no_tokenizer(kind, tmp_path):
    """transformers makes one without a vocabulary for some types, which reads every text as none."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_disk_that_is_full_when_the_tokenizer_is_kept(monkeypatch, caplog, prose):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    assert len(load_tokenizer(None, [prose(100)], vocab_size=300)) == 300
    assert "could not be cached" in caplog.text and "No space left" in caplog.text


def test_the_tokenizer_of_a_stream_is_found_without_reading(hub, monkeypatch, load):
    first = load("owner/whole", text_column="body").tokenizer
    monkeypatch.setattr(tokenizers, "_train_tokenizer", None)
    assert load("owner/whole", text_column="body").tokenizer.get_vocab() == first.get_vocab()


def test_a_tokenizer_by_its_file(tmp_path, prose):
    """Alone it does not say which token ends a text, so this is known by its name."""
    trained = load_tokenizer(None, [prose(100)], vocab_size=300)
    trained.save_pretrained(tmp_path / "whole")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "whole" / "tokenizer.json", tmp_path / "alone" / "mine.json")
    for file in ("whole/tokenizer.json", "alone/mine.json"):
        found = load_tokenizer(str(tmp_path / file))
        assert (found.eos_token, found.pad_token) == ("<|endoftext|>", "<|pad|>")
        assert tokenizers.identity(found) == tokenizers.identity(trained)
    (tmp_path / "alone" / "broken.json").write_text("{}")
    with pytest.raises(OSError, match="broken.json: no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path / "alone" / "broken.json"))
    with pytest.raises(
        OSError, match="alone: no tokenizer could be loaded .it has no tokenizer.json that transformers can read"
    ):
        load_tokenizer(str(tmp_path / "alone"))
