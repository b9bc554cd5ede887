"""Helpers for the tests of SST."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorank import SST, convert, step_hook
from lorank.methods.sst import SSTLinear

SHAPES = [(12, 20), (20, 12), (16, 16)]


SHORT = {"rank": 0.5, "interval": 2, "restart_warmup_steps": 1}
"""Swaps after steps 2, 4, 6, ...; with half of all pairs active a round is two iterations: new SVDs after 4, 8, ..."""


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def layer_of(d_in: int, d_out: int, rank: int, weight: Tensor | None = None, **options: Any) -> SSTLinear:
    torch.manual_seed(0)
    layer = SSTLinear(d_in, d_out, rank, dtype=torch.float64, **options)
    if weight is not None:
        layer.start_from(weight)
    return layer


def factors(layer: SSTLinear) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, m], S [m], V [d_in, m] in the layer's order of places."""
    U = torch.cat([layer.U_active.detach(), layer.U_frozen], 1)
    V = torch.cat([layer.V_active.detach(), layer.V_frozen], 1)
    return U, layer.S.detach(), V


def product(layer: SSTLinear) -> Tensor:
    U, S, V = factors(layer)
    return torch.einsum("oi,i,ji->oj", U.double(), S.double(), V.double())


def pairs(layer: SSTLinear) -> dict[int, tuple[Tensor, ...]]:
    """(u, s, v) by the number that `index` gives each pair, wherever it is."""
    U, S, V = factors(layer)
    return {int(n): (U[:, i].clone(), S[i].clone(), V[:, i].clone()) for i, n in enumerate(layer.index)}


def layers_of(model: nn.Module) -> list[SSTLinear]:
    return [module for module in model.modules() if isinstance(module, SSTLinear)]


def assert_orthonormal(layer: SSTLinear, tolerance: float = 1e-5) -> None:
    for Q in factors(layer)[::2]:
        assert (Q.T @ Q - torch.eye(Q.shape[1], dtype=Q.dtype)).abs().max() < tolerance


def train(model: Any, optimizer: Any, tokens: Tensor, steps: range) -> None:
    for step in steps:
        ids = tokens.roll(step, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def prepared(small: Callable[..., Any], lr: float = 1e-2, seed: int = 3, **options: Any) -> tuple[Any, Any, Any]:
    model = convert(small("llama"), SST(**{**SHORT, **options})).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    return model, optimizer, step_hook(model, optimizer, steps=8, seed=seed)
