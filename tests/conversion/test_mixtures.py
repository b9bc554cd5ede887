"""Mixtures of experts: routers are left alone, and what is saved is what is loaded."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorank import CoLA, convert
from lorank.layers import LowRankLinear
from lorank.sites import find_sites

pytestmark = pytest.mark.filterwarnings("ignore:.*of the blocks' parameters dense:UserWarning")
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_channels": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_dense_layers": 1,
}


def mixture(kind: str, folder: Path) -> Any:
    """A small mixture with a configuration from a file, as users have it."""
    known = vars(AutoConfig.for_model(kind)).keys() | type(AutoConfig.for_model(kind)).attribute_map.keys()
    settings = {name: value for name, value in SHAPE.items() if name in known}
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **settings}))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


class OldMixture(nn.Module):
    """Experts one by one, and a router that only its place tells from another linear layer."""

    def __init__(self, router: str):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.add_module(router, nn.Linear(16, 4, bias=False))
        self.up_proj = nn.Linear(16, 64)


def rewritten(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


ROUTERS = {"jetmoe": r"router\.layer$", "afmoe": r"router\.gate$"}


@pytest.mark.parametrize(("kind", "pattern"), ROUTERS.items(), ids=ROUTERS)
def test_routers_stay_dense(kind: str, pattern: str, tmp_path: Path) -> None:
    for targets in (None, ".*", ["attn|attention", "mlp"]):
        names = rewritten(convert(mixture(kind, tmp_path), CoLA(rank=2), targets=targets))
        assert names and not any("router" in name for name in names)
    names = rewritten(convert(mixture(kind, tmp_path), CoLA(rank=2), targets=pattern))
    assert names and all("router" in name for name in names), "a pattern that names it reaches it"


@pytest.mark.parametrize("router", ["gate", "wg", "expert_choice"])
def test_routers_are_known_by_what_is_next_to_them(router: str) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([OldMixture(router), OldMixture(router)])})
    assert {site.name for site in find_sites(model) if site.router} == {f"blocks.{depth}.{router}" for depth in (0, 1)}


def test_targets_that_reach_no_more_than_a_router_must_name_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="targets must name a router to reach it, got 'mlp', which matches only"):
        convert(mixture("jetmoe", tmp_path), CoLA(rank=2), targets="mlp")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "jetmoe", "granitemoe"])
def test_a_saved_mixture_is_the_one_that_was_converted(kind: str, tmp_path: Path) -> None:
    model = convert(mixture(kind, tmp_path), CoLA(rank=4))
    for folder, one in (("first", model), ("second", None)):
        saved = one or AutoModelForCausalLM.from_pretrained(tmp_path / "first")
        saved.save_pretrained(tmp_path / folder)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        found = loaded.state_dict()
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_experts_that_stay_dense_are_named_with_their_share(tmp_path: Path) -> None:
    experts = 4 * 3 * 32 * 48
    block = experts + 4 * 32 * 32 + 4 * 32 + 2 * 32  # attention, router, norms
    said = rf"leaves {experts / block * 100:.3g} % of .* dense, experts .*gate_up_proj \({experts / block * 200 / 3:.3g} %\)"
    with pytest.warns(UserWarning, match=said):
        convert(mixture("mixtral", tmp_path), "relora")
    with warnings.catch_warnings(action="error"):  # whoever chooses knows what is left
        convert(mixture("mixtral", tmp_path), "relora", targets=".*")
