"""Texts to read, and a hub with two data sets; no test touches the network, the home folder or the working folder."""

import json
import re

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorank.train.data import load_corpus

WORDS = str.split("the cat sat on a mat and saw red green blue fish swim over every hill in one wild night")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def prose():
    """prose(100): lines of ten random words, a hundred in all."""

    def prose(words, seed=0):
        chosen = np.random.default_rng(seed).choice(WORDS, words)
        return "".join(" ".join(line) + "\n" for line in np.split(chosen, range(10, words, 10)))

    return prose


@pytest.fixture
def documents(prose):
    """documents(30): that many texts, each of which begins with its number."""
    return lambda count, words=30: [f"document {i}\n{prose(words, seed=i)}" for i in range(count)]


@pytest.fixture
def write():
    """write(path, text): the path, with its folders made."""

    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.fixture
def write_jsonl(write):
    """write_jsonl(path, texts): one row per text."""

    def write_jsonl(path, texts, column="text"):
        return write(path, "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))

    return write_jsonl


@pytest.fixture
def load():
    """load(source): a corpus of rows of 16 tokens."""
    return lambda source, **options: load_corpus(str(source), **{"vocab_size": 300, "sequence_length": 16, **options})


@pytest.fixture
def tokens():
    """tokens(rows): their ids, one after another."""
    return lambda rows: [token for row in rows for token in row["input_ids"]]


@pytest.fixture
def numbers(tokens):
    """numbers(corpus, rows): which of `documents` begin in packed rows."""
    return lambda corpus, rows: [int(n) for n in re.findall(r"document (\d+)\n", corpus.tokenizer.decode(tokens(rows)))]


@pytest.fixture
def t5_like():
    """t5_like(folder): a word tokenizer that, like T5's, ends every text itself."""

    def t5_like(folder, *, pad=True, eos=True):
        vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(set(WORDS))])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        if eos:
            backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        special = {"pad_token": "<pad>"} if pad else {}
        special |= {"eos_token": "</s>"} if eos else {}
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special).save_pretrained(folder)
        return str(folder)

    return t5_like


@pytest.fixture
def hub(monkeypatch, prose):
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
