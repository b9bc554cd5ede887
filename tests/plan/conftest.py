"""What several tests of plans count or need: three small forecasts, models with experts, tables as text."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig

from lorank.accelerators import Fleet, find_accelerator
from lorank.plan import forecast
from lorank.train.budget import Budget
from lorank.train.recipe import Recipe

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 4, "head_dim": 32},
}


@pytest.fixture(scope="session")
def save_mixture() -> Callable[..., dict[str, Any]]:
    """save_mixture(kind, folder, **changes): writes its configuration there; settings of a recipe that reads it."""

    def save(kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
        shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        AutoConfig.for_model(kind, **{**shape, **EXPERTS[kind], **changes}).save_pretrained(folder / kind)
        return {"model": str(folder / kind), "method": "dense", "vocab_size": 1000}

    return save


@pytest.fixture(scope="session")
def tiny() -> list[forecast.Forecast]:
    """Of dense, cola and cola-m on eight devices, counted once."""
    shape = Recipe(vocab_size=300, sequence_length=32, batch_size=16, micro_batch_size=2)
    fleet = Fleet(accelerator=find_accelerator("h100"), devices=8)
    return forecast.forecast_all([shape], ["dense", "cola", "cola-m"], fleet=fleet, budget=Budget(tokens=10_000_000))


@pytest.fixture
def printed() -> Callable[[Any], str]:
    """What a terminal of 300 columns shows."""

    def show(what: Any) -> str:
        console = Console(width=300, file=io.StringIO())
        console.print(what)
        return console.file.getvalue()  # type: ignore[attr-defined]

    return show
