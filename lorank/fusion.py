"""Projections that an architecture keeps in one matrix: GPT-2's query, key and value, Phi-3's gate and up.

    fused [sum of sizes, d_in]  ->  one projection [size, d_in] each  ->  joined again behind one output

Each of them is a site of its own, because one bottleneck for all three would be another method.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorank.parametrization import Parametrization


def as_linear(module: nn.Module) -> nn.Linear:
    """The module itself, or a Conv1D (weight [d_in, d_out]) seen as the nn.Linear it amounts to."""
    if isinstance(module, nn.Linear):
        return module
    assert isinstance(module, Conv1D)
    return dense_layer(module.weight.T, module.bias, module.training)


def dense_layer(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    """The layer of a weight [d_out, d_in], which it shares, and a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear.train(training)


def copied(linear: nn.Linear) -> nn.Linear:
    """The same layer in memory of its own, contiguous as safetensors wants it."""
    bias = None if linear.bias is None else linear.bias.clone()
    return dense_layer(linear.weight.clone(memory_format=torch.contiguous_format), bias, linear.training)


class Fusion(NamedTuple):
    """How one matrix [sum of sizes, d_in] is made of several projections' rows."""

    sizes: dict[str, int]
    """Rows of each projection, by name."""
    heads: int = 1
    """Groups in which the rows alternate: 1 means one projection after another, h that each head has all of them."""

    def rows(self, fused: Tensor) -> dict[str, Tensor]:
        """Each projection's rows of anything that has one row for each output: a weight, a bias, outputs [d_out, n]."""
        grouped = fused.unflatten(0, (self.heads, -1)).split([n // self.heads for n in self.sizes.values()], dim=1)
        return dict(zip(self.sizes, (part.flatten(0, 1) for part in grouped), strict=True))

    def split(self, linear: nn.Linear) -> dict[str, nn.Linear]:
        """One dense layer per projection, with that projection's rows of the fused weight and bias."""
        biases = dict.fromkeys(self.sizes) if linear.bias is None else self.rows(linear.bias)
        return {
            name: dense_layer(weight, biases[name], linear.training)
            for name, weight in self.rows(linear.weight).items()
        }


class FusedProjections(nn.Module):
    """Several projections behind the one output [..., sum of sizes] that the architecture's code splits again."""

    def __init__(self, parts: Mapping[str, nn.Module], heads: int):
        super().__init__()
        self.heads = heads
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x).unflatten(-1, (self.heads, -1)) for part in self.children()]
        return torch.cat(outputs, dim=-1).flatten(-2)


def joined(method: Parametrization, fused: FusedProjections) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the one matrix that several projections were."""
    parts = [(p.weight, p.bias) if isinstance(p, nn.Linear) else method.merged(p) for p in fused.children()]

    def join(rows: list[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (fused.heads, -1)) for part in rows], dim=1).flatten(0, 1)

    biases = [bias for _, bias in parts if bias is not None]
    return join([weight for weight, _ in parts]), join(biases) if biases else None


def _thirds(config: Any) -> Fusion:
    return Fusion(dict.fromkeys(("query", "key", "value"), config.hidden_size))


def _thirds_by_head(config: Any) -> Fusion:
    return Fusion(dict.fromkeys(("query", "key", "value"), config.hidden_size), heads=config.num_attention_heads)


def _grouped_query(config: Any) -> Fusion:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * head
    return Fusion({"query": config.num_attention_heads * head, "key": kv, "value": kv})


def _gate_and_up(config: Any) -> Fusion:
    return Fusion(dict.fromkeys(("gate", "up"), config.intermediate_size))


FUSED: dict[tuple[str, str], Callable[[Any], Fusion]] = {
    ("gpt2", "attn.c_attn"): _thirds,
    ("gpt2", "crossattention.c_attn"): lambda config: Fusion(dict.fromkeys(("key", "value"), config.hidden_size)),
    ("gpt_neox", "attention.query_key_value"): _thirds_by_head,
    ("bloom", "self_attention.query_key_value"): _thirds_by_head,
    ("mpt", "attn.Wqkv"): _thirds,
    ("phi3", "self_attn.qkv_proj"): _grouped_query,
    ("phi3", "mlp.gate_up_proj"): _gate_and_up,
    ("glm", "mlp.gate_up_proj"): _gate_and_up,
    ("glm4", "mlp.gate_up_proj"): _gate_and_up,
}
"""(model type, end of the module's name) -> its parts. Other architectures' fused matrices count as one projection."""


def fusion_of(model: nn.Module, name: str) -> Fusion | None:
    """How the projections of a module of that name are fused; None if it is a single one."""
    config = getattr(model, "config", None)
    for (model_type, ending), fusion in FUSED.items():
        # a converted model's own type is "lorank_" + the architecture's
        if getattr(config, "model_type", "").removeprefix("lorank_") == model_type and name.endswith(f".{ending}"):
            return fusion(config)
    return None


def with_fused(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The replacements, those of one fused matrix gathered in one module; its projections not replaced stay dense."""
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
