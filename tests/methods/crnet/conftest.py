"""Helpers for the tests of CR-Net."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank import (
    CRNet,
    checkpoint,
    convert,
)
from lorank.accounting import measure_saved
from lorank.methods.crnet import (
    CRNetDense,
    CRNetLinear,
)
from lorank.tape import Tape

D, D_FF, N, R = 48, 112, 20, 9


@pytest.fixture
def build(small: Callable[..., Any]) -> Callable[..., Any]:
    """A converted Llama in training mode, all seven ranks R, as many key as query heads."""

    def build(layers: int, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
        shape = {"hidden_size": D, "intermediate_size": D_FF, "num_key_value_heads": 4, "num_hidden_layers": layers}
        return convert(small("llama", **shape), CRNet(**{"rank": R, **fields})).train().to(dtype)

    return build


def a_batch(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(3, 96, (rows, N), generator=torch.Generator().manual_seed(seed))


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(ids, labels=ids, use_cache=False).loss


def gradients(model: Any, *batches: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    for ids in batches or (a_batch(),):
        loss_of(model, ids).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def tapes(model: nn.Module) -> set[Tape]:
    return {module.tape for module in model.modules() if isinstance(module, CRNetDense | CRNetLinear)}


def chain(depths: int, *, bias: bool = False, **options: Any) -> list[Any]:
    """A stack of layers from 10 to 14 on one tape, with β between 0.5 and 1.5."""
    tape = Tape("somewhere", depths)
    options = {"bias": bias, "dtype": torch.float64, **options}
    layers: list[Any] = [CRNetDense(10, 14, tape=tape, **options)]
    layers += [CRNetLinear(10, 14, 4, beta=0.5 + i / depths, tape=tape, depth=i, **options) for i in range(1, depths)]
    return layers


def relative(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Error of each tensor; the βs, sums in which much cancels, are components of one vector."""

    def joined(found: dict[str, Tensor]) -> dict[str, Tensor]:
        betas = torch.cat([grad for name, grad in found.items() if name.endswith("beta")])
        return {"betas": betas, **{name: grad for name, grad in found.items() if not name.endswith("beta")}}

    one, other = joined(one), joined(other)
    return {name: ((one[name] - other[name]).norm() / other[name].norm()).item() for name in other}


def kept(model: Any, policy: Any) -> Counter[int]:
    """How many tensors of which size wait for the backward pass, for one sequence."""
    checkpoint(model, policy)
    ids = a_batch(rows=1)
    found = measure_saved(model, {"input_ids": ids, "labels": ids})
    assert all(not tape.waiting for tape in tapes(model))
    return Counter(torch.Size(shape).numel() for shape in found.shapes if len(shape) > 1)  # not the random state
