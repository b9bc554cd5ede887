"""The optimizers that are examined, on a model of an embedding and two layers."""

from typing import Any

import pytest
from torch import nn

from lorank import GaLore, Method
from lorank.optim.driver import ByGroups
from lorank.table import find, method_names
from lorank.testing.movement import Mover

NAMES = [name for name in method_names("optimizer") if issubclass(find(name), ByGroups) and name != "adamw"]
"""All but AdamW, which is torch's unless it rounds by chance."""
LR = {"trion": 0.02, "adafactor": 0.02, "spectron": 0.1}
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


METHODS: list[Any] = (
    [find(name)(**find(name).soon) for name in NAMES] + RULES + [find("adamw")(stochastic_rounding=True)]
)
NEED_BITSANDBYTES = {"adamw-8bit", "galore-adamw-8bit"}


def mover(method: Method) -> Mover:
    return Mover(method, LR.get(method.name, 0.01))


def groups(model: nn.Module, method: Method, rank: int = 8) -> list[dict[str, Any]]:
    return mover(method).groups(model, rank)


def make(method: Method, model: nn.Module) -> Any:
    return mover(method).make(model)


@pytest.fixture(autouse=True)
def _bitsandbytes(request: pytest.FixtureRequest) -> None:
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    method = given["check"].subject.method if "check" in given else given.get("method")
    if isinstance(method, Method) and named(method) in NEED_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
