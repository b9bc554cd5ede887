"""Tasks of EleutherAI's lm-evaluation-harness on a trained model. The harness is optional: pip install lm-eval.

A task is a name that the harness knows, or a YAML file in its format.
"""

import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorank.train.model import check_causal
from lorank.train.saved import load_model


def is_file(task: str) -> bool:
    """Whether a task is given as a YAML file."""
    return task.endswith((".yaml", ".yml"))


def check_tasks(tasks: Sequence[str]) -> None:
    """Load the tasks with their data, so that an evaluation that cannot work is refused before training.

    Raises:
        ValueError: the harness is not installed, or a task does not exist or cannot be loaded.
    """
    try:
        manager = _manager(tasks)
    except ImportError:
        raise ValueError(
            f"--tasks {','.join(tasks)} needs lm-evaluation-harness; install it with: pip install lm-eval"
        ) from None
    for task in tasks:
        if is_file(task):
            if not Path(task).is_file():
                raise ValueError(f"--tasks {task}: this file does not exist")
        elif task not in manager.all_tasks:
            raise ValueError(f"lm-evaluation-harness has no task {task!r}; list them with: lm-eval ls tasks")
    try:
        manager.load(list(tasks))
    except Exception as error:  # anything: a broken YAML file, a data set that cannot be downloaded
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--tasks {','.join(tasks)} cannot be loaded: {reason}") from error


def run_tasks(
    model: str | Path, tasks: Sequence[str], *, tokenizer: str | None = None, batch_size: int = 8
) -> dict[str, dict[str, Any]]:
    """Task -> "METRIC,FILTER" as the harness names them -> value, for a saved model (run, folder or hub name), on the
    accelerator if there is one."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of everything that is not on its command line
    loaded, own = load_model(str(model), tokenizer=tokenizer)
    check_causal(loaded)
    loaded.to(torch.accelerator.current_accelerator() or torch.device("cpu"))  # type: ignore[arg-type]
    harness = HFLM(pretrained=loaded, tokenizer=own, batch_size=batch_size)
    with contextlib.redirect_stdout(sys.stderr):  # where it prints what it is doing
        found = lm_eval.simple_evaluate(model=harness, tasks=list(tasks), task_manager=_manager(tasks))["results"]
    return {
        task: {name: value for name, value in metrics.items() if "," in name and isinstance(value, int | float)}
        for task, metrics in found.items()
    }


def _manager(tasks: Sequence[str]) -> Any:
    """What finds the tasks. The thousands that the harness brings are read only if one of them is asked for."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not all(map(is_file, tasks)))
