"""What a run that trains a saved model on takes, unless it is said otherwise: a run from new weights learns faster than trained
ones can bear, and for longer than a small text lasts."""

from typing import Any

from lorank.table import find, names_joined
from lorank.train.continual import FULL, RATE, RATES
from lorank.train.start import method_of_start, start_config

EPOCHS = 3.0
LENGTH = 256


def defaults(model: str, method: str | None = None) -> dict[str, Any]:
    """Settings of a recipe that starts from a saved model.

    Args:
        model: a run, a folder or a hub name.
        method: as in a recipe, or with "full" for all weights. Default: the model's own, or a LoRA for a dense one.

    Raises:
        ValueError: there is no such model.
    """
    own = method_of_start(model)
    names = names_joined(method or ("lora" if own == "dense" else own))
    names = [own if name == FULL else name for name in names]
    first = names[0]
    usual = RATE if find(first).adapts else RATES[FULL]
    positions = getattr(start_config(model), "max_position_embeddings", None) or LENGTH
    return {
        "start_from": model,
        "method": "+".join(names),
        "lr": RATES.get(first, usual),
        "warmup_steps": 0.1,
        "clip": 1.0,
        "sequence_length": min(LENGTH, positions),
    }
