"""transformers.Trainer with five changes for pre-training: loss, optimizer, evaluation, throughput and safe saving."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerState

from lorank.loop import step_hook
from lorank.loss import Loss, cross_entropy, gives_loss, next_token_loss, predicted_tokens
from lorank.method import Gradient
from lorank.train.callbacks import Throughput
from lorank.train.distil import Teacher
from lorank.train.evaluation import Evaluation, evaluate
from lorank.train.finite import Guard
from lorank.train.folder import STAGING, checkpoints, step_of, write_sums
from lorank.train.sharded import ShardedTrainer, reading
from lorank.train.unlogged import Unlogged
from lorank.trainer import TrainerMixin
from lorank.whole import cleared, open_to_others

ESTIMATOR_FILE = "estimator.safetensors"
"""File of a checkpoint with the state of a gradient that carries any between steps."""
RECORDS = 1000
"""Of the log that the state of a run remembers, and each checkpoint saves; all of them are in metrics.jsonl."""


class PretrainTrainer(TrainerMixin, ShardedTrainer):
    """A Trainer that logs tokens per second and model FLOPs utilisation, and evaluates by token.

    Args:
        estimator: fills `.grad` instead of autograd. Batch and step determine what it draws.
        make_optimizer: called with the model when training begins.
        schedule: multiplier of the learning rate by steps done.
        schedule_steps: the run's steps for what happens between them; it may be longer.
        tokens_per_step: mean tokens of one optimizer step, over all devices and without padding.
        fill: share of positions with tokens instead of padding.
        flops_per_token: of training this model, without recomputation (MFU, arXiv 2204.02311). None: not known, and no MFU is logged.
        peak_flops: the most FLOP/s of all devices together, and where that number comes from.
        eval_tokens: predicted tokens after which an evaluation during training stops.
        bytes_per_token: of the validation text, by the number of predicted tokens.
        teacher: what it says is a term of the loss, logged as the auxiliary loss.
        skips_nan: leave out a step whose gradient is not finite, instead of ending the run.
    """

    def __init__(
        self,
        *args: Any,
        make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
        schedule: Callable[[int], float],
        schedule_steps: int,
        estimator: Gradient | None = None,
        tokens_per_step: float,
        fill: float = 1.0,
        flops_per_token: float | None,
        peak_flops: tuple[float, str],
        eval_tokens: int,
        bytes_per_token: Callable[[int], float],
        teacher: Teacher | None = None,
        skips_nan: bool = False,
        **kwargs: Any,
    ):
        self.teacher = teacher
        self.throughput = Throughput(tokens_per_step)
        self._last: Loss | None = None
        self.unlogged = Unlogged(self)
        self._staging: Path | None = None
        super().__init__(*args, **kwargs)
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.loss_is_scaled_for_ga = True
        whole = self.args.torch_compile and not gives_loss(self.model)  # type: ignore[arg-type]
        self._nats = torch.compile(cross_entropy) if whole else None
        self.make_optimizer = make_optimizer
        self.schedule = schedule
        self.schedule_steps = schedule_steps
        self.estimator = estimator
        self.flops_per_token = flops_per_token
        self.fill = fill
        self.peak_flops, self.peak_flops_source = peak_flops
        self.eval_tokens = eval_tokens
        self.bytes_per_token = bytes_per_token
        self.guard = Guard(skips=skips_nan, lr=self.args.learning_rate)
        self.add_callback(self.throughput)
        self.add_callback(self.unlogged)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = self.model if model is None else model
            assert trained is not None
            self.optimizer = self.make_optimizer(trained)
            self.hook = step_hook(trained, self.optimizer, steps=self.schedule_steps, seed=self.args.seed)
            if self.hook is not None:
                self.hook.check_whole()  # before the first step
        return self.optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Under DDP, gradients stay in the buckets that are sent, from before the first step. The usual zero_grad drops them, and
        micro-batches would then be summed in a second copy of all gradients."""
        replicated = self.mesh is None and self.accelerator.distributed_type.startswith("MULTI_")  # on whatever device
        if replicated:
            for p in self.model.parameters():  # type: ignore[union-attr]
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if replicated:
            model.zero_grad = partial(model.zero_grad, set_to_none=False)
        return model, loader

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Clip what the optimizer sees, if it projects gradients as they arrive."""
        made = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper keeps it there
        if getattr(made, "in_backward", False):
            return torch.nn.utils.clip_grad_norm_(made.seen_parameters(), self.args.max_grad_norm)  # type: ignore[union-attr]
        return super()._clip_grad_norm(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Rows in order, if each batch of the estimator continues the one before."""
        if self.estimator is None or not self.estimator.carries:
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return Lanes(len(rows), self.args.per_device_train_batch_size)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return self.guard.counted(self._micro_step(model, inputs, num_items_in_batch))

    def _micro_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """Fill the gradients; the loss."""
        if self.estimator is None:
            total = super().training_step(model, inputs, num_items_in_batch)
            assert self._last is not None
            if self._last.auxiliary is None:
                return total
            self.unlogged.auxiliary.append(self._last.auxiliary)
            return self._last.nats
        model.eval()  # with dropout, members would differ by their masks
        with self.compute_loss_context_manager():
            return self.estimator(self._prepare_inputs(inputs), self.state.global_step)  # type: ignore[arg-type]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Predicted tokens of one optimizer step, over its micro-batches and all processes."""
        here = sum(predicted_tokens(batch["labels"]) for batch in batch_samples)
        return self.accelerator.gather(torch.as_tensor(here, device=device)).sum().clamp(min=1)  # type: ignore[no-any-return]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Gradients are averaged over the processes and summed over micro-batches, so each gives its share of the mean over all
        predicted tokens, times the number of processes."""
        items = num_items_in_batch / self.accelerator.num_processes
        owner = self.accelerator.unwrap_model(model)
        if self.teacher is None:
            found = next_token_loss(model, inputs, items, owner=owner, nats=self._nats)
        else:
            found = self._taught(self.teacher, model, inputs, items, owner)
        self._last = found.detach()
        return found.total

    def _taught(self, teacher: Teacher, model: Any, inputs: Any, items: Any, owner: Any) -> Loss:
        """The loss, with the teacher's term as an auxiliary one."""
        seen: list[torch.Tensor] = []

        def nats(logits: torch.Tensor, *given: Any) -> torch.Tensor:
            seen.append(logits)
            return (self._nats or cross_entropy)(logits, *given)

        found = next_token_loss(model, inputs, items, owner=owner, nats=nats)
        term = teacher.term(seen[0], inputs, items)
        return found._replace(auxiliary=term if found.auxiliary is None else found.auxiliary + term)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of a step's gradient before the weights move; None for a step that is left out, whose gradients are removed."""
        norm = self._norm(model, grad_norm)
        lost = self.guard.leaves_out(norm, self.state.global_step + 1)
        if lost is None:
            return norm
        self._tr_loss -= lost.to(self._tr_loss.device)
        self.unlogged.auxiliary.clear()
        for p in model.parameters():
            p.grad = None
        return None

    def _norm(self, model: Any, grad_norm: Any) -> Any:
        votes = [p.grad for p in model.parameters() if p.grad is not None and not p.grad.is_floating_point()]
        if votes:  # accelerate skips integers
            return torch.stack([vote.float().norm() for vote in votes]).norm()
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        if self.lr_scheduler is None:
            trained: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(trained, self.schedule)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.estimator is not None and self.estimator.carries and self.args.should_save:
            save_file(self.estimator.state_dict(), os.path.join(output_dir, ESTIMATOR_FILE))

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints have the model's own names of weights, since these are what `_load_from_checkpoint` looks for; transformers would
        take the experts of a mixture apart. What training switches off is not saved."""
        model: Any = self.accelerator.unwrap_model(self.model)
        caches, model.config.use_cache = model.config.use_cache, True
        earlier = model.__dict__.get("_weight_conversions")
        model._weight_conversions = []
        try:
            super()._save(*args, **kwargs)
        finally:
            model._weight_conversions = earlier
            model.config.use_cache = caches

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises ValueError if a checkpoint lacks weights, which would stay as they were drawn. Tied ones are in it once."""
        tensors = dict(self.model.state_dict(keep_vars=True))  # type: ignore[union-attr]
        there = {id(tensor) for name, tensor in tensors.items() if name not in load_result.missing_keys}
        self.check_lost([name for name in load_result.missing_keys if id(tensors[name]) not in there])
        super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.estimator is not None and self.estimator.carries and checkpoint is not None:
            with reading(file := Path(checkpoint, ESTIMATOR_FILE)):
                self.estimator.load_state_dict(load_file(file))

    def restore(self, checkpoint: Path) -> None:
        """Load model and history of a checkpoint of the last step."""
        self._load_from_checkpoint(str(checkpoint))
        assert self.model is not None
        # autocast, as training would have left it
        self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=self.mesh is not None)
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All validation rows on each process, so that figures do not depend on batch size or device count."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(rows, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator)

    def evaluation(self, max_tokens: int | None) -> Evaluation:
        """The model on the validation data, up to `max_tokens` (None: all)."""
        assert self.model is not None
        with self.compute_loss_context_manager():
            return evaluate(
                self.model, self.get_eval_dataloader(), max_tokens=max_tokens, bytes_per_token=self.bytes_per_token
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = self.evaluation(self.eval_tokens)
        metrics = {f"eval_{name}": value for name, value in found.to_dict().items() if value is not None}
        metrics["eval_loss"] = found.loss  # the name that Trainer and its trackers expect
        for name, view in (self.hook.aside() if self.hook else {}).items():
            with view:
                other = self.evaluation(self.eval_tokens)
            metrics |= {f"eval_{name}_{key}": value for key, value in other.to_dict().items() if value is not None}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation; None if the model's FLOPs are not known. Padding is computed and counts. A rate above the measured
        peak raises the peak, which was measured while the machine was busy."""
        if self.flops_per_token is None:
            return None
        reached = tokens_per_second / self.fill * self.flops_per_token
        self.peak_flops = max(self.peak_flops, reached)
        return reached / self.peak_flops

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.guard.logged(logs, self.state.global_step - self.unlogged.since)
            self.unlogged.since = self.state.global_step
        if "loss" in logs and (rate := self.throughput.tokens_per_second()) is not None:
            logs["tokens_per_second"] = rate
            if (mfu := self.mfu(rate)) is not None:
                logs["mfu"] = mfu
        if "loss" in logs and self.unlogged.auxiliary:
            logs["auxiliary_loss"] = torch.stack(self.unlogged.auxiliary).mean().item()
            self.unlogged.auxiliary.clear()
        logs["tokens"] = round(self.state.global_step * self.throughput.tokens_per_step)
        super().log(logs, *args, **kwargs)
        del self.state.log_history[:-RECORDS]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save in a separate folder first and move it when all is written, so that a checkpoint is never half written."""
        out = Path(str(self.args.output_dir))
        folder, self._staging = out / f"checkpoint-{self.state.global_step}", out / STAGING
        try:
            self.unlogged.keep()
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                open_to_others((self._staging / folder.name).iterdir())
                write_sums(self._staging / folder.name)
                cleared(folder)  # one that could not be read, or the same again
                os.replace(self._staging / folder.name, folder)
                done = [one for one in checkpoints(out) if step_of(one) <= self.state.global_step]
                for old in done[: -(self.args.save_total_limit or len(done))]:
                    shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = "the disk is full" if shutil.disk_usage(out).free < 1 << 20 else str(error).splitlines()[0]
            kept = "earlier checkpoints are intact" if any(out.glob("checkpoint-*")) else "there is no earlier one"
            raise OSError(f"could not write {folder}: {reason}; {kept}") from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))


class Lanes(Sampler[int]):
    """Indices of rows for batches in which each row continues the same row of the batch before. The data set is cut into as many
    lanes as a batch has rows; rows that do not fill the lanes are left out.

    >>> list(Lanes(7, 2))
    [0, 3, 1, 4, 2, 5]
    """

    def __init__(self, rows: int, lanes: int):
        self.length, self.lanes = rows // lanes, lanes

    def __iter__(self) -> Iterator[int]:
        return (lane * self.length + t for t in range(self.length) for lane in range(self.lanes))

    def __len__(self) -> int:
        return self.length * self.lanes
