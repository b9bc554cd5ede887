"""A twin of a model whose tensors have shapes but no data, so that a large model can be measured on a small machine."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import masking_utils


class WithoutData(FakeTensorMode):
    """FakeTensorMode that also knows the shape of the grouped product with which experts run; torch knows it in bf16 only.

    The product is [tokens, d_in] times [experts, d_in, d_out]. For the gradient of the weights it is [d_in, tokens]
    times [tokens, d_out], which gives one matrix for each expert.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        a, b, offsets = args[:3]
        return a.new_empty(*(offsets.shape if b.ndim == 2 else ()), a.shape[0], b.shape[-1])


@contextlib.contextmanager
def without_data(action: str) -> Iterator[None]:
    """Inside, tensors have shapes but no data, and every row is one sequence.

    transformers looks for several sequences in the positions of a row. Without data it cannot tell, and would build a
    mask [n, n] that training does not have.

    Raises:
        ValueError: modelling code that cannot run without data, or on these shapes. "The model cannot be ACTION ..."
    """
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        with WithoutData():
            yield
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model cannot be {action} without its data: {reason}") from error
    finally:
        masking_utils.find_packed_sequence_indices = find


class _Emptied(TorchFunctionMode):
    """Gives a new tensor where one is copied that is no parameter: a buffer, or what a module keeps otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return torch.empty(args[0].shape, dtype=args[0].dtype)
        return func(*args, **(kwargs or {}))


def twin_of(model: nn.Module) -> nn.Module:
    """A copy in training mode whose tensors are on the CPU and have no data; call it inside `without_data`."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for p in model.parameters()
    }
    with _Emptied():
        return copy.deepcopy(model, memo).train()


def example(batch: int, sequence_length: int, padded: bool = False) -> dict[str, Tensor]:
    """Inputs of a training call on [batch, sequence_length] tokens; with padding there is an attention mask."""
    ids = torch.zeros(batch, sequence_length, dtype=torch.int64)
    mask = {"attention_mask": torch.ones_like(ids)} if padded else {}  # without data, its values do not matter
    return {"input_ids": ids, "labels": ids, **mask}
