"""How much of each block OSFT protects: more where a block changes little of what runs through it.

    I_l = mean over tokens of cos(x, y),  x what enters block l, y what leaves it         k = (a + (b - a) I_l / mean I) m

The authors compare inputs and outputs of each matrix, which can be done for square ones only; comparing those of its block is our
reading. Their a is a half and b one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.layers import wide
from lorank.sites import blocks


@torch.no_grad()
def kept_by_importance(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, least: float = 0.5, most: float = 1.0
) -> dict[str, float]:
    """k / m of each block by (3), as a table for `OSFT.rank`: blocks that change what runs through them least keep most.

    Args:
        model: a dense model with blocks; it is left in evaluation mode.
        batches: keyword arguments of the model, such as ``{"input_ids": ids}``.
        least, most: a and b, the share at no importance and at the mean.

    Raises:
        ValueError: the model has no blocks, there are no batches, or `least` and `most` are no shares in order.
    """
    if not 0 < least <= most <= 1:
        raise ValueError(f"least and most must be shares above 0 and up to 1, in order, got {least} and {most}")
    cosines: dict[str, list[Tensor]] = {f"{stack}.{depth}": [] for stack, depth, _ in blocks(model)}

    def compare(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x, y = (args or (*kwargs.values(),))[0], out if isinstance(out, Tensor) else out[0]
        cosines[name].append(F.cosine_similarity(wide(x), wide(y), dim=-1).mean())

    handles = [
        module.register_forward_hook(lambda _, a, k, y, n=f"{stack}.{depth}": compare(n, a, k, y), with_kwargs=True)
        for stack, depth, module in blocks(model)
    ]
    try:
        model.eval()
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not cosines or not all(cosines.values()):
        raise ValueError("the model must have blocks, and batches must reach all of them")
    found = {name: float(torch.stack(values).mean()) for name, values in cosines.items()}
    mean = sum(found.values()) / len(found)
    return {
        rf"^{re.escape(name)}\.": min(1.0, max(1e-9, least + value / mean * (most - least)))
        for name, value in found.items()
    }
