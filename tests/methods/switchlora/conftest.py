"""Helpers for the tests of SwitchLoRA."""

from typing import Any

import torch
from torch import Tensor, nn

from lorank import SwitchLoRA, convert, step_hook
from lorank.optim.adamw import VectorAdamW


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """One block of one linear map, the least that can be converted."""

    def __init__(self, d_in: int, d_out: int, dtype: torch.dtype):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(d_in, d_out, dtype=dtype))])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class Bench:
    """A converted Net with optimizer and hook, to be driven by hand."""

    def __init__(self, d_in: int, d_out: int, lr: float = 0.0, dtype: torch.dtype = torch.float64, **method: Any):
        torch.manual_seed(0)
        self.method = SwitchLoRA(**method)
        self.model = convert(Net(d_in, d_out, dtype), self.method)
        self.layer: Any = self.model.layers[0][0]
        self.A, self.B, self.W = (getattr(self.layer, name).weight for name in "ABW")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = VectorAdamW(trained, lr=lr, eps=1e-30, weight_decay=0.0)

    def attach(self, steps: int = 100, seed: int = 5) -> "Bench":
        self.hook: Any = step_hook(self.model, self.optimizer, steps=steps, seed=seed)
        self.a, self.b = self.hook.pools["layers.0.0"]
        return self

    def step(self, gradient: float = 1.0) -> None:
        for parameter in (self.A, self.B, self.layer.W.bias):
            parameter.grad = torch.full_like(parameter, gradient)
        self.optimizer.step()

    def weight(self) -> Tensor:
        """[d_out, d_in], what the layer amounts to."""
        return (self.W + self.B @ self.A / len(self.A)).detach()


ALWAYS: dict[str, Any] = {"ratio": 1e9}  # the highest frequency throughout: r / interval each step
