"""Progress on the terminal, of one run and of a comparison: live, or as a line now and then if output is not a terminal."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, Task, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorank.report.lines import Line, LineColumn
from lorank.report.markup import duration
from lorank.report.work import WorkProgress

QUIET_SECONDS = 30
"""Between lines of a comparison if output is not a terminal."""


class TerminalProgress(TrainerCallback):
    """Steps, loss, tokens per second and time left."""

    def __init__(self, title: str, console: Console, work: WorkProgress | None = None):
        self.title = title
        self.console = console
        self.work = work
        """Shows what is done before and after the steps."""
        self.text: dict[str, str] = {}
        self.bar: Progress | None = None
        self._printed = 0.0

    def watch(self, what: str, done: int, total: int | None, unit: str) -> None:
        """Show other work than steps; between these, in their line."""
        if self.bar is None:
            if self.work is not None:
                self.work(what, done, total, unit)
        elif total is not None and done < total:
            self.bar.update(self.task, figures=[f"{what} {done / total:.0%}"])
        else:
            self.bar.update(self.task, figures=self._figures())

    def _figures(self) -> list[str]:
        return [self.text[key] for key in ("loss", "eval", "rate", "mfu") if key in self.text]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.work is not None:
            self.work.close()
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.bar = Progress(LineColumn(self.console, _line_of), console=self.console)
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, figures=[])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.text["loss"] = f"loss {logs['loss']:.3f}"
        if "tokens_per_second" in logs:
            self.text["rate"] = f"{logs['tokens_per_second']:,.0f} tok/s"
        if "mfu" in logs:
            self.text["mfu"] = f"MFU {logs['mfu']:.0%}"
        if "eval_perplexity" in logs:
            self.text["eval"] = f"val ppl {logs['eval_perplexity']:.2f}"
        if self.bar is not None:
            self.bar.update(self.task, figures=self._figures())
        elif "eval_perplexity" in logs or time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            line = "  ".join([self.title, f"step {state.global_step}/{state.max_steps}", *self._figures()])
            self.console.print(line, highlight=False)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.work is not None:
            self.work.close()
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _line_of(task: Task) -> Line:
    steps = f"{task.completed:.0f}/{task.total:.0f}"
    figures = [steps, *task.fields["figures"], TimeElapsedColumn().render(task).plain]
    return Line(task.description, task.percentage / 100, figures, f"left {TimeRemainingColumn().render(task).plain}")


class ComparisonProgress:
    """A live line on a terminal; elsewhere a line at the start and end of each run, and now and then in between."""

    def __init__(self, console: Console):
        self.console = console
        self.live: Live | None = None
        self._printed = time.monotonic()
        self._done = self._stepping = 0.0
        """FLOPs of all steps that were watched, and the seconds they took."""
        self._other, self._ended = 0.0, 0
        """Seconds that the runs that have ended spent on starting, evaluating and saving."""

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, title: str, steps: int, flops: float, number: int, runs: int, work_left: float) -> None:
        self._steps, self._flops, self._left, self._later = steps, flops, work_left, runs - number
        self._begun = self._part = None
        self._start, self._first, self._last = time.monotonic(), None, None
        self._head = f"[{number}/{runs}] {title}"
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
            self.live.update(Text(f"{self._head}  starting"))
        else:
            self.say(self._head)

    def update(self, records: Mapping[str, Any]) -> None:
        step = records.get("step", 0)
        part, now = step / self._steps, time.monotonic()
        if self._part is None:
            self._begun = part  # a run that is continued begins here
        elif part > self._part:
            if self._first is None:
                self._first, self._begun = now, part  # from here on the clock shows the speed
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
        assert self._part is not None and self._begun is not None
        parts = [f"step {step}/{self._steps}"]
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
        """For the whole comparison: its steps at the speed seen so far, and for each later run the mean of what runs spend on
        other things."""
        assert self._part is not None and self._begun is not None
        if self._first is None:
            return None
        work, now = self._flops, time.monotonic()
        done = self._done + (self._part - self._begun) * work
        if done <= 0:
            return None
        other = (self._other + self._first - self._start) / (self._ended + 1)
        speed = done / (self._stepping + now - self._first)
        return (self._left - self._part * work) / speed + self._later * other

    def end(self, outcome: str) -> None:
        other = time.monotonic() - self._start
        if self._first is not None and self._last is not None:
            assert self._part is not None and self._begun is not None
            self._done += (self._part - self._begun) * self._flops
            self._stepping += self._last - self._first
            other -= self._last - self._first
        self._other, self._ended = self._other + other, self._ended + 1
        self.close()
        self.say(f"{self._head}  {outcome}")

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.live is not None:
            self.live.stop()
            self.live = None
