"""What transformers' Trainer does otherwise if processes share its model, and checkpoints that any number of processes resumes."""

import contextlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer

from lorank.distributed import saving
from lorank.distributed.sharding import TENSOR, filled, gathered
from lorank.train.engine import is_lost
from lorank.train.entries import last_line

SCHEDULER, WEIGHTS_FILE = "scheduler.pt", "model.safetensors"


class LostWeights(ValueError):
    """A checkpoint that can be read, but has not all weights of the model."""


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Around reading a file of a checkpoint: ValueError names the file if there is something else in it than a checkpoint has there. What
    may be code is left to `lorank.train.folder.only_tensors`."""
    try:
        yield
    except (LostWeights, pickle.UnpicklingError, MemoryError, torch.OutOfMemoryError, dist.DistError):
        raise
    except (Exception, CheckpointException) as error:  # each reader fails in its own way
        named = isinstance(error, ValueError) and str(file) in str(error)
        if named or is_lost(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = f"{type(error).__name__}: {last_line(error)}"
        raise ValueError(
            f"{file} must hold what a checkpoint has there, but reading it ends with {reason}; remove {file.parent} to continue from an "
            "earlier checkpoint"
        ) from error


class ShardedTrainer(Trainer):
    """A Trainer of a model that `lorank.distributed.sharding` has split, or of a whole one.

    Args:
        mesh: over which the model is split; None: it is whole.
        outline: the model before it was split, on the meta device.
    """

    def __init__(
        self, *args: Any, mesh: DeviceMesh | None = None, outline: PreTrainedModel | None = None, **kwargs: Any
    ):
        self.mesh, self.outline = mesh, outline
        super().__init__(*args, **kwargs)
        if mesh is not None:
            self.is_distributed_loading_by_transformers = True  # Trainer leaves the model as it is
            if TENSOR in (mesh.mesh_dim_names or ()):
                self.accelerator.state.device_mesh = mesh  # by which it hands out rows
                # of a stream: its dispatcher would give all groups of processes the same ones
                self.accelerator.dataloader_config.dispatch_batches = False

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Of a micro-batch. Nothing is deferred, so that a process keeps its part of the gradients alone."""
        yield

    def whole_model(self) -> PreTrainedModel | None:
        """The model with whole weights, in the main memory of the first process if it is split; None in others. All processes must call this."""
        if self.mesh is None:
            return self.model  # type: ignore[return-value]
        assert self.model is not None and self.outline is not None
        held = gathered(self.model)
        return None if held is None else filled(self.outline, held).eval()

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if self.mesh is None:
            super()._move_model_to_device(model, device)

    @property
    def _moving(self) -> Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[return-value]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.mesh is None:
            return super()._save(output_dir, state_dict)
        assert output_dir is not None and self.model is not None
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            config: Any = self.model.config
            config.save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)  # type: ignore[union-attr]
        self.accelerator.wait_for_everyone()
        saving.save_weights(self.model, Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.mesh is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        assert self.model is not None
        saving.save_optimizer(self.model, self._moving, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))  # type: ignore[union-attr]

    def _is_shared(self, checkpoint: Path) -> bool:
        """Whether what was saved is split, or the model is."""
        return self.mesh is not None or (checkpoint / saving.OPTIMIZER_FILE).exists()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._is_shared(Path(resume_from_checkpoint)):
            with reading(Path(resume_from_checkpoint, WEIGHTS_FILE)):
                return super()._load_from_checkpoint(resume_from_checkpoint, model)
        assert self.model is not None
        with reading(Path(resume_from_checkpoint, saving.WEIGHTS)):
            self.check_lost(saving.load_weights(self.model, Path(resume_from_checkpoint)))

    def check_lost(self, names: list[str]) -> None:
        """Raises ValueError if there are weights that a checkpoint lacks, which would stay as they were drawn."""
        if names:
            raise LostWeights(
                f"the checkpoint must have all weights of the model, but it lacks {names[0]} and {len(names) - 1} more; it cannot be "
                "resumed by this version of lorank, start another run"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        several = (folder / saving.OPTIMIZER_FILE).exists()
        with reading(folder / SCHEDULER):
            state = torch.load(folder / SCHEDULER, map_location="cpu", weights_only=True)
            self.lr_scheduler.load_state_dict(state)  # type: ignore[union-attr]
        with reading(folder / (saving.OPTIMIZER_FILE if several else saving.WHOLE_OPTIMIZER)):
            if not self._is_shared(folder):
                return super()._load_optimizer_and_scheduler(checkpoint)
            assert self.model is not None
            saving.load_optimizer(self.model, self._moving, folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Of a run with fewer processes, that of the first one."""
        own = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        there = [] if checkpoint is None else sorted(Path(checkpoint).glob("rng_state*.pth"))
        if not there:
            return super()._load_rng_state(checkpoint)
        [taken] = [file for file in there if file.name == own] or there[:1]
        with reading(taken), tempfile.TemporaryDirectory() as folder:
            shutil.copy(taken, os.path.join(folder, own))
            super()._load_rng_state(folder)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
