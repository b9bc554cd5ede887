"""Consoles for results and for progress. Only commands import this: rich and transformers take time to load."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group
from rich.status import Status
from rich.table import Table
from transformers.utils import logging

from lorank.report.progress import TerminalProgress
from lorank.report.work import WorkProgress
from lorank.train.watching import watched_by
from lorank.train.world import is_first

NARROWEST = 70
"""Columns of tables at least. In fewer, they would have letters below each other; a narrower terminal breaks their lines itself."""


class ResultsConsole(Console):
    """A console whose tables of figures are not made for fewer than `NARROWEST` columns. Sentences and bars fit the terminal."""

    def print(self, *objects: Any, **settings: Any) -> None:
        width, given = self.width, self._width
        if width < NARROWEST and any(isinstance(one, Group) or _is_wide(one) for one in objects):
            self.width = NARROWEST
        try:
            super().print(*objects, **settings)
        finally:
            self._width = given


def _is_wide(printed: Any) -> bool:
    """A table of names and values can be broken."""
    return isinstance(printed, Table) and len(printed.columns) > 2


def results_console() -> Console:
    """A console for results, with the libraries' own output turned down."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.formatwarning = lambda message, *args, **kwargs: f"lorank: {message}\n"  # without the line of the code
    logging.disable_progress_bar()
    return ResultsConsole(quiet=not is_first())  # under torchrun the first process prints


def errors_console() -> Console:
    """A console for progress that leaves no trace in what is piped on."""
    return Console(stderr=True, quiet=not is_first())


@contextlib.contextmanager
def shown_work(status: Status | None = None) -> Iterator[None]:
    """Show how far long work inside is: reading, tokenising, evaluating. On a terminal a `status` shows it, if there is one."""
    console = errors_console()
    work = WorkProgress(console)

    def update(what: str, done: int, total: int | None, unit: str) -> None:
        assert status is not None
        status.update(what if total is None else f"{what} {done / max(total, 1):.0%}")

    try:
        with watched_by(work if status is None or not console.is_terminal else update):
            yield
    finally:
        work.close()


@contextlib.contextmanager
def shown_run(title: str, console: Console) -> Iterator[TerminalProgress]:
    """The progress of a run, and of the work before and after its steps."""
    progress = TerminalProgress(title, console, WorkProgress(errors_console()))
    try:
        with watched_by(progress.watch):
            yield progress
    finally:
        progress.close()
