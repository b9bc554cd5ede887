"""Blocks that begin as the identity: the projections that write to the residual stream start at zero.

    x ← x + O a(x)      O [d, d] of attention or [d, d_ff] of the MLP      O = 0 at first; of a low-rank layer B = 0

a(x), what the projection reads, is drawn as ever. So O has a gradient in the first step, and all else from the second on.

Why. transformers draws embeddings with a standard deviation of 0.02, and blocks normalise what they read to 1. So what fresh blocks
add is soon larger than the token itself. In CoLA most of that is equal for all tokens, because the mean of SiLU is not zero: after
one block of the size 20m the mean cosine between two tokens is 0.83 (dense: 0.02). docs/study.md has what it changes in training.

Source: Goyal et al., "Accurate, Large Minibatch SGD", arXiv 1706.02677, section 5.1, and Zhang et al., "Fixup Initialization", arXiv
1901.09321, both for convolutional networks. B = 0 in low-rank layers is ours.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lorank.architectures import OUTPUT, is_linear
from lorank.conversion import method_of
from lorank.sites import blocks


@torch.no_grad()
def zero_outputs(model: nn.Module) -> None:
    """Set the output projections of all blocks to zero. Call it on a model with fresh weights, after `lorank.convert`.

    Raises:
        ValueError: the method trains weights that are there already, lorank finds no repeated blocks, a block has no projection whose
            name it knows as an output, a layer there cannot start at zero, or a block still changes what it reads, of a language model
            whose weights are there. The model is then as it was.
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
    drawn = [p.clone() for p in zeros]
    for parameter in zeros:
        parameter.zero_()
    if (kept := _not_the_identity(model)) is not None:
        for parameter, value in zip(zeros, drawn, strict=True):
            parameter.copy_(value)
        raise ValueError(
            f"zero_outputs needs blocks x + f(x) whose outputs lorank knows by name, and {kept} of {type(model).__name__} is none: it "
            "changes what it reads all the same; leave it out"
        )


def _not_the_identity(model: nn.Module) -> str | None:
    """The name of a block that changes what it reads, by running a language model on a few tokens; None also of any other model. A LayerNorm
    after the sum leaves what a LayerNorm has left, to rounding."""
    held = next(model.parameters())
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids" or held.is_meta:
        return None
    changed: list[str] = []

    def watch(name: str, block: nn.Module) -> RemovableHandle:
        def compare(module: nn.Module, args: Any, given: Any, out: Any) -> None:
            x, y = args[0] if args else given.get("hidden_states"), out if isinstance(out, Tensor) else out[0]
            comparable = isinstance(x, Tensor) and x.shape == y.shape
            if comparable and (y - x).abs().max() > torch.finfo(x.dtype).eps ** 0.5 * x.abs().max():
                changed.append(name)

        return block.register_forward_hook(compare, with_kwargs=True)

    entries = model.get_input_embeddings().weight.shape[0]  # type: ignore
    ids = (torch.arange(8, device=held.device)[None] + entries // 2) % entries
    hooks = [watch(f"{stack}.{depth}", block) for stack, depth, block in blocks(model)]
    training = model.training
    try:
        model.eval()(ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    except Exception:
        return None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return next(iter(changed), None)


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
