"""What the study trains: sizes, texts, rows and learning rates."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from lorank.comparison.settings import ComparisonSettings
from lorank.train.recipe import Recipe

SEEDS = (1, 2, 3)
STEPS = 400
"""Of 2,048 tokens: 819,200 tokens a run."""

SIZES = {
    "tiny": {"size": "tiny"},
    "20m": {"size": "20m"},
    "40m": {
        "size": "20m",
        "rank": 96,
        "shape.hidden_size": 384,
        "shape.intermediate_size": 1024,
        "shape.num_attention_heads": 6,
        "shape.num_key_value_heads": 6,
    },
}
"""Name -> changes of a recipe. All have the demo's vocabulary of 4,096; 40m is 20m with a width of 384."""


class Text(NamedTuple):
    """A text that is not committed: where it comes from, and how to know it."""

    source: str
    sha256: str


TEXTS = {
    "embedded": None,  # Python's standard library, as in the demo
    "wikitext": Text(
        "pytorch/examples, word_language_model/data/wikitext-2: valid.txt, then test.txt",
        "ee8e179331812a9025fac9f2602faeb12e773d051d55ee6e50ce15da3bc784c1",
    ),
    "war-and-peace": Text(
        "GITenberg/War-and-Peace_2600: 2600-0.txt", "6cbcc5ca5e590fb9ace161a5b93e4ecf280d7118104be0d63b686c004cfa70ae"
    ),
}

STAGES = {
    "core": {"methods": ["cola+muon"], "only": False},  # beside dense and dense-small, each with AdamW and Muon
    "cola": {"methods": ["cola", "cola+spectron"], "only": True},
    "others": {
        "methods": ["low-rank", "low-rank+muon", "low-rank+spectron", "crnet", "crnet+muon", "sltrain", "sltrain+muon"],
        "only": True,
    },
}
"""Rows that are trained together; dense-small costs what the rows of its stage cost."""

RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2)
"""Tried with the first seed. A best rate at an edge extends the sweep, twice at most."""
SPECTRON_RATES = (0.0125, 0.025, 0.05, 0.1)


def settings_of(size: str, text: str, stage: str, texts: Path) -> ComparisonSettings:
    """A stage at a size on a text, as `lorank compare` takes it.

    Raises:
        ValueError: the text is not there, or it is another one.
    """
    common = {"steps": STEPS, "eval_every": 50, "eval_tokens": 65_000, "save_every": 0, "data": data_of(text, texts)}
    base = Recipe().but({**common, **SIZES[size]})
    chosen = STAGES[stage]
    own = {name: {"lr": SPECTRON_RATES} for name in chosen["methods"] if name.endswith("+spectron")}
    return ComparisonSettings(base=base, seeds=SEEDS, sweep={"lr": RATES}, own=own, tuned="all", **chosen)


def data_of(text: str, texts: Path) -> str:
    """Where a text lies; ValueError if it is not there or differs."""
    about = TEXTS[text]
    if about is None:
        return text
    path = texts / f"{text}.txt"
    if not path.exists():
        raise ValueError(f"{path} does not exist; make it from {about.source}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != about.sha256:
        raise ValueError(f"{path} must have the SHA-256 {about.sha256}, got {found}; it comes from {about.source}")
    return str(path)
