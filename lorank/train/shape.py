"""The entries of a model's configuration: which of them a recipe's `shape` may change, and what a file says besides the shape.

A configuration also has settings of other places: what a call returns, how text was generated once, the type of the
weights. In a file they are leftovers of another program, and get the defaults of their class. A recipe that gives them by
`shape` is refused, because other keys of the recipe decide them.
"""

import difflib
from collections.abc import Container, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from lorank.train.entries import as_number, last_line, set_rotary
from lorank.train.vocabulary import SIZES, TOKENS

RETURNED = ("output_attentions", "output_hidden_states", "return_dict")
"""What a call returns. Training needs the logits, under their name."""
DECIDED = {
    **dict.fromkeys(("model_type", "architectures", "auto_map", "name_or_path"), "model"),
    **dict.fromkeys(("dtype", "torch_dtype"), "precision"),
    "attn_implementation": "attention",
    **dict.fromkeys(SIZES, "vocab_size"),
    **dict.fromkeys((*TOKENS, "decoder_start_token_id"), "tokenizer"),
    **dict.fromkeys((*RETURNED, "use_return_dict", "use_cache", "is_decoder", "is_encoder_decoder", "lorank")),
    **dict.fromkeys(("problem_type", "num_labels", "id2label", "label2id", "transformers_version")),
}
"""Entries that `shape` cannot change, and the key of the recipe that decides them; None: no key does."""


def reset_leftovers(config: PretrainedConfig) -> None:
    """Give a configuration from a file, and those inside it, the defaults of what is no part of its shape."""
    for part in [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]:
        part.output_attentions = part.output_hidden_states = False
        part.return_dict = True
        if part.is_encoder_decoder and not getattr(type(part), "is_encoder_decoder", False):
            part.is_encoder_decoder = False  # a class with two halves knows it; of another one only one half is built


def set_shape(config: PretrainedConfig, shape: Mapping[str, Any]) -> None:
    """Change entries of a configuration. Lists with an entry for each block follow the number of blocks.

    Raises:
        ValueError: an entry that does not exist, that another key decides, or a value that the class refuses.
    """
    known, layers = config.to_dict(), getattr(config, "num_hidden_layers", None)
    for name, value in shape.items():
        if name in DECIDED:
            instead = f"; use {DECIDED[name]}" if DECIDED[name] else ""
            raise ValueError(
                f"shape.{name} cannot be changed, because it does not belong to a model's shape, got {value!r}{instead}"
            )
        if set_rotary(config, name, value):
            continue
        if name.startswith("_") or not (
            name in known or name in config.attribute_map or hasattr(getattr(type(config), name, None), "fset")
        ):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"shape: a configuration of type {config.model_type!r} has no entry {name!r}{hint}")
        try:
            setattr(config, name, as_number(type(config), name, value))
        except Exception as error:  # configuration classes check their fields, each in its way
            raise ValueError(f"shape.{name} cannot be {value!r}: {last_line(error)}") from None
    if shape:
        repeat_lists(config, layers, given=shape)
        try:
            getattr(config, "validate", lambda: None)()  # entries against each other, as when the model is saved
        except Exception as error:
            raise ValueError(
                f"{described(shape)} does not suit model type {config.model_type!r}: {last_line(error)}"
            ) from None


def repeat_lists(config: PretrainedConfig, before: Any, given: Container[str] = ()) -> None:
    """After the number of blocks has changed, repeat or cut what a configuration lists block by block, from its beginning. What is
    `given` stays."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or not isinstance(before, int) or layers in (before, 0):
        return
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before and name not in given:
            setattr(config, name, (value * layers)[:layers])


def described(shape: Mapping[str, Any]) -> str:
    """The entries of a recipe's shape, as a sentence names them.

    >>> described({"hidden_size": 8, "hidden_act": "relu"})
    "shape.hidden_size=8, shape.hidden_act='relu'"
    """
    return ", ".join(f"shape.{name}={value!r}" for name, value in shape.items())


def uncounted(error: ValueError, config: PretrainedConfig, shape: Mapping[str, Any]) -> ValueError:
    """The error of a model that could not be counted, with the entry it comes from if that is known, else the recipe's `shape`."""
    cause = error.__cause__
    reason = reason_of(cause, config) if isinstance(cause, Exception) else ""
    if reason not in str(error):
        return ValueError(f"the model cannot be run: {reason}")
    return ValueError(f"{error} (with {described(shape)})" if shape else str(error))


def reason_of(error: Exception, config: PretrainedConfig) -> str:
    """What an error of modelling code says, on one line. Of a key that it does not know, the entry that has this value."""
    if isinstance(error, KeyError) and error.args:
        for name, value in config.to_dict().items():
            if error.args[0] in (value, *(value.values() if isinstance(value, dict) else ())):
                return f"{name} cannot be {value!r}"
        return f"it has no {error.args[0]!r}"
    if isinstance(error, StrictDataclassError):
        return last_line(error)
    text = config.get_text_config()
    heads, shared = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and shared > 0 and heads % shared:
        return f"num_attention_heads must be a multiple of num_key_value_heads={shared}, got {heads}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
