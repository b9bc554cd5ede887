"""`lorank.TrainerMixin` in a Trainer of somebody else's: what it makes, and what it leaves to Trainer.

That a stopped run goes on bit by bit is tested with examples/own_trainer.py in tests/examples/test_loops.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import lorank
from lorank.optim.adamw import VectorAdamW
from lorank.optim.driver import LowRankOptimizer


class Mine(lorank.TrainerMixin, Trainer):
    pass


@pytest.fixture
def trained(small: Callable[..., Any], tokens: Tensor, tmp_path: Path) -> Callable[..., Any]:
    """A trainer after six steps of a method on a small Llama."""

    def train(method: str | None = None, moved_by: Any = None, **arguments: Any) -> Mine:
        model = small("llama")
        if method is not None:
            lorank.convert(model, method)
        given: dict[str, Any] = {
            "max_steps": 6,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
        }
        given |= {"dataloader_pin_memory": False, "use_cpu": True}
        args = TrainingArguments(str(tmp_path), **{**given, "save_strategy": "no", **arguments})
        rows = [{"input_ids": row, "labels": row} for row in tokens.repeat(12, 1)]
        trainer = Mine(model=model, args=args, train_dataset=rows, moved_by=moved_by)
        trainer.train()
        return trainer

    return train


def inside(trainer: Any) -> Any:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def test_a_method_that_moves_weights_gets_trainers_settings(trained: Callable[..., Any]) -> None:
    made = inside(trained(moved_by=lorank.GaLore(rank=4), adam_beta1=0.8, weight_decay=0.1))
    assert isinstance(made, LowRankOptimizer) and made.method == lorank.GaLore(rank=4)
    group = made.param_groups[0]
    assert (group["rank"], group["betas"][0], group["weight_decay"]) == (4, 0.8, 0.1)


def test_methods_that_act_between_steps_do(trained: Callable[..., Any]) -> None:
    trainer = trained("switchlora")
    assert isinstance(inside(trainer), VectorAdamW) and trainer.hook.step == 6
    relora = trained("relora", lr_scheduler_kwargs=None)
    expected = lorank.lr_schedule(relora.model, steps=6, warmup_steps=1)
    assert relora.hook.step == 6 and relora.lr_scheduler.lr_lambdas[0](4) == expected(4)


def test_all_else_stays_trainers(trained: Callable[..., Any]) -> None:
    trainer = trained("cola", optim="adafactor", lr_scheduler_type="constant")
    assert trainer.hook is None and type(inside(trainer)).__name__ == "Adafactor"
    assert trainer.lr_scheduler.get_last_lr() == [1e-2, 1e-2]
    assert isinstance(inside(trained()), torch.optim.AdamW)
