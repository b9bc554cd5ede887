"""Kinds of text that come with Python and torch, a file for each, and a base model that was trained on another kind."""

import importlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lorank.train.recipe import Recipe
from lorank.train.run import pretrain


def three_kinds() -> dict[str, list[str]]:
    """Rows of three kinds, some hundreds of characters or a file each: C++ headers, the language reference, names of characters."""
    headers = sorted(Path(torch.__file__).parent.glob("include/ATen/core/*.h"))
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    names = [f"{chr(c)} {unicodedata.name(chr(c))}" for c in range(0x100, 0x3000) if unicodedata.name(chr(c), "")]
    return {
        "headers": [path.read_text(encoding="utf-8", errors="replace") for path in headers],
        "reference": [topics[name] for name in sorted(topics)],
        "names": ["\n".join(names[i : i + 20]) for i in range(0, len(names), 20)],
    }


def written(texts: Mapping[str, Iterable[str]], out: Path, most: int) -> dict[str, Path]:
    """A file of JSON lines for each kind, of its rows that fit into `most` characters together."""
    files = {}
    for name, rows in texts.items():
        files[name] = out / f"{name}.jsonl"
        kept, size = [], 0
        for row in rows:
            if (size := size + len(row)) <= most:
                kept.append(json.dumps({"text": row}))
        files[name].write_text("\n".join(kept))
    return files


def base_in(out: Path, blocks: int) -> Path:
    """The run of a dense model of that many blocks on the embedded text; it is trained once."""
    if not (out / "base/summary.json").exists():
        shape = {
            "hidden_size": 64,
            "intermediate_size": 172,
            "num_hidden_layers": blocks,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
        settings: dict[str, Any] = {"method": "dense", "vocab_size": 1024, "sequence_length": 64, "batch_size": 16}
        pretrain(Recipe(**settings, shape=shape, steps=1000, lr=1e-2, save_every=0), out / "base")
    return out / "base"
