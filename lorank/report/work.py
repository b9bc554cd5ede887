"""Work that takes long: a bar with rate and time left on a terminal, else a line now and then. Short work shows nothing."""

import time
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lorank.report.markup import duration

SHORT_SECONDS = 1
"""Work that ends within them shows no bar."""
QUIET_SECONDS = 30
"""Between lines if output is not a terminal."""
STEPS = (("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))


class Work(NamedTuple):
    """One piece of work, since it was first heard of."""

    what: str
    begun: float
    """Seconds of a clock."""
    first: int
    """How much was done by then."""


class WorkProgress:
    """Shows what it is called with; see `lorank.train.watching.Watch`. After `close` it may be called again."""

    def __init__(self, console: Console):
        self.console = console
        self.work: Work | None = None
        self.bar: Progress | None = None
        self._printed = 0.0

    def __call__(self, what: str, done: int, total: int | None, unit: str) -> None:
        now = time.monotonic()
        if total is not None and done >= total:
            self.close()
        elif self.work is None or self.work.what != what:
            self.close()
            self.work, self._printed = Work(what, now, done), now
        elif self.console.is_terminal:
            self._draw(now, done, total, unit)
        elif now - self._printed > QUIET_SECONDS:
            self._printed = now
            self.console.print(f"{what}: {self._line(now, done, total, unit)}", highlight=False, soft_wrap=True)

    def _draw(self, now: float, done: int, total: int | None, unit: str) -> None:
        assert self.work is not None
        if self.bar is None:
            if now - self.work.begun < SHORT_SECONDS:
                return
            columns = TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.work.what, total=total, text="")
        self.bar.update(self.task, completed=done, total=total, text=self._line(now, done, total, unit))

    def _line(self, now: float, done: int, total: int | None, unit: str) -> str:
        """How much is done, how fast, and the time left if it is known how much there is."""
        assert self.work is not None
        rate = (done - self.work.first) / max(now - self.work.begun, 1e-9)
        parts = [amount(done, unit) if total is None else f"{amount(done, unit)} of {amount(total, unit)}"]
        parts.append(f"{amount(rate, unit)}/s")
        if total is not None and rate > 0:
            parts.append(f"about {duration(max(0.0, (total - done) / rate))} left")
        return ", ".join(parts)

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        self.work = None
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def amount(number: float, unit: str) -> str:
    """A number of units in three digits.

    >>> amount(0, "B"), amount(11_800_000, "B"), amount(999_600, "tokens")
    ('0 B', '11.8 MB', '1.0 M tokens')
    """
    letter, step = [pair for pair in STEPS if number >= 0.9995 * pair[1]][-1] if number >= 1 else STEPS[0]
    digits = f"{number / step:.1f}" if letter else f"{number:.0f}"
    return f"{digits} {letter}{unit}" if unit == "B" else f"{digits} {letter} {unit}".replace("  ", " ")
