"""Weights in the order in which one token reads them fastest.

    y = W x        W [d_out, d_in]        x [d_in], the one token that a model with a cache computes

Each number of W is read once, so that this takes as long as memory takes to deliver W, which is fastest in long rows. The B [d_out, r]
of a bottleneck has short ones: r numbers, of which the next row is no continuation. With the columns of B one after another, a row has
d_out numbers. It is the same matrix with other strides.

Only tokens that are computed one at a time gain by it; sixteen at a time lose (`benchmarks/decode.py`).
"""

from typing import TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Model = TypeVar("Model", bound=nn.Module)
LONG = 1024
"""Numbers of a row from which on it is read as fast as a longer one."""


@torch.no_grad()
def fast_decoding(model: Model) -> Model:
    """Store the weights of short rows column by column, in place, so that a low-rank model writes single texts faster on a CPU.

    Values, shapes and what `save_pretrained` writes stay the same; safetensors' own `save_file` asks for rows. Weights that are
    quantised, sharded, shared with an embedding or on another device are left as they are.

    Returns:
        The model.
    """
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for layer in model.modules():
        if not isinstance(layer, nn.Linear) or id(W := layer.weight) in shared or is_traceable_wrapper_subclass(W):
            continue
        if W.device.type == "cpu" and W.shape[1] < min(LONG, W.shape[0]) and W.is_contiguous():
            W.data = W.mT.contiguous().mT
    return model
