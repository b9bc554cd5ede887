"""The experts of a mixture: many equal linear maps in one tensor, of which each token uses a few.

    y_n = W_e x_n (+ b_e)     x [S, d_in], sorted by expert   e the expert of row n   W [E, d_out, d_in]   b [E, d_out]

Architectures of transformers keep them in one module, with the parameters gate_up_proj [E, 2 i, d] and down_proj [E, d, i] or
their transposes, and compute all of them by grouped products. `split` takes the module apart into one layer for each
projection. `Experts` computes what the module computed, with any layers in their place. A layer is called with the rows, the
number of rows up to the end of each expert, `ends` [E], and the expert of each row, `owners` [S].
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_mm

from lorank.layers import ACTIVATIONS, autocast_dtype, entry_std

STACKED = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of a module of experts, each with a bias or without."""


def grouped(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    """Rows of x [S, d_in] times the matrix of their expert, W [E, d_out, d_in]; [S, d_out]."""
    if (dtype := autocast_dtype(x)) is not None:
        x, W = x.to(dtype), W.to(dtype)
    (_, d_out, d_in), aligned = W.shape, 16 // W.element_size()
    if d_in % aligned or d_out % aligned:  # rows must begin at 16 bytes
        columns, rows = -d_in % aligned, -d_out % aligned
        x, W = F.pad(x, (0, columns)), F.pad(W, (0, columns, 0, rows))
    return _grouped_mm(x, W.mT, offs=ends)[:, :d_out]


class ExpertsLinear(nn.Module):
    """y_n = W_e x_n + b_e, dense: W [E, d_out, d_in]   b [E, d_out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)

    def forward(self, x: Tensor, ends: Tensor, owners: Tensor) -> Tensor:
        return with_bias(grouped(x, self.weight, ends), self.bias, owners)

    def copied(self) -> "ExpertsLinear":
        """The same in new memory."""
        copy = lambda t: t.detach().clone(memory_format=torch.contiguous_format)  # noqa: E731
        made = ExpertsLinear(copy(self.weight), None if self.bias is None else copy(self.bias))
        return made.requires_grad_(self.weight.requires_grad).train(self.training)


class LowRankExperts(nn.Module):
    """y_n = B_e σ(A_e x_n) + b_e; σ is "silu", "gelu", "relu", or None for a linear map.

    x [S, d_in]   A [E, r, d_in]   B [E, d_out, r]   b [E, d_out]
    """

    silent: tuple[str, ...] = ("B", "bias")

    def __init__(
        self,
        experts: int,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        bias: bool = False,
        activation: str | None = None,
        **options: Any,
    ):
        super().__init__()
        self.activation = activation
        self.A = nn.Parameter(torch.empty(experts, rank, d_in, **options))
        self.B = nn.Parameter(torch.empty(experts, d_out, rank, **options))
        self.bias = nn.Parameter(torch.empty(experts, d_out, **options)) if bias else None
        LowRankExperts.reset_parameters(self)  # a subclass's own parameters do not exist yet

    def reset_parameters(self) -> None:
        """Draw each expert's factors as `lorank.layers.LowRankLinear` draws one layer's."""
        (_, rank, d_in), d_out = self.A.shape, self.B.shape[1]
        s = entry_std(d_in, d_out, rank)
        nn.init.normal_(self.A, std=s)
        nn.init.normal_(self.B, std=s)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(d_out**-0.5), d_out**-0.5)

    def forward(self, x: Tensor, ends: Tensor, owners: Tensor) -> Tensor:
        z = grouped(x, self.A, ends)  # [S, r]
        z = z if self.activation is None else ACTIVATIONS[self.activation](z)
        return with_bias(grouped(z, self.B, ends), self.bias, owners)

    def extra_repr(self) -> str:
        (experts, rank, d_in), d_out = self.A.shape, self.B.shape[1]
        sizes = f"experts={experts}, d_in={d_in}, d_out={d_out}, rank={rank}"
        return sizes if self.activation is None else f"{sizes}, activation={self.activation}"


def with_bias(y: Tensor, bias: Tensor | None, owners: Tensor) -> Tensor:
    return y if bias is None else y + bias[owners].to(y.dtype)


# ---- modules of experts


class Experts(nn.Module):
    """What a module of experts of transformers computes, with other layers in place of its stacked weights.

    Attributes, activation and norm are the module's, and so is the way in which gate and up are combined.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    post_expert_norm: nn.Module
    has_gate: bool
    has_post_expert_norm: bool
    is_concatenated: bool

    def __init__(self, module: nn.Module, parts: Mapping[str, nn.Module]):
        super().__init__()
        own = vars(self).keys()
        vars(self).update({name: value for name, value in vars(module).items() if name not in own})
        self.combines: Any = type(module)
        for name, child in [*module.named_children(), *parts.items()]:
            self.add_module(name, child)
        self.train(module.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        k, d = top_k_index.shape[-1], hidden_states.shape[-1]
        owners, order = torch.sort(top_k_index.reshape(-1))
        ends = ends_of(owners, self.down_proj)
        x = hidden_states[order // k]  # [S, d], S = k times the tokens
        y = self.up_proj(x, ends, owners)
        if self.has_gate:
            y = self.combines._apply_gate(self, self._joined(self.gate_proj(x, ends, owners), y))
        else:
            y = self.act_fn(y)
        y = self.down_proj(y, ends, owners)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order][:, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return y[back].view(-1, k, d).sum(1).to(hidden_states.dtype)

    def _joined(self, gate: Tensor, up: Tensor) -> Tensor:
        both = torch.cat([gate, up], -1)
        if self.is_concatenated:
            return both
        order = torch.arange(both.shape[-1], device=both.device).view(2, -1).T.flatten()
        return both.index_select(-1, order)  # by index, because the grouped product needs gradients without gaps


class SortedExperts(nn.Module):
    """JetMoE's module of experts, whose rows come sorted and with the number of each expert's; gate and up are one output."""

    def __init__(self, module: nn.Module, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name or "all", part)
        self.train(module.training)

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        sizes = torch.tensor(expert_size, device=inputs.device)
        owners = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes, output_size=len(inputs))
        ends = sizes.cumsum(0, dtype=torch.int32)
        return torch.cat([part(inputs, ends, owners) for part in self.children()], dim=-1)


def ends_of(owners: Tensor, layer: nn.Module) -> Tensor:
    """Rows up to the end of each expert, int32 [E], from the experts of the rows in order."""
    experts = next(layer.parameters()).shape[0]
    return torch.searchsorted(owners, torch.arange(experts, device=owners.device), right=True).int()


def split(module: nn.Module, name: str) -> dict[str, ExpertsLinear]:
    """One dense layer for each projection of a module of experts, which share its memory; empty if it is none that is known.

    Args:
        name: the module's in its model; JetMoE's experts have gate and up in one matrix in its MLP only.
    """
    own = dict(module.named_parameters(recurse=False))
    if _is_sorted(module) and own.keys() == {"weight"}:
        W = own["weight"]
        gate_and_up = {"gate_proj": W[:, : W.shape[1] // 2], "up_proj": W[:, W.shape[1] // 2 :]}
        projections = gate_and_up if name.endswith("mlp.input_linear") else {"": W}
        return {part: ExpertsLinear(weight, None) for part, weight in projections.items()}
    stacks = {name: own.pop(name) for name in STACKED if name in own}
    biases = {name: own.pop(f"{name}_bias") for name in stacks if f"{name}_bias" in own}
    ours = hasattr(module, "is_transposed") and hasattr(
        module, "has_post_expert_norm"
    )  # transformers' experts interface
    if not ours or own or "down_proj" not in stacks or any(stack.ndim != 3 for stack in stacks.values()):
        return {}
    parts = {}
    for name, stack in stacks.items():
        weight, bias = stack.mT if module.is_transposed else stack, biases.get(name)
        if name == "gate_up_proj":
            for part, rows in _gate_and_up(module).items():
                parts[part] = ExpertsLinear(weight[:, rows], None if bias is None else bias[:, rows])
        else:
            parts[name] = ExpertsLinear(weight, bias)
    return parts


def _is_sorted(module: nn.Module) -> bool:
    """Whether a module of experts gets its rows sorted, as JetMoeParallelExperts."""
    return type(module).__name__.endswith("ParallelExperts")


def _gate_and_up(module: Any) -> dict[str, slice]:
    """Which rows of gate_up_proj [E, 2 i, d] are whose."""
    if not module.is_concatenated:
        return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    half = module.gate_up_proj.shape[2 if module.is_transposed else 1] // 2
    return {"gate_proj": slice(None, half), "up_proj": slice(half, None)}


def with_parts(module: nn.Module, name: str, parts: Mapping[str, nn.Module]) -> nn.Module:
    """What computes as the module of that name with these layers; projections that are not among them stay dense."""
    layers = {part: parts[part] if part in parts else dense.copied() for part, dense in split(module, name).items()}
    return (SortedExperts if _is_sorted(module) else Experts)(module, layers)


@torch.no_grad()
def joined(module: nn.Module, name: str, weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> nn.Module:
    """The module of that name, which has no data, with these weights [E, d_out, d_in] and biases."""
    some = next(iter(weights.values()))[0]
    module.to_empty(device=some.device).to(some.dtype)
    for part, dense in split(module, name).items():
        weight, bias = weights[part]
        dense.weight.copy_(weight)  # shares the module's memory
        if dense.bias is not None and bias is not None:
            dense.bias.copy_(bias)
    return module
