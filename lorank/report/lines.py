"""Progress in one line, for terminals of any width: what is done, a bar, figures, and the time left, which is never cut off."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

BAR = (5, 40)
"""Columns of a bar, at least and at most."""
KEPT = 2
"""Figures that take the place of the bar where there is no room for both."""
GAP = "  "


class Line(NamedTuple):
    """The parts of a line."""

    what: str
    share: float | None
    """How much is done; None: not known."""
    figures: Sequence[str]
    """The most important ones first."""
    left: str = ""


class LineColumn(ProgressColumn):
    """A line of a task as the only column of a progress display, as wide as the terminal is now."""

    def __init__(self, console: Console, line_of: Callable[[Task], Line]):
        super().__init__()
        self.console, self.line_of = console, line_of

    def render(self, task: Task) -> Text:
        return fitted(self.line_of(task), self.console.width, "━" if self.console.encoding.startswith("utf") else "-")


def fitted(line: Line, width: int, sign: str = "━") -> Text:
    """A line in at most `width` columns: the bar is shortened first, then the last figures are left out, then the bar, then the
    other figures, and at last the name of the work is cut."""
    for number in range(len(line.figures), -1, -1):
        parts = [*line.figures[:number], *filter(None, [line.left])]
        room = width - len(GAP.join([line.what, *parts]))
        bar = 0 if line.share is None or room - len(GAP) < BAR[0] else min(BAR[1], room - len(GAP))
        if bar or (room >= 0 and (line.share is None or number <= KEPT)):
            break
    what = line.what if room >= 0 else line.what[: max(0, len(line.what) + room - 1)] + "…"
    shown: list[Any] = [(what, "bold")]
    if bar:
        full = round(bar * min(1.0, max(0.0, line.share or 0.0)))
        shown += [GAP, (sign * full, "bar.complete"), (sign * (bar - full), "bar.back")]
    found = Text.assemble(*shown, *(GAP + part for part in parts))
    found.no_wrap = True
    found.truncate(width)
    return found
