"""Assertions that several checks make, and what they say when they fail."""

import re
from collections.abc import Callable

import torch
from torch import nn


def equal_models(one: nn.Module, other: nn.Module) -> None:
    """AssertionError unless two models have the same state, bit by bit."""
    state, again = one.state_dict(), other.state_dict()
    assert state.keys() == again.keys(), f"names differ: {sorted(state.keys() ^ again.keys())}"
    differing = [name for name, value in state.items() if not torch.equal(value, again[name])]
    assert not differing, f"these differ: {differing}"


def refused(words: str, call: Callable[[], object], error: type[Exception] = ValueError) -> None:
    """AssertionError unless a call raises `error` with a message in which the pattern `words` is found."""
    try:
        call()
    except error as said:
        assert re.search(words, str(said)), f"a message like {words!r} was expected, got {str(said)!r}"
        return
    raise AssertionError(f"{error.__name__} like {words!r} was expected, but nothing was raised")
