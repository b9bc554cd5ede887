"""What the next line of metrics.jsonl will say of steps that are done.

A checkpoint may lie between two lines. It keeps this in trainer_state.json, so that a run that resumes writes the line that it would have
written; transformers would write the mean of the steps since.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorank.train.sharded import reading

NAME = "lorank.unlogged"


class Unlogged(TrainerCallback):
    """Of a `PretrainTrainer`: sums since the last line, which a checkpoint keeps."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.since = 0
        """The step of the last line."""
        self.auxiliary: list[torch.Tensor] = []
        """Auxiliary losses of micro-batches since."""

    def keep(self) -> None:
        """Write it where trainer_state.json takes it from. All processes must call this, since each has losses."""
        trainer, guard = self.trainer, self.trainer.guard
        losses = trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1)).mean()
        trainer.state.stateful_callbacks[NAME] = {
            "since": self.since,
            "loss": losses.item(),
            "auxiliary": [term.item() for term in self.auxiliary],
            "skipped": guard.skipped,
            "in_a_row": guard.in_a_row,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what a checkpoint has kept; those of earlier versions have nothing."""
        trainer, guard = self.trainer, self.trainer.guard
        states: Any = state.stateful_callbacks
        kept = states.get(NAME)
        self.since = trainer._globalstep_last_logged
        if kept is not None:
            with reading(Path(str(args.output_dir), f"checkpoint-{state.global_step}", "trainer_state.json")):
                self.since = trainer._globalstep_last_logged = int(kept["since"])
                trainer._tr_loss += float(kept["loss"])
                self.auxiliary += [torch.tensor(term, device=trainer._tr_loss.device) for term in kept["auxiliary"]]
                guard.skipped, guard.in_a_row = int(kept["skipped"]), int(kept["in_a_row"])
