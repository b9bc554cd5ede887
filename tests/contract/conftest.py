"""The optimizers that are examined, on a model of an embedding and two layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank import GaLore, Method
from lorank.optim.driver import ByGroups, Projected
from lorank.table import find, method_names

NAMES = [name for name in method_names("optimizer") if issubclass(find(name), ByGroups)]
"""All but AdamW, which is torch's."""
LR = {"trion": 0.02, "adafactor": 0.02, "spectron": 0.1}
RULED = {name: name for name in ("muon", "spectron", "loro")}
"""Methods whose matrices have a rule of their own. `net` has a pair of factors: its first layer, A, and its second, B."""
RULES = [GaLore(rule=rule, update_gap=2) for rule in ("adamw-8bit", "adafactor", "muon")]
"""GaLore with another rule inside is examined with the methods."""
OPTIONS: list[Method] = [
    GaLore(update_gap=2, in_backward=True, projection="reverse_std"),
    GaLore(update_gap=2, projection="full", basis="svd"),
    GaLore(update_gap=2, projection="left", basis="randomised"),
    find("dct-adamw")(error_feedback="full", transform="fft"),
    find("dct-adamw")(error_feedback="8bit"),
    find("trion")(transform="fft"),
]
"""Settings under which state and work differ."""


def named(method: Method) -> str:
    changed = {k: v for k, v in method.to_dict().items() if v != type(method)().to_dict()[k] and k != "update_gap"}
    return "-".join([method.name, *map(str, changed.values())])


METHODS: list[Any] = [find(name)(**find(name).soon) for name in NAMES] + RULES
NEED_BITSANDBYTES = {"adamw-8bit", "galore-adamw-8bit"}


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Wide enough that some moments of 8-bit AdamW have a byte each, also inside a subspace."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 12), nn.Linear(12, 80), nn.Tanh(), nn.Linear(80, 70)).to(dtype)


def groups(model: nn.Module, method: Method, rank: int = 8) -> list[dict[str, Any]]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("0.")]
    rest = [p for p in model.parameters() if p not in set(matrices)]
    chosen: dict[str, Any] = {"rank": rank} if isinstance(method, Projected) else {}
    chosen |= {"rule": RULED[method.name]} if method.name in RULED else {}
    return [{"params": matrices, "weight_decay": 0.1, **chosen}, {"params": rest, "weight_decay": 0.0}]


def make(method: Method, model: nn.Module) -> Any:
    return method.optimizer(groups(model, method), lr=LR.get(method.name, 0.01), betas=(0.9, 0.99), eps=1e-8)


def train(model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(step))
        target = torch.sin(torch.arange(70.0) * (x[:, None] + 1))
        loss = (model(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.fixture(autouse=True)
def _bitsandbytes(request: pytest.FixtureRequest) -> None:
    method = request.node.callspec.params.get("method") if hasattr(request.node, "callspec") else None
    if isinstance(method, Method) and named(method) in NEED_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
