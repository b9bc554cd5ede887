"""The meter: follows the bytes of all tensors that operations make, while they live."""

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Follows the bytes of all storages that operations make, while they live; those of `known` tensors do not count."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.phase = self.when = "forward"
        self._seen = {storage_of(tensor) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            return True if args[0].dtype == torch.bool else 1  # a step that checks data finds it finite and not zero
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            strided = isinstance(leaf, Tensor) and leaf.layout is torch.strided
            if strided and not leaf.is_meta and storage_of(leaf) not in self._seen:  # meta tensors hold nothing
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        weakref.finalize(storage, self._forget, key, size).atexit = False
        self.now += size
        if self.now > self.most:
            self.most, self.when = self.now, self.phase

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def storage_of(tensor: Tensor) -> int:
    """What is equal for all views of the same bytes."""
    return tensor.untyped_storage()._cdata


def tensors_alive() -> list[Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.layout is torch.strided]
