"""Small matrices and their gradients by step, and a net of two layers."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank.optim.driver import ByGroups
from lorank.optim.step import LowRankOptimizer


@pytest.fixture
def as_torchs_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon's products in bfloat16, as torch's on every device and ours on accelerators."""
    monkeypatch.setattr("lorank.optim.muon.products_in", lambda dtype, device: torch.bfloat16)


def matrices(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def gradients(step: int, parameters: list[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in parameters]


def run(optimizer: Any, parameters: list[nn.Parameter], steps: range, sign: float = 1.0) -> None:
    for step in steps:
        for p, gradient in zip(parameters, gradients(step, parameters), strict=True):
            p.grad = sign * gradient
        optimizer.step()
        optimizer.zero_grad()


def made(
    kind: type[ByGroups], params: Iterable[Any], *, weight_decay: float | None = None, **settings: Any
) -> LowRankOptimizer:
    """Of a method; lr, betas and eps are for its optimizer, the rest are its fields. Bare parameters have no rank."""
    groups = list(params)
    groups = groups if isinstance(groups[0], dict) else [{"params": groups, "rank": None}]
    if weight_decay is not None:
        groups = [{"weight_decay": weight_decay, **group} for group in groups]
    common = {name: settings.pop(name) for name in ("lr", "betas", "eps") if name in settings}
    return kind(**settings).optimizer(groups, **common)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).double()


def groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Matrices at rank 3, and biases."""
    projected = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [{"params": projected, "rank": 3, **settings}, {"params": rest}]


def train(model: nn.Module, optimizer: Any, steps: range, parts: int = 1, clip: float | None = None) -> list[float]:
    """Losses of steps on batches of 12 rows, in so many micro-batches."""
    losses = []
    for step in steps:
        x = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        total = 0.0
        for part in x.to(next(model.parameters()).dtype).chunk(parts):
            loss = (model(part) - part[:, :8].sin()).square().mean() / parts
            loss.backward()
            total += loss.item()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(optimizer.seen_parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
