"""What is known about architectures by name: fused matrices, attention, gates, activations, and linear layers."""

import functools
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from lorank.sizes import find_size

ACTIVATIONS: tuple[Any, ...] = tuple(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())
"""Classes of the non-linearity that a block has."""
GATE = re.compile(
    r"(gate_proj|(?:gate_up_proj|Wi|input_linear|fc1|fc1\.proj)\.gate|c_fc|fc1|fc_in|dense_h_to_4h|intermediate\.dense|lin1|wi_0|wi|w1)$"
)
"""Names of the projection whose output is the input of a block's own activation."""
OUTPUT = re.compile(
    r"(?:^|[._])(o_proj|out_proj|out_lin|c_proj|down_proj|fc2|fc_out|lin2|wo|w2|dense_4h_to_h|linear_out|(?:Self|EncDec)Attention\.o|(?:output|attention|attn|attn_output)\.dense)$"
)
"""Names of the projections that write to the residual stream: attention's last and the MLP's last."""
ATTENTION = re.compile(
    r"(?:^|\.)(?:self_)?(?:attn|attention)\.(?:\w+\.)*"
    r"(?:(?P<query>q_proj|q_lin|query)|(?P<key>k_proj|k_lin|key)|(?P<value>v_proj|v_lin|value)"
    r"|(?P<output>o_proj|out_proj|out_lin|c_proj|dense))$"
)
"""Names of the four projections of self-attention, without cross-attention."""
ROUTER = re.compile(r"router|^(?:shared_)?(?:expert_)?gate$|^wg$|^gating$")
"""Names of what chooses the experts of a mixture, next to which they are; "router" is one anywhere."""
ROUTER_CLASS = re.compile(r"Router|TopK|M[Oo][Ee]\w*Gat(?:e|ing)$")
"""The same for classes: JetMoeTopKGating, HunYuanMoEV1Gate."""
EXPERTS = re.compile(r"(?:^|_)experts?$")
"""Names of the module that holds a mixture's experts."""
EXPERTS_CLASS = re.compile(r"Experts")
"""Classes of modules with the weights of all experts: MixtralExperts, JetMoeParallelExperts, lorank's LowRankExperts."""


def projection_type(name: str) -> str | None:
    """ "query", "key", "value" or "output" by a module's full name; None outside self-attention.

    >>> projection_type("transformer.h.0.attn.c_attn.query"), projection_type("transformer.h.0.mlp.c_proj")
    ('query', None)
    """
    found = ATTENTION.search(name)
    return found and found.lastgroup


# ---- linear layers


def is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D) or _computes_linear_map(type(module))  # type: ignore[arg-type]


@functools.cache
def _computes_linear_map(kind: Any) -> bool:
    """Whether a class overrides only `forward` of nn.Linear, and that still computes x Wᵀ + b (Falcon's). Other derived classes
    (quantised, tensor-parallel, routers) do something else."""
    own = {name for name in vars(kind) if not (name.startswith("__") and name != "__init__")}
    if kind.__mro__[1:] != nn.Linear.__mro__ or own != {"forward"}:
        return False
    layer: Any = kind(3, 2, device="meta", dtype=torch.float64).to_empty(device="cpu")  # draws no random numbers
    with torch.inference_mode(), torch.device("cpu"):
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.linspace(-1, 2 + number, parameter.numel()).view_as(parameter))
        x = torch.linspace(-3, 1, 12, dtype=torch.float64).view(2, 2, 3)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        try:
            found = layer(x)
        except Exception:  # it needs more than an input
            return False
        return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def as_linear(module: nn.Module) -> nn.Linear:
    """The module itself, or for a Conv1D (weight [d_in, d_out]) the equal nn.Linear."""
    if isinstance(module, nn.Linear):
        return module
    assert isinstance(module, Conv1D)
    return dense_layer(module.weight.T, module.bias, module.training)


def dense_layer(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    """A layer with a weight [d_out, d_in] and a bias, which it shares."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear.train(training)


def copied(linear: nn.Linear) -> nn.Linear:
    """The same layer with its tensors copied, contiguous as safetensors needs them."""
    bias = None if linear.bias is None else linear.bias.clone()
    return dense_layer(linear.weight.clone(memory_format=torch.contiguous_format), bias, linear.training)


def as_conv1d(linear: nn.Linear) -> Conv1D:
    conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    conv.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias.detach())
    return conv.train(linear.training)


# ---- mixtures of experts


def routers(block: nn.Module) -> dict[str, str]:
    """The modules of a block that choose experts, and all inside them: {name: the part of the name that says router}.

    They are known by their name, by their class, or because they are a linear map to as many numbers as there are experts,
    next to these.
    """
    found: dict[str, str] = {}
    for name, module in block.named_modules():
        parent, _, last = name.rpartition(".")
        if parent in found:
            found[name] = found[parent]
        elif name and not EXPERTS.search(last) and _routes(last, module, _experts_in(block.get_submodule(parent))):
            found[name] = last
    return found


def _routes(name: str, module: nn.Module, experts: int) -> bool:
    if "router" in name or ROUTER_CLASS.search(type(module).__name__):
        return True
    return experts > 1 and (
        ROUTER.search(name) is not None or (isinstance(module, nn.Linear) and module.out_features == experts)
    )


def _experts_in(module: nn.Module) -> int:
    """How many experts a module has as a direct child; 0 if none."""
    for name, child in module.named_children():
        if EXPERTS.search(name) and "shared" not in name:
            stacked = [p.shape[0] for p in child.parameters(recurse=False) if p.ndim == 3]
            return stacked[0] if stacked else len(list(child.children()))
    return 0


# ---- our own shapes


def llama_config(size: str, *, vocab_size: int = 32_000, sequence_length: int = 256) -> LlamaConfig:
    """The dense Llama of a size: RMSNorm eps 1e-6, RoPE theta 10,000, SiLU, untied embeddings, initial range 0.02.

    It has no padding token: set `pad_token_id` if your tokenizer has one that never occurs in text.
    """
    shape = find_size(size)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=max(1024, sequence_length),
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        hidden_act="silu",
        initializer_range=0.02,
        tie_word_embeddings=False,
    )
