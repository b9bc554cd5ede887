"""Experts [E, m, n]: an optimizer moves them as E matrices, finds them in a model, and counts what it keeps of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import lorank
from lorank import APOLLO, CoLA, DCTAdamW, FactorLR, Fira, GaLore, Muon, Spectron, Trion
from lorank.optim import GaLoreAdamW, low_rank_groups
from lorank.optim.driver import ByGroups
from lorank.optim.loro import LORO
from lorank.table import find

E, STEPS = 3, 5
PROJECTED: list[ByGroups] = [
    GaLore(update_gap=2),
    GaLore(update_gap=2, projection="full", rule="muon"),
    GaLore(update_gap=2, in_backward=True, projection="reverse_std"),
    Fira(update_gap=2, scaling="matrix"),
    Fira(update_gap=2, residual="paper"),
    DCTAdamW(update_gap=2, error_feedback="8bit"),
    Trion(scale="dion"),
    APOLLO(update_gap=2),
]
RULED: list[tuple[ByGroups, str]] = [
    (Muon(scaling="dion"), "muon"),
    (Spectron(), "spectron"),
    (LORO(update_gap=2), "loro"),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(
    method: ByGroups, weights: list[Tensor], gradients: list[list[Tensor]], **group: Any
) -> tuple[list[Tensor], Any]:
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer: Any = method.optimizer(
        [{"params": parameters, "weight_decay": 0.1, **group}], lr=0.02, betas=(0.9, 0.99), eps=1e-8
    )
    for step in gradients:
        for p, G in zip(parameters, step, strict=True):
            (p * G).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in parameters], optimizer


@pytest.mark.parametrize("method", PROJECTED, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
def test_experts_move_as_matrices_of_their_own(method: ByGroups, shape: tuple[int, int]) -> None:
    """Each as the only matrix of an optimizer."""
    W, gradients = draw(E, *shape), [draw(E, *shape, seed=step + 1) for step in range(STEPS)]
    (together,), optimizer = moved(method, [W], [[G] for G in gradients], rank=4)
    for e in range(E):
        (alone,), _ = moved(method, [W[e]], [[G[e]] for G in gradients], rank=4)
        torch.testing.assert_close(together[e], alone, rtol=1e-12, atol=1e-12)
    p, group = optimizer.param_groups[0]["params"][0], optimizer.param_groups[0]
    state = {name: value for name, value in optimizer.state[p].items() if name not in ("step", "steps")}
    assert sum(value.nbytes for value in state.values()) == method.state_bytes(p, group)
    one = nn.Parameter(W[0])
    assert method.step_flops(p, group) == pytest.approx(E * method.step_flops(one, group))
    assert method.kept_gradient(p, group) == (E, *method.kept_gradient(one, group))
    again: Any = method.optimizer([{"params": [p], "rank": 4}], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="so it was not saved by an optimizer like this"):
        other: Any = method.optimizer([{"params": [nn.Parameter(W[:2])], "rank": 4}], lr=0.02)
        moved_once(other)
        other.load_state_dict(optimizer.state_dict())


def moved_once(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("method", "rule"), RULED, ids=lambda value: getattr(value, "name", ""))
def test_factors_of_experts_move_as_pairs(method: ByGroups, rule: str) -> None:
    shapes = [(4, 20), (12, 4)]
    weights = [draw(E, *shape, seed=9) for shape in shapes]
    gradients = [[draw(E, *shape, seed=step) for shape in shapes] for step in range(STEPS)]
    together, optimizer = moved(method, weights, gradients, rule=rule)
    for e in range(E):
        alone, _ = moved(method, [W[e] for W in weights], [[G[e] for G in step] for step in gradients], rule=rule)
        for ours, its in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[e], its, rtol=1e-12, atol=1e-12)
    for p in optimizer.param_groups[0]["params"]:
        state = {name: value for name, value in optimizer.state[p].items() if name not in ("step", "steps")}
        assert sum(value.nbytes for value in state.values()) == method.state_bytes(p, optimizer.param_groups[0])
        one = nn.Parameter(p.detach()[0])
        assert method.step_flops(p, {"rule": rule}) == E * method.step_flops(one, {"rule": rule})


# ---- in a model


SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL))


def gpt_oss() -> Any:
    return GptOssForCausalLM(GptOssConfig(**SMALL, head_dim=8, layer_types=["full_attention"] * 2))


def found(model: nn.Module, method: Any, key: str) -> dict[str, Any]:
    """What groups say of the parameters of the first block's mixture, by their names."""
    names = {p: name for name, p in model.named_parameters()}
    groups = lorank.optimizer(model, method, lr=0.01).param_groups
    said = {names[p]: group[key] for group in groups for p in group["params"]}
    return {name.partition("layers.0.mlp.")[2]: value for name, value in said.items() if "layers.0.mlp." in name}


def test_experts_of_a_dense_model_have_a_rank() -> None:
    experts = {"experts.gate_up_proj": 4, "experts.down_proj": 4}
    assert found(mixtral(), GaLore(rank=4), "rank") == {**experts, "gate.weight": None}
    assert found(mixtral(), GaLore(rank=4, expert_matrices=False), "rank") == dict.fromkeys([*experts, "gate.weight"])
    biases = ["experts.gate_up_proj_bias", "experts.down_proj_bias", "router.weight", "router.bias"]
    assert found(gpt_oss(), Trion(rank=4), "rank") == {**experts, **dict.fromkeys(biases)}


def test_muon_takes_experts_and_leaves_their_biases() -> None:
    rules = found(gpt_oss(), Muon(), "rule")
    moved_by_muon = {name for name, rule in rules.items() if rule == "muon"}
    assert moved_by_muon == {"experts.gate_up_proj", "experts.down_proj", "router.weight"}


@pytest.mark.parametrize("structure", ["cola", "sltrain"])
def test_factors_of_converted_experts_are_found(structure: str) -> None:
    model = lorank.convert(mixtral(), find(structure)(rank=4))
    factors = {f"experts.{part}_proj.{side}" for part in ("gate", "up", "down") for side in "AB"}
    assert {name for name, r in found(model, GaLore(rank=2), "rank").items() if r == 2} == factors
    if structure == "cola":
        assert {name for name, rule in found(model, Spectron(), "rule").items() if rule == "spectron"} == factors
    times = found(model, FactorLR(), "lr_multiplier")
    assert times["experts.gate_proj.A"] == 0.5 and times["experts.gate_proj.B"] == 16 / (2 * 4)
    assert times["experts.down_proj.B"] == 24 / (2 * 4)


@pytest.mark.filterwarnings("ignore:cola leaves .* dense, experts")
def test_dense_experts_next_to_pairs_are_refused_by_name() -> None:
    model = lorank.convert(mixtral(), CoLA(rank=4), exclude="experts")
    with pytest.raises(ValueError, match="in none; .*: model.layers.0.mlp.experts.down_proj, .* and 1 more"):
        lorank.optimizer(model, Spectron(), lr=0.05)


def test_bare_experts_are_adamws_with_a_warning() -> None:
    model = mixtral()
    words = r"AdamW moves a parameter of shape \[4, 48, 16\] and 3 more; .*low_rank_groups"
    with pytest.warns(UserWarning, match=words):
        GaLoreAdamW(model.parameters(), rank=4)
    GaLoreAdamW(low_rank_groups(model, 4))  # says nothing


def test_a_mixture_trains_and_its_experts_move() -> None:
    model = mixtral()
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    optimizer = lorank.optimizer(model, GaLore(rank=4), lr=0.01)
    tokens = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    change = model.model.layers[0].mlp.experts.down_proj.detach() - before
    assert all(torch.linalg.matrix_rank(expert) <= 8 for expert in change)
