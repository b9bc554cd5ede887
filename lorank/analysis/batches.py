"""Batches, and how a model is called on them."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

Batch = dict[str, Any]


def tokens_of(batch: Batch) -> int:
    """Tokens that are not padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def until(batches: Iterable[Batch], tokens: int | None) -> Iterator[Batch]:
    """Batches up to the one that reaches that many tokens; None: all."""
    seen = 0
    for batch in batches:
        yield batch
        seen += tokens_of(batch)
        if tokens is not None and seen >= tokens:
            return


def accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument that turns off the cache of keys and values, for models that have one."""
    parameters = inspect.signature(model.forward).parameters.values()
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters)
    return {"use_cache": False} if accepts(model, "use_cache") or open_ended else {}
