"""Who watches work that takes long: reading, tokenising, evaluating. The library prints nothing; a command line may.

with watched_by(lambda what, done, total, unit: print(what, done, total, unit)):
    load_corpus("corpus/")
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Watch(Protocol):
    """Called often, from the thread that works; it must be quick."""

    def __call__(self, what: str, done: int, total: int | None, unit: str) -> object:
        """`done` of `total` units of work ("B", "characters", "tokens") are done; None: it is not known how many there are.
        Without a unit, `what` begins and will not say how far it is."""


def _nobody(what: str, done: int, total: int | None, unit: str) -> None:
    pass


_WATCH: ContextVar[Watch] = ContextVar("watch", default=_nobody)


@contextlib.contextmanager
def watched_by(watch: Watch) -> Iterator[None]:
    """Let `watch` hear of all work inside."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def tell(what: str, done: int, total: int | None, unit: str) -> None:
    """Tell whoever watches how far some work is."""
    _WATCH.get()(what, done, total, unit)


def told(what: str, parts: Iterable[T], size: Any, total: int | None, unit: str) -> Iterator[T]:
    """Parts of some work, each with `size(part)` units, told as they are done."""
    done = 0
    for part in parts:
        yield part
        done += size(part)
        tell(what, done, total, unit)
