"""Projections that an architecture keeps in one matrix: GPT-2's query, key and value, Phi-3's gate and up.

    fused [sum of sizes, d_in]  ->  one projection [size, d_in] each  ->  outputs joined again

Each of them is a separate site, because one bottleneck for all three would be another method. `lorank.architectures.FUSED`
lists the fused matrices.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lorank.architectures import FUSED, Fusion, as_linear, copied
from lorank.method import Method


class FusedProjections(nn.Module):
    """Several projections with one joint output [..., sum of sizes], which the architecture's code splits again."""

    def __init__(self, parts: Mapping[str, nn.Module], heads: int):
        super().__init__()
        self.heads = heads
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x).unflatten(-1, (self.heads, -1)) for part in self.children()]
        return torch.cat(outputs, dim=-1).flatten(-2)


def joined(method: Method, fused: FusedProjections) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the one matrix that several projections are in the dense model."""
    parts = [(p.weight, p.bias) if isinstance(p, nn.Linear) else method.merged(p) for p in fused.children()]

    def join(rows: list[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (fused.heads, -1)) for part in rows], dim=1).flatten(0, 1)

    biases = [bias for _, bias in parts if bias is not None]
    return join([weight for weight, _ in parts]), join(biases) if biases else None


def fusion_of(model: nn.Module, name: str) -> Fusion | None:
    """How the projections of a module of that name are fused; None if it is a single projection."""
    config = getattr(model, "config", None)
    for (model_type, ending), fusion in FUSED.items():
        # a converted model's own type is "lorank_" + the architecture's
        if getattr(config, "model_type", "").removeprefix("lorank_") == model_type and name.endswith(f".{ending}"):
            return fusion(config)
    return None


def with_fused(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The replacements, with those of a fused matrix gathered in one module; projections without replacement stay dense."""
    gathered = set()
    for name, module in replacements.items():
        fused_name = name.rpartition(".")[0]
        fusion = fusion_of(model, fused_name)
        if fusion is None:
            yield name, module
        elif fused_name not in gathered:
            gathered.add(fused_name)
            dense = fusion.split(as_linear(model.get_submodule(fused_name)))
            names = {part: f"{fused_name}.{part}" for part in dense}
            parts = {
                part: replacements[names[part]] if names[part] in replacements else copied(linear)
                for part, linear in dense.items()
            }
            yield fused_name, FusedProjections(parts, fusion.heads)
