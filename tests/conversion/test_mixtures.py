"""Mixtures of experts: routers are left alone, and what is saved is what is loaded."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorank import CoLA, CoLAM, LowRank, SLTrain, convert, merge
from lorank.accounting import measure_saved
from lorank.experts import LowRankExperts
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
    with pytest.raises(ValueError, match=r"targets must name a router to reach it, got 'layer\$', which matches only"):
        convert(mixture("jetmoe", tmp_path), CoLA(rank=2), targets="layer$")


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
    for everything in (".*", ["self_attn", r"experts|q_proj"]):
        with pytest.warns(UserWarning, match=said):
            convert(mixture("mixtral", tmp_path), "relora", targets=everything)


@pytest.mark.parametrize(
    ("method", "chosen"),
    [
        ("relora", {"targets": "self_attn"}),
        ("relora", {"targets": r"layers\.\d+\.self_attn\.[qkvo]_proj"}),
        ("cola", {"exclude": "experts"}),
        ("cola", {"exclude": r"experts\.(gate|up|down)_proj"}),
        ("cola", {"targets": ".*"}),
    ],
)
def test_what_the_user_leaves_out_is_not_reported(method: str, chosen: dict[str, str], tmp_path: Path) -> None:
    with warnings.catch_warnings(action="error"):
        convert(mixture("mixtral", tmp_path), method, **chosen)


# ---- low-rank experts


def with_rank(method: str) -> Any:
    return {"low-rank": LowRank(rank=6), "cola": CoLA(rank=6), "sltrain": SLTrain(rank=6, density=0.1)}[method]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "jetmoe"])  # plain, interleaved with biases, sorted
@pytest.mark.parametrize("method", ["low-rank", "sltrain"])
def test_low_rank_experts_compute_what_their_dense_equals_do(kind: str, method: str, tmp_path: Path) -> None:
    model = convert(mixture(kind, tmp_path), with_rank(method))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # of biases too
    dense, tokens = merge(model), torch.arange(24).view(2, 12)
    dense.set_experts_implementation("eager")
    assert "lorank" not in dense.config.to_dict()
    assert {name: p.shape for name, p in dense.named_parameters()} == {
        name: p.shape for name, p in mixture(kind, tmp_path).named_parameters()
    }
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


def test_gradients_of_low_rank_experts_are_those_of_each_expert() -> None:
    layer, x = LowRankExperts(3, 5, 7, 2, activation="silu"), torch.randn(6, 5)
    owners = torch.tensor([0, 0, 0, 2, 2, 2])
    y = layer(x, torch.tensor([3, 3, 6], dtype=torch.int32), owners)
    expected = torch.stack([layer.B[e] @ F.silu(layer.A[e] @ row) for e, row in zip(owners, x, strict=True)])
    torch.testing.assert_close(y, expected)
    for mine, other in zip(
        *(torch.autograd.grad(out.square().sum(), [layer.A, layer.B]) for out in (y, expected)), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("method", ["low-rank", "cola", "sltrain"])
def test_parameters_of_experts_are_counted_and_saved(method: str, tmp_path: Path) -> None:
    model = convert(mixture("mixtral", tmp_path), with_rank(method))
    each = 4 * 3 * 6 * (32 + 48) + (4 * 3 * int(0.1 * 32 * 48) if method == "sltrain" else 0)
    experts = model.model.layers[0].mlp.experts
    assert sum(p.numel() for p in experts.parameters()) == each
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["low-rank", "cola", "sltrain"])
def test_experts_compute_under_autocast(method: str, tmp_path: Path) -> None:
    model, tokens = convert(mixture("mixtral", tmp_path), with_rank(method)).train(), torch.arange(24).view(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    expected = model(tokens, labels=tokens).loss
    torch.testing.assert_close(loss.float(), expected, rtol=2e-2, atol=2e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.layers[0].mlp.experts.parameters())


def test_one_projection_of_the_experts_can_be_chosen(tmp_path: Path) -> None:
    model = convert(mixture("mixtral", tmp_path), LowRank(rank=6), targets=r"experts\.up_proj")
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LowRankExperts)}
    assert found == {"up_proj"}
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(model(tokens).logits, merge(model)(tokens).logits)


def test_bottlenecks_of_experts_are_kept_by_cola_m(tmp_path: Path) -> None:
    """With 2 of 4 experts for each of 24 tokens, three [48, r] more than the four of attention."""
    model = convert(mixture("mixtral", tmp_path), CoLAM(rank=8))
    tokens = torch.arange(24).view(2, 12)
    kept = measure_saved(model.train(), {"input_ids": tokens, "labels": tokens}).shapes
    assert sum(shape == (48, 8) for shape in kept) == 3 * 2
