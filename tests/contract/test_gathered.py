"""Every collective operation of a step in one of two processes is what optimizers say that they gather. test_processes.py compares the same
from inside, and faster."""

import importlib.util
from typing import Any

import pytest
import torch

from lorank import Fira, Method
from lorank.table import find
from tests.contract.conftest import METHODS, NEED_BITSANDBYTES, OPTIONS, named
from tests.contract.gathering import Collectives
from tests.contract.two_processes import groups, net, shard
from tests.distributed.together import together

HALF = [find(name)(stochastic_rounding=True) for name in ("adamw", "muon")] + [Fira(residual="paper", update_gap=2)]
"""Methods that gather more of weights in bfloat16."""


def counted(method: Method, dtype: torch.dtype | None = None) -> tuple[float, float]:
    """What `gathered_bytes` says of a step, and what the second and third have in the mean, of which one finds bases. All sizes are
    even, because parts are filled up to equal ones."""
    model: Any = net(named(method) in NEED_BITSANDBYTES, experts=2)
    model = shard(model if dtype is None else model.to(dtype))
    optimizer: Any = method.optimizer(groups(model, method, rank=4), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    with Collectives() as seen:
        for step in range(3):
            seen.bytes *= step != 1
            for i, p in enumerate(model.parameters()):
                p.grad = (p.detach() + i + step).sin()
            optimizer.step()
    said = sum(method.gathered_bytes(p, group) for group in optimizer.param_groups for p in group["params"])
    return said, seen.bytes / 2


@pytest.mark.slow
def test_every_collective_operation_is_counted() -> None:
    has_it = importlib.util.find_spec("bitsandbytes") is not None
    usual = [method for method in METHODS + OPTIONS[1:] if has_it or named(method) not in NEED_BITSANDBYTES]
    one_by_one = [(method, None) for method in usual] + [(method, torch.bfloat16) for method in HALF]
    found = together(lambda: [counted(*each) for each in one_by_one], 2)[0]
    said, there = (
        {f"{named(m)} {t}": pair[i] for (m, t), pair in zip(one_by_one, found, strict=True)} for i in range(2)
    )
    assert said == there
    assert sorted(name for name, size in said.items() if not size) == ["adamw-True None", "factor-lr None"]
