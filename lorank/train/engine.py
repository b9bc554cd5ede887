"""How the processes of a run share its model: not at all (DDP), by FSDP2, cut at the bottleneck (tensor parallel), or both."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from lorank.distributed.sharding import DATA, TENSOR
from lorank.distributed.tensor_parallel import check
from lorank.train.recipe import Recipe
from lorank.train.world import is_first, processes

OF_ACCELERATE = "ACCELERATE_USE_FSDP"
"""What ``accelerate launch --use_fsdp`` sets; its own wrapping would hold the whole model in every process."""


LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "remote process exited", "was aborted")
"""What gloo and NCCL say of a process that does not answer."""


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process does not answer."""
    return any(words in str(error) for words in LOST)


@contextlib.contextmanager
def in_company(out: Path) -> Iterator[None]:
    """Around a run: ConnectionError in one sentence if another process of the run has ended."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if processes() == 1 or not is_lost(error):
            raise
        raise ConnectionError(
            f"another process of this run was killed or has failed; its own output may say why; continue with --resume {out}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Belongs to the start of a run and not to its recipe: a run may go on with another engine, and with more or fewer processes."""

    fsdp: bool = False
    """Each process has a part of all weights, gradients and states; blocks are gathered one by one."""
    tensor_parallel: int = 1
    """How many processes share every matrix; they are given the same rows."""

    @classmethod
    def of(cls, engine: Self | None) -> "Engine":
        """The engine, or FSDP2 if accelerate was told so."""
        if os.environ.get(OF_ACCELERATE, "").lower() in ("1", "true", "yes"):
            os.environ[OF_ACCELERATE] = "false"
            return cls(fsdp=True, tensor_parallel=1 if engine is None else engine.tensor_parallel)
        return engine or cls()

    @property
    def shares(self) -> bool:
        """Whether processes share the model."""
        return self.fsdp or self.tensor_parallel > 1

    @property
    def groups(self) -> int:
        """How many parts a batch has: processes, or groups of those that get the same rows."""
        return processes() // self.tensor_parallel

    @property
    def draws(self) -> bool:
        """Whether this process draws the initial weights. Others begin without."""
        return not self.shares or is_first()

    def __str__(self) -> str:
        if not self.shares:
            return "ddp" if processes() > 1 else "one process"
        parts = [f"fsdp over {self.groups}"] * (self.fsdp and self.groups > 1)
        return " and ".join([*parts, *[f"tensor parallel over {self.tensor_parallel}"] * (self.tensor_parallel > 1)])

    def check(self, recipe: Recipe) -> None:
        """Raises ValueError for numbers of processes, and for settings, with which a model cannot be shared."""
        if self.tensor_parallel < 1:
            raise ValueError(f"--tensor-parallel must be at least 1, got {self.tensor_parallel}")
        if not self.shares:
            return
        flag = "--fsdp" if self.fsdp else f"--tensor-parallel {self.tensor_parallel}"
        if processes() == 1:
            raise ValueError(
                f"{flag} needs several processes, got one; start it with torchrun --nproc-per-node N -m lorank pretrain ..."
            )
        if processes() % self.tensor_parallel:
            raise ValueError(f"--tensor-parallel must divide the {processes()} processes, got {self.tensor_parallel}")
        if not self.fsdp and self.groups > 1:
            raise ValueError(
                f"--tensor-parallel {self.tensor_parallel} of {processes()} processes needs --fsdp for the others, because DDP cannot hold "
                f"a model that is split; add --fsdp, or use --tensor-parallel {processes()}"
            )
        if recipe.compile:
            raise ValueError(f"compile must be false with {flag}, which is not tested with torch.compile, got true")
        if recipe.distil is not None:
            raise ValueError(f"distil must be left out with {flag}, because a teacher is not shared")

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises ValueError for a model that cannot be cut."""
        if self.tensor_parallel > 1:
            try:
                check(model, self.tensor_parallel)
            except ValueError as error:
                raise ValueError(f"--tensor-parallel {self.tensor_parallel}: {error}") from None

    def mesh(self, device: torch.device) -> DeviceMesh | None:
        """The processes by what they share; None if they share nothing. The process group is there already."""
        sizes = {DATA: self.groups if self.fsdp else 1, TENSOR: self.tensor_parallel}
        sizes = {name: size for name, size in sizes.items() if size > 1}
        if not sizes:
            return None
        return init_device_mesh(device.type, (*sizes.values(),), mesh_dim_names=(*sizes,))
