"""Work that takes long: a bar with rate and time left on a terminal, else a line now and then. Short work shows nothing."""

import time
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress, Task
from rich.spinner import Spinner

from lorank.report.lines import Line, LineColumn
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
            if not unit:
                self._begun()
        elif self.console.is_terminal:
            self._draw(now, done, total, unit)
        elif now - self._printed > QUIET_SECONDS:
            self._printed = now
            self.console.print(f"{what}: {self._line(now, done, total, unit)}", highlight=False, soft_wrap=True)

    def _begun(self) -> None:
        """Show at once what will not say how far it is."""
        assert self.work is not None
        if self.console.is_terminal:
            self._start()
        else:
            self.console.print(self.work.what, highlight=False, soft_wrap=True)

    def _start(self) -> Progress:
        assert self.work is not None
        self.bar = Progress(LineColumn(self.console, _line_of), console=self.console, transient=True)
        self.bar.start()
        self.task = self.bar.add_task(self.work.what, total=None, figures=[], left="")
        return self.bar

    def _draw(self, now: float, done: int, total: int | None, unit: str) -> None:
        assert self.work is not None
        if self.bar is None and now - self.work.begun < SHORT_SECONDS:
            return
        figures, left = self._figures(now, done, total, unit)
        (self.bar or self._start()).update(self.task, completed=done, total=total, figures=figures, left=left)

    def _line(self, now: float, done: int, total: int | None, unit: str) -> str:
        figures, left = self._figures(now, done, total, unit)
        return ", ".join(filter(None, [*figures, left]))

    def _figures(self, now: float, done: int, total: int | None, unit: str) -> tuple[list[str], str]:
        """How much is done, how fast, and the time left if it is known how much there is."""
        assert self.work is not None
        rate = (done - self.work.first) / max(now - self.work.begun, 1e-9)
        short = amount(done, unit if total is None or unit == "B" else "").strip()
        parts = [short if total is None else f"{short} of {amount(total, unit)}"]
        if rate >= 0.95 or (done and not rate):  # of slow work the time left says more
            parts.append(f"{amount(rate, unit)}/s")
        if total is None or rate <= 0:
            return parts, ""
        return parts, f"about {duration(max(0.0, (total - done) / rate))} left"

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        self.work = None
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _line_of(task: Task) -> Line:
    """Where it is not known how much there is, a spinner shows that something is done."""
    fields = {"figures": task.fields["figures"], "left": task.fields["left"]}
    if task.total is not None:
        return Line(task.description, task.completed / max(task.total, 1), **fields)
    frames = Spinner("dots").frames
    return Line(f"{frames[int(12 * (task.elapsed or 0)) % len(frames)]} {task.description}", None, **fields)


def amount(number: float, unit: str) -> str:
    """A number of units in three digits.

    >>> amount(0, "B"), amount(11_800_000, "B"), amount(999_600, "tokens")
    ('0 B', '11.8 MB', '1.0 M tokens')
    """
    letter, step = [pair for pair in STEPS if number >= 0.9995 * pair[1]][-1] if number >= 1 else STEPS[0]
    digits = f"{number / step:.1f}" if letter else f"{number:.0f}"
    return f"{digits} {letter}{unit}" if unit == "B" else f"{digits} {letter} {unit}".replace("  ", " ")
