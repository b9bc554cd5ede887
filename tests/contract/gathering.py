"""Two counters of what becomes whole in a process while a sharded optimizer steps; sums count twice, those of single numbers not at all."""

from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Gathered:
    """Bytes of the tensors, from inside: nothing is counted that fills parts up to equal sizes."""

    def __init__(self) -> None:
        self.bytes, self.before = 0, (DTensor.full_tensor, dist.all_reduce)

    def __enter__(self) -> Self:
        def full_tensor(tensor: DTensor, **options: Any) -> torch.Tensor:
            self.bytes += tensor.numel() * tensor.element_size() * (tensor.ndim > 0)
            return self.before[0](tensor, **options)

        def all_reduce(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.bytes += 2 * tensor.nbytes * (tensor.ndim > 1)
            return self.before[1](tensor, *args, **options)

        DTensor.full_tensor, dist.all_reduce = full_tensor, all_reduce  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        DTensor.full_tensor, dist.all_reduce = self.before  # type: ignore[method-assign]


class Collectives(TorchDispatchMode):
    """Bytes of what collective operations make whole, from outside: every other one is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.bytes += args[0].nbytes * args[1]
        elif func is torch.ops.c10d.allreduce_.default:
            self.bytes += sum(2 * tensor.nbytes for tensor in args[0] if tensor.ndim > 1)
        elif func.namespace in ("c10d", "_c10d_functional"):
            moves_nothing = "wait_tensor" in str(func) or "wrap_tensor" in str(func)
            harmless = moves_nothing or ("all_reduce" in str(func) and args[0].numel() == 1)
            assert harmless, f"{func} is not counted"
        return func(*args, **(kwargs or {}))
