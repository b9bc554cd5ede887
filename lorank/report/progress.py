"""Progress of a run on the terminal: a live bar, or a line now and then where output is not a terminal."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TerminalProgress(TrainerCallback):
    """Steps, loss, tokens per second and time left."""

    def __init__(self, title: str, console: Console):
        self.title = title
        self.console = console
        self.text: dict[str, str] = {}
        self.bar: Progress | None = None
        self._printed = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, text="")

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
            self.text["mfu"] = f"MFU {logs['mfu']:.0%}"
        if "eval_perplexity" in logs:
            self.text["eval"] = f"val ppl {logs['eval_perplexity']:.2f}"
        line = "  ".join(self.text[key] for key in ("loss", "eval", "rate", "mfu") if key in self.text)
        if self.bar is not None:
            self.bar.update(self.task, text=line)
        elif "eval_perplexity" in logs or time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            self.console.print(f"{self.title}  step {state.global_step}/{state.max_steps}  {line}", highlight=False)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
