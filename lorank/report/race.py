"""Progress of a comparison on the terminal: which run of how many, how it goes, and how long all of it will take."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lorank.race.compare import Run
from lorank.report.markup import duration

QUIET_SECONDS = 30
"""Between lines where output is not a terminal."""


class RaceProgress:
    """A live line on a terminal; elsewhere a line at the start and end of each run, and now and then between."""

    def __init__(self, console: Console):
        self.console = console
        self.live: Live | None = None
        self.run: Run | None = None
        self._printed = time.monotonic()
        self._done = self._stepping = 0.0
        """FLOPs of all steps that were watched, and the seconds they took."""
        self._beside, self._ended = 0.0, 0
        """Seconds in which runs that have ended began, were evaluated and were saved."""

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, run: Run, number: int, runs: int, work_left: float) -> None:
        self.run, self._left, self._later = run, work_left, runs - number
        self._begun = self._part = None
        self._start, self._first, self._last = time.monotonic(), None, None
        self._head = f"[{number}/{runs}] {run.title}"
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
            self.live.update(Text(f"{self._head}  starting"))
        else:
            self.say(self._head)

    def update(self, records: Mapping[str, Any]) -> None:
        assert self.run is not None
        step = records.get("step", 0)
        part, now = step / self.run.recipe.steps, time.monotonic()
        if self._part is None:
            self._begun = part  # what was there before: a run that is continued
        elif part > self._part:
            if self._first is None:
                self._first, self._begun = now, part  # from here on the clock tells how fast it is
            self._last = now
        self._part = part
        line = f"{self._head}  {self.line(records, step)}"
        if self.live is not None:
            self.live.update(Text(line))
        elif step and time.monotonic() - self._printed > QUIET_SECONDS:
            self._printed = time.monotonic()
            self.say(line)

    def line(self, records: Mapping[str, Any], step: int) -> str:
        """Step, loss, speed and time left, as far as they are known."""
        assert self.run is not None and self._part is not None and self._begun is not None
        parts = [f"step {step}/{self.run.recipe.steps}"]
        if "loss_nats_per_token" in records:
            parts.append(f"loss {records['loss_nats_per_token']:.3f}")
        if "eval_perplexity" in records:
            parts.append(f"val ppl {records['eval_perplexity']:.2f}")
        if "tokens_per_second" in records:
            parts.append(f"{records['tokens_per_second']:,.0f} tok/s")
        if (left := self._seconds_left()) is not None:
            parts.append(f"about {duration(left)} left")
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        """Of the race: its steps at the speed of those seen, and for each later run what runs have taken beside their steps."""
        assert self.run is not None and self._part is not None and self._begun is not None
        if self._first is None:
            return None
        work, now = self.run.candidate.flops, time.monotonic()
        done = self._done + (self._part - self._begun) * work
        if done <= 0:
            return None
        beside = (self._beside + self._first - self._start) / (self._ended + 1)
        speed = done / (self._stepping + now - self._first)
        return (self._left - self._part * work) / speed + self._later * beside

    def end(self, outcome: str) -> None:
        assert self.run is not None
        beside = time.monotonic() - self._start
        if self._first is not None and self._last is not None:
            assert self._part is not None and self._begun is not None
            self._done += (self._part - self._begun) * self.run.candidate.flops
            self._stepping += self._last - self._first
            beside -= self._last - self._first
        self._beside, self._ended = self._beside + beside, self._ended + 1
        self.close()
        self.say(f"{self._head}  {outcome}")

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.live is not None:
            self.live.stop()
            self.live = None
