"""What methods need of transformers' Trainer besides `convert`, as a mixin.

    class MyTrainer(lorank.TrainerMixin, Trainer): ...

    MyTrainer(model=lorank.convert(model, "relora"), args=arguments, train_dataset=rows).train()
    MyTrainer(model=model, args=arguments, train_dataset=rows, moved_by=lorank.GaLore(rank=64)).train()

CoLA, SLTrain, CR-Net and MASA need only the plain Trainer.
"""

import os
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lorank.conversion import method_of
from lorank.hooks import StepHook
from lorank.loop import converted_inside, optimizer, own_schedule, step_hook
from lorank.method import Method

HOOK_FILE = "hook.safetensors"
"""File of a checkpoint with the state of the method's `StepHook`."""


class TrainerMixin:
    """Before Trainer, or a subclass of it such as TRL's SFTTrainer, in the bases of a class.

    It makes the optimizer that a method brings, follows the learning rates of ReLoRA and SST, and lets methods act between steps. Their
    state is saved with each checkpoint and loaded from it, so that a stopped run goes on as if it had never stopped. All else stays
    Trainer's, such as `optim` and `lr_scheduler_type` for methods that bring neither.

    Args:
        moved_by: a method that decides how weights move, ``lorank.GaLore(rank=64)``, its class or its name. Learning rate, weight decay,
            betas and epsilon are those of the training arguments.
    """

    hook: StepHook | None = None

    def __init__(self, *args: Any, moved_by: Method | type[Method] | str | None = None, **kwargs: Any):
        self.moved_by = moved_by
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        mine: Any = self
        trained = mine.model if model is None else model
        inner, given = converted_inside(trained), mine.args
        own = None if inner is None else method_of(inner)
        brings = own is not None and "optimizer" in own.answers()
        if mine.optimizer is None and (brings or self.moved_by is not None):
            mine.optimizer = optimizer(
                trained,
                self.moved_by,
                lr=given.learning_rate,
                weight_decay=given.weight_decay,
                betas=(given.adam_beta1, given.adam_beta2),
                eps=given.adam_epsilon,
            )
        made: Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """`num_training_steps` is right even if epochs are counted and `args.max_steps` is -1."""
        mine: Any = self
        made = mine.optimizer if optimizer is None else optimizer
        if self.hook is None:
            self.hook = step_hook(mine.model, made, steps=num_training_steps, seed=mine.args.seed)
        if mine.lr_scheduler is None:
            own = own_schedule(
                mine.model,
                steps=num_training_steps,
                warmup_steps=mine.args.get_warmup_steps(num_training_steps),
                min_lr_ratio=(mine.args.lr_scheduler_kwargs or {}).get("min_lr_rate", 0.1),
                optimizer=made,
            )
            mine.lr_scheduler = own and LambdaLR(made, own)
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.hook is not None and self.args.should_save:  # type: ignore[attr-defined]
            save_file(self.hook.state_dict(), os.path.join(output_dir, HOOK_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self.hook is not None and checkpoint is not None:
            self.hook.load_state_dict(load_file(os.path.join(checkpoint, HOOK_FILE)))
