"""Blocks that begin as the identity: the projections that write to the residual stream start at zero.

    x ← x + O a(x)      O [d, d] of attention or [d, d_ff] of the MLP      O = 0 at first; of a low-rank layer B = 0

a(x), what the projection reads, is drawn as ever. So O has a gradient in the first step, and all else from the second on.

Why. transformers draws embeddings with a standard deviation of 0.02, and blocks normalise what they read to 1. So what fresh blocks
add is soon larger than the token itself. In CoLA most of that is equal for all tokens, because the mean of SiLU is not zero: after
one block of the size 20m the mean cosine between two tokens is 0.83 (dense: 0.02). docs/study.md has what it changes in training.

Source: Goyal et al., "Accurate, Large Minibatch SGD", arXiv 1706.02677, section 5.1, and Zhang et al., "Fixup Initialization", arXiv
1901.09321, both for convolutional networks. B = 0 in low-rank layers is ours.
"""

import torch
from torch import nn

from lorank.architectures import OUTPUT, is_linear
from lorank.conversion import method_of
from lorank.sites import blocks


@torch.no_grad()
def zero_outputs(model: nn.Module) -> None:
    """Set the output projections of all blocks to zero. Call it on a model with fresh weights, after `lorank.convert`.

    Raises:
        ValueError: the method trains weights that are there already, lorank finds no repeated blocks, a block has no projection whose
            name it knows as an output, or a layer there cannot start at zero. The model is then as it was.
    """
    method = method_of(model)
    if method is not None and method.adapts:
        raise ValueError(
            f"zero_outputs is for new weights, and {method.name} trains on those of the model; leave it out"
        )
    zeros: list[nn.Parameter] = []
    if not (repeated := [*blocks(model)]):
        raise ValueError(
            f"zero_outputs needs repeated blocks in an nn.ModuleList, and {type(model).__name__} has none; leave it out"
        )
    for stack, depth, block in repeated:
        found = _outputs(block)
        if not found:
            raise ValueError(
                f"zero_outputs needs a projection in {stack}.{depth} that writes to the residual stream, and lorank knows none there "
                "by its name; leave it out"
            )
        for name, output in found.items():
            if not (parts := _parts(output)):
                kind = type(model).__name__ if method is None else method.name
                raise ValueError(f"zero_outputs: {stack}.{depth}.{name} of {kind} cannot start at zero; leave it out")
            zeros += parts
    for parameter in zeros:
        parameter.zero_()


def _parts(output: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    """What is zero where the output is: all of a dense layer, the parts of another that its class names as `silent`."""
    if isinstance(output, nn.Parameter):
        return [output]
    if is_linear(output):
        return [*output.parameters()]
    held = [getattr(output, name) for name in getattr(output, "silent", ())]
    return [
        p for part in held if part is not None for p in (part.parameters() if isinstance(part, nn.Module) else [part])
    ]


def _outputs(block: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """Layers, and the parameters of a mixture's experts, that write to the residual stream."""
    layers = {name: module for name, module in block.named_modules() if OUTPUT.search(name)}
    return layers | {name: p for name, p in block.named_parameters() if OUTPUT.search(name.removesuffix("_bias"))}
