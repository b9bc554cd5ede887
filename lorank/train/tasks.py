"""Tasks of EleutherAI's lm-evaluation-harness on a trained model; an extra: pip install 'lorank[eval]'."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises ValueError if the harness is not installed, or a task is none of its own."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError(
            f"--tasks {','.join(tasks)} needs lm-evaluation-harness; install it with: pip install 'lorank[eval]'"
        ) from None
    known = TaskManager().all_tasks
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(f"lm-evaluation-harness knows no task {unknown[0]!r}; list them with: lm-eval ls tasks")


def run_tasks(folder: Path, tasks: Sequence[str], *, batch_size: int = 8) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value, of the model saved in `folder`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from lorank.train.run import load_model

    model, tokenizer = load_model(str(folder))
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=harness, tasks=list(tasks))["results"]
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found.items()
    }
