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
        ValueError: there is no such model, or it cannot have this method.
    """
    own = method_of_start(model)
    names = _names(method, "lora" if own == "dense" else own)
    if FULL in names and find(own).adapts:
        raise ValueError(
            f"method must be left out for {model}, got {FULL}: it has {own}, under which the weights are frozen; lorank export --format "
            "dense merges it"
        )
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


def _names(method: str | None, usual: str) -> list[str]:
    """Names in a recipe's `method`, FULL among them; `usual` for None."""
    if method is None:
        return [usual]
    if "," in method:
        raise ValueError(
            f"method must be that of one model, such as lora or lora+muon, got {method!r}; run finetune for each, or lorank continual for all"
        )
    names = names_joined(method)
    kinds = [name for name in names if name != FULL and find(name).key == "method"]
    if FULL in names and kinds:
        raise ValueError(
            f"method must be {FULL} or {kinds[0]}, got {method!r}: {FULL} trains the weights that the model has"
        )
    return names
