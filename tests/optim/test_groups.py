"""Which parameters of a model are projected, and at which rank."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lorank
from lorank import FactorLR, GaLore, Muon, Trion
from lorank.optim import low_rank_groups
from lorank.optim.adamw import VectorAdamW


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[int | None, set[str]]:
    named = {id(p): name for name, p in model.named_parameters()}
    found: dict[int | None, set[str]] = {}
    for group in groups:
        found.setdefault(group["rank"], set()).update(named[id(p)] for p in group["params"])
    return found


def test_matrices_of_blocks_are_projected_and_nothing_else() -> None:
    model = llama()
    found = names_of(model, low_rank_groups(model, 4))
    projected = {n for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n}
    assert len(projected) == 14
    assert found == {4: projected, None: {n for n, _ in model.named_parameters()} - projected}
    some = names_of(model, low_rank_groups(model, {"mlp": 0.5, ".*": 100}, exclude="o_proj"))
    assert some[8] == {n for n in projected if "mlp" in n}, "a fraction is of the narrower side"
    assert some[16] == {n for n in projected if "self_attn" in n and "o_proj" not in n}, "a rank is at most that side"
    with pytest.raises(ValueError, match="targets must match linear layers of the blocks, got 'conv'"):
        low_rank_groups(model, 4, targets="conv")


def test_a_fused_matrix_is_projected_as_the_one_it_is() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    found = names_of(model, low_rank_groups(model, 4))
    inside = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert found[4] == {f"transformer.h.0.{name}.weight" for name in inside}
    assert "transformer.wte.weight" in found[None]


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("adamw", {"targets": "mlp"}, "adamw projects nothing; leave out targets and exclude"),
        ("muon", {"exclude": "mlp"}, "muon projects nothing; leave out targets and exclude"),
        ("galore", {"decay": "al"}, "decay must be 'matrices' or 'all', got 'al'"),
        ("galore", {"betas": (0.9,)}, r"betas must be 2 values, each a number in \[0, 1\), got \(0.9,\)"),
        ("switchlora", {}, "switchlora also changes the weights; convert the model with it"),
        ("cola", {}, "cola does not decide how weights move; use adamw, muon or galore"),
    ],
)
def test_optimizers_refuse_what_they_would_ignore(method: str, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lorank.optimizer(llama(), method, lr=1e-3, **settings)


def test_a_structure_with_its_own_optimizer_may_be_named() -> None:
    model = lorank.convert(llama(), lorank.SwitchLoRA(rank=2))
    named, unnamed = (lorank.optimizer(model, method, lr=1e-3) for method in ("switchlora", None))
    assert type(named) is type(unnamed) is VectorAdamW


# ---- weights that are kept transposed


class Blocks(nn.Module):
    """One layer [16 -> 64] in a block, as nn.Linear or as GPT-2's Conv1D, with the same weights."""

    def __init__(self, transposed: bool):
        super().__init__()
        layer: Any = Conv1D(64, 16) if transposed else nn.Linear(16, 64)
        self.h = nn.ModuleList([nn.ModuleDict({"fc": layer})])
        W = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        self.weight: nn.Parameter = layer.weight
        self.weight.data.copy_(W.T if transposed else W)


@pytest.mark.parametrize(
    "method", [Trion(rank=4), Muon(scaling="dion"), Muon(scaling="kj"), Muon(), GaLore(rank=4)], ids=str
)
def test_a_transposed_weight_moves_as_the_map_that_it_is(method: Any) -> None:
    moved = []
    for turned in (False, True):
        model = Blocks(turned)
        optimizer = lorank.optimizer(model, method, lr=0.1, weight_decay=0.1)
        for step in range(3):
            G = torch.randn(64, 16, generator=torch.Generator().manual_seed(step + 1))
            model.weight.grad = G.T.clone() if turned else G
            optimizer.step()
        moved.append(model.weight.detach().T if turned else model.weight.detach())
    torch.testing.assert_close(*moved, rtol=2e-2, atol=2e-3)  # Newton-Schulz in bfloat16


def test_structure_aware_rates_know_transposed_weights() -> None:
    found = [
        FactorLR(rule="muon", base_width=8).multipliers(model)[model.weight] for model in map(with_width, (False, True))
    ]
    assert found[0] == found[1]


def with_width(transposed: bool) -> Any:
    model: Any = Blocks(transposed)
    model.get_input_embeddings = lambda: nn.Embedding(4, 16)
    return model


def test_matrices_that_nobody_knows_are_reported() -> None:
    model: Any = Blocks(False)
    model.h[0].flat = nn.Parameter(torch.randn(40, 16))  # as DBRX keeps its experts
    with pytest.warns(UserWarning, match=r"AdamW moves 37.0% of the blocks' parameters, .*: h.\*.flat"):
        lorank.optimizer(model, GaLore(rank=4), lr=0.1)
    lorank.optimizer(model, GaLore(rank=4, expert_matrices=False), lr=0.1)
