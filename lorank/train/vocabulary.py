"""What a model's configuration says of its tokenizer: the rows of the embedding, and the ids of special tokens.

A model never trains the embedding of its padding id, so that id must not occur in text. If the tokenizer has no padding
token, or uses it for text, the configuration has none either. A few architectures cannot be without one: they get an id
that the tokenizer does not use, in a row more if there is no other.
"""

from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lorank.train.data import padding_id, rows_of

SIZES = ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input")
PADDING = ("pad_token_id", "pad_index")
TOKENS = ("bos_token_id", "eos_token_id", *PADDING)
NEED_PADDING = {
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    *("xlm", "prophetnet", "gemma4", "gemma4_unified"),
}
"""Model types that count positions from their padding id, or compare ids with it. Others are asked (`_refuses_none`)."""


def set_vocabulary(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None = None
) -> None:
    """Give a configuration, and the nested one of its text model, a tokenizer's ids, and `vocab_size` rows if it is given.

    Without a tokenizer, special tokens of the architecture's own vocabulary that lie beyond this one are removed.

    Raises:
        ValueError: the architecture needs a padding id, and the tokenizer uses every one of `vocab_size` rows.
    """
    parts = _parts(config)
    if tokenizer is None:
        rows = vocab_size or 32_000
        for part in parts:
            _set_sizes(part, rows)
            for name in TOKENS:
                if isinstance(index := getattr(part, name, None), int) and index >= rows:
                    _set_token(part, name, None, rows)
        return
    rows = vocab_size or rows_of(tokenizer)
    padding = padding_id(tokenizer)
    if padding is not None and padding >= rows:  # in T5's rows, the last hundred are left out
        padding = None
    if padding is None and any(part.model_type in NEED_PADDING or _refuses_none(part) for part in parts):
        used = set(tokenizer.get_vocab().values())
        padding = next((index for index in range(rows) if index not in used), rows)
        if padding == rows and vocab_size is not None:
            raise ValueError(
                f"vocab_size must be above {rows} for model type {config.model_type!r}, which needs a padding token where the "
                "tokenizer has none; leave it out"
            )
        rows = max(rows, padding + 1)
    for part in parts:
        _set_sizes(part, rows)
        for name in TOKENS:
            index = padding if name in PADDING else getattr(tokenizer, name)
            if name != "pad_index" or hasattr(part, name):
                _set_token(part, name, index, rows)


def _set_token(config: PretrainedConfig, name: str, index: int | None, rows: int) -> None:
    """Set an id; where a class insists on a number and there is none, the last row's."""
    try:
        setattr(config, name, index)
    except Exception:  # each class checks its fields in its own way
        setattr(config, name, rows - 1)


def keep_vocabulary(config: PretrainedConfig, saved: PretrainedConfig) -> None:
    """Give a configuration the rows and special tokens of another one: a run goes on as it began."""
    text = _parts(saved)[-1]
    for part in _parts(config):
        for name in (*SIZES, *TOKENS):
            if hasattr(part, name) and hasattr(text, name):
                setattr(part, name, getattr(text, name))


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """A configuration, and the nested one of its text model if it has one."""
    text = config.get_text_config(decoder=True)  # of an encoder-decoder without nested ones, a copy
    return [config, text] if any(text is part for part in vars(config).values()) else [config]


def _set_sizes(config: PretrainedConfig, rows: int) -> None:
    for name in SIZES:
        if name == "vocab_size" or hasattr(config, name):
            setattr(config, name, rows)


def _refuses_none(config: PretrainedConfig) -> bool:
    """Whether the class of a configuration insists on a padding id."""
    before: Any = getattr(config, "pad_token_id", None)
    try:
        config.pad_token_id = None
    except Exception:  # each class checks its fields in its own way
        return True
    config.pad_token_id = before
    return False
