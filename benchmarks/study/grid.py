"""What the study trains: sizes, texts, rows and learning rates.

Beside the study there is one published figure, `nano shakespeare published`: nanoGPT's setting for two cores (its readme:
validation loss 1.88). Each byte is a token, which for this text is what each character is there; 65 bytes are 64 predictions.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from lorank.comparison.settings import ComparisonSettings
from lorank.train.recipe import Recipe

SEEDS = (1, 2, 3)
STEPS = 400
"""Of 2,048 tokens: 819,200 tokens a run."""

SIZES = {
    "tiny": {"size": "tiny"},
    "20m": {"size": "20m"},
    "deep": {
        "size": "20m",
        "rank": 48,
        "shape.num_hidden_layers": 6,
        "shape.hidden_size": 192,
        "shape.intermediate_size": 512,
        "shape.num_attention_heads": 3,
        "shape.num_key_value_heads": 3,
    },
}
"""Name -> changes of a recipe. All have the demo's vocabulary of 4,096. deep lies between tiny and 20m in FLOPs, and is deeper than both."""
NANO = {
    "model": "gpt2",
    "tokenizer": "bytes",
    "sequence_length": 65,
    "batch_size": 12,
    "steps": 2000,
    "warmup_steps": 100,
    "lr": 1e-3,
    "min_lr_ratio": 0.1,
    "betas": [0.9, 0.99],
    "weight_decay": 0.1,
    "clip": 1.0,
    "eval_every": 250,
    "eval_tokens": 1_000_000,
    **{f"shape.{name}": size for name, size in {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 65}.items()},
    **{f"shape.{name}_pdrop": 0.0 for name in ("embd", "attn", "resid")},
}
"""nanoGPT's, for its `train_shakespeare_char.py` on a CPU."""


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
    "shakespeare": Text(
        "karpathy/char-rnn: data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "cola-dlr+muon": {"options.init": "dlr", "options.decay_to": "reuse"},
    **{f"cola-carry-{kind}+muon": {"options.carry": kind} for kind in ("identity", "tensor", "linear")},
}
"""Row -> options of CoLA whose effect is measured beside cola+muon."""
FACTORS = "cola+factor-lr-muon"

STAGES = {
    "core": {"methods": ["cola+muon"], "only": False},  # beside dense and dense-small, each with AdamW and Muon
    "cola": {"methods": ["cola", "cola+spectron"], "only": True},
    "others": {
        "methods": ["low-rank", "low-rank+muon", "low-rank+spectron", "crnet", "crnet+muon", "sltrain", "sltrain+muon"],
        "only": True,
    },
    "effects": {"methods": [f"{name}=cola+muon" for name in OPTIONS] + [f"{FACTORS}=cola+factor-lr"], "only": True},
    "published": {
        "methods": ["dense", "dense-tuned=dense", "cola", "low-rank", "crnet"],
        "only": True,
        "match": "flops",
    },
}
"""Rows that are trained together; dense-small costs what the rows of its stage cost."""

RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2)
"""Tried with the first seed. A best rate at an edge extends the sweep, twice at most."""
CORE_RATES = {"sweep": {"lr": RATES[1:]}, "own": {row: {"lr": RATES[:3]} for row in ("dense", "dense-small")}}
"""Of the core: three, around the best that Muon and, for `own`, AdamW had with outputs as drawn."""
EFFECT_RATES = (2.5e-3, 5e-3, 1e-2)
"""Around the best of cola+muon."""
SPECTRON_RATES = (0.0125, 0.025, 0.05, 0.1)
NANO_RATES = (1e-3, 2e-3, 4e-3)
NANO_SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)


def settings_of(size: str, text: str, stage: str, texts: Path) -> ComparisonSettings:
    """A stage at a size on a text, as `lorank compare` takes it.

    Raises:
        ValueError: the text is not there, or it is another one.
    """
    chosen, data = STAGES[stage], data_of(text, texts)
    if (size == "nano") != (stage == "published"):
        raise ValueError(f"the size nano is for the stage published alone, got {size} and {stage}")
    if size == "nano":
        base = Recipe().but({**NANO, **split(data), "save_every": 0})
        rates: dict[str, Any] = {"sweep": {"lr": NANO_RATES}, "own": {"dense": {"lr": [1e-3]}}}
        return ComparisonSettings(base=base, seeds=NANO_SEEDS, tuned="all", **rates, **chosen)
    common = {"steps": STEPS, "eval_every": 50, "eval_tokens": 65_000, "eval_all_at_end": True, "save_every": 0}
    common["zero_outputs"] = True
    base = Recipe().but({**common, **SIZES[size], "data": data})
    if stage == "core":
        return ComparisonSettings(base=base, seeds=SEEDS, tuned="all", **CORE_RATES, **chosen)
    own: dict[str, Any] = {name: {"lr": SPECTRON_RATES} for name in chosen["methods"] if name.endswith("+spectron")}
    if stage == "effects":
        own = {
            name: {**{key: [value] for key, value in given.items()}, "lr": EFFECT_RATES}
            for name, given in OPTIONS.items()
        }
        own[FACTORS] = {"options.rule": ["muon"], "lr": RATES}
    return ComparisonSettings(base=base, seeds=SEEDS, sweep={"lr": RATES}, own=own, tuned="all", **chosen)


def split(file: str) -> dict[str, str]:
    """The first nine tenths of a text to train on, the rest to validate on, as files beside it."""
    text, parts = Path(file).read_text(encoding="utf-8"), {}
    cut = int(0.9 * len(text))
    for key, part in (("data", text[:cut]), ("validation", text[cut:])):
        path = Path(file).with_suffix(f".{key}.txt")
        path.write_text(part, encoding="utf-8")
        parts[key] = str(path)
    return parts


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
