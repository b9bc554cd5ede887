"""Helpers for the tests of SLTrain."""

from typing import Any

import torch
from torch import Tensor, nn

from lorank.methods.sltrain import SLTrainLinear


def layer(
    d_in: int = 10,
    d_out: int = 14,
    rank: int = 4,
    *,
    started: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> SLTrainLinear:
    """One layer; `started`: with a B that is no longer zero."""
    torch.manual_seed(0)
    options = {"scale": 0.25, "nnz": 21, "seed": 5, **options}
    made = SLTrainLinear(d_in, d_out, rank, dtype=dtype, **options)
    if started:
        nn.init.normal_(made.B.weight, std=0.3)
    return made


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
