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
from transformers import PreTrainedTokenizerFast

from lorank.train import data
from lorank.train.data import collate, load_corpus, load_evaluation, load_tokenizer

L = 16
WORDS = "the cat sat on a mat and saw red green blue fish swim over every hill in one wild night".split()


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


def numbers(corpus: data.Corpus, rows) -> list[int]:
    """Which of `documents` occur in packed rows."""
    return [int(n) for n in re.findall(r"document (\d+)\n", corpus.tokenizer.decode(tokens(rows)))]
