"""Between the steps of a run: timing, metrics, and reasons to stop."""

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorank.train.folder import record_of, write_whole


class Throughput(TrainerCallback):
    """Times training steps without evaluation, saving and the first step, which warms up."""

    def __init__(self, tokens_per_step: float):
        self.tokens_per_step = tokens_per_step
        self.seconds: list[float] = []
        """Duration of each timed step."""
        self._read = 0
        self._mark: float | None = None

    def tokens_per_second(self) -> float | None:
        """Mean since the last call; None if no step was timed since then."""
        window, self._read = self.seconds[self._read :], len(self.seconds)
        return self.tokens_per_step / statistics.fmean(window) if window else None

    def typical_tokens_per_second(self) -> float | None:
        """By the median step, which ignores short disturbances; None if no step was timed."""
        return self.tokens_per_step / statistics.median(self.seconds) if self.seconds else None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self._mark is not None:
            self.seconds.append(now - self._mark)
        self._mark = now

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    on_save = on_evaluate


class MetricsFile(TrainerCallback):
    """Appends every log record to metrics.jsonl. The file exists from the first step on. When a run resumes, records of steps that
    will run again, and half and damaged lines, are removed first."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        done = [line for line in lines if (record := record_of(line)) and record["step"] <= state.global_step]
        write_whole(self.path, "".join(f"{line.decode()}\n" for line in done))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss", "skipped_steps"} & logs.keys():
            return
        names = {"loss": "loss_nats_per_token", "grad_norm": "gradient_norm", "learning_rate": "lr"}
        record = {names.get(k, k): v for k, v in logs.items() if k not in ("epoch", "eval_loss")}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **record}) + "\n")


class StopOnSignal(TrainerCallback):
    """A signal that asks to stop (`lorank.train.signals`) ends training after the current step, with a checkpoint. A second one, or one
    outside of training, interrupts at once. Of several processes all end after the same step if one is asked."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._training = False

    def receive(self, number: int, frame: Any) -> None:
        if self.received is not None or not self._training:
            raise KeyboardInterrupt
        self.received = number

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._training = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._training = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            asked = torch.tensor(self.received or 0, device=args.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            self.received = int(asked) or None
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True


class StopOnNonFinite(TrainerCallback):
    """Ends a run whose loss or gradient is no longer finite."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("loss", "grad_norm"):
            if logs and name in logs and not math.isfinite(logs[name]):
                raise FloatingPointError(
                    f"{name} became {logs[name]} by step {state.global_step}; lower lr={args.learning_rate} or warm up longer"
                )
