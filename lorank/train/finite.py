"""Steps whose gradient is not finite: they end a run before they move a weight, or are left out."""

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
MOST = 10
"""Steps in a row that may be left out: after that the weights or the text are to blame, and no later step would be better."""


class Guard:
    """Looks at every step's gradient before the weights move.

    Args:
        skips: leave a step out instead of ending the run.
        lr: for the message.
    """

    def __init__(self, *, skips: bool, lr: float):
        self.skips, self.lr = skips, lr
        self.skipped = 0
        """Steps that were left out since the last log line."""
        self.in_a_row = 0
        """Steps that were left out one after another, up to now."""
        self._of_this_step: list[Tensor] = []

    def counted(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch as it goes into the mean of a log line. One that is not finite would make the mean of all steps so."""
        if not self.skips:
            return loss
        self._of_this_step.append(torch.nan_to_num(loss.detach(), 0.0, 0.0, 0.0))
        return self._of_this_step[-1]

    def leaves_out(self, norm: Tensor | float, step: int) -> Tensor | None:
        """None if the step is good. Else it is to be left out, and this is what `counted` has given of it.

        Args:
            norm: of the whole gradient, the same in all processes.
            step: which one it is, from 1.

        Raises:
            FloatingPointError: the norm is not finite, and the run does not leave steps out, or has left out too many in a row.
        """
        losses, self._of_this_step = self._of_this_step, []
        if torch.as_tensor(norm).isfinite():
            self.in_a_row = 0
            return None
        if not self.skips:
            raise FloatingPointError(
                f"the gradient of step {step} is not finite; lower lr={self.lr}, warm up longer, or skip such steps with "
                "--set on_nan=skip"
            )
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > MOST:
            raise FloatingPointError(
                f"the gradients of steps {step - MOST} to {step} are not finite; lower lr={self.lr} or look at the data"
            )
        logger.warning("step %d is left out: its gradient is not finite", step)
        return torch.stack(losses).sum() if losses else torch.zeros(())

    def logged(self, logs: dict[str, float], steps: int) -> None:
        """Correct a log line over that many steps for those that were left out."""
        if not self.skipped:
            return
        logs["skipped_steps"] = self.skipped
        if self.skipped < steps:
            logs["loss"] *= steps / (steps - self.skipped)
        else:
            del logs["loss"]
        self.skipped = 0
