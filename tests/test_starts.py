"""Blocks that begin as the identity, whatever their architecture and method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MixtralConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lorank import CoLA, Method, SLTrain, convert, zero_outputs
from lorank.architectures import OUTPUT
from lorank.sites import blocks
from lorank.table import find, method_names
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe
from tests.conftest import TOKENS, Architecture

METHODS = [name for name in method_names("method") if name != "dense"]
KNOWN = {"cola", "cola-m", "low-rank", "self-guided", "sltrain", "crnet", "relora", "switchlora"}
"""Methods whose layers name the factor that alone decides whether their output is zero."""


def moved(model: nn.Module) -> list[float]:
    """How much each block changes what it reads, at most."""
    changes: list[float] = []

    def note(block: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = out if isinstance(out, Tensor) else out[0]
        changes.append((after - before).abs().max().item())

    hooks = [block.register_forward_hook(note, with_kwargs=True) for _, _, block in blocks(model)]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return changes


def mixture() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=128, **shape, **heads))


def test_blocks_of_every_architecture_begin_as_the_identity(architecture: Architecture) -> None:
    """LayerNorm after the sum, as in BERT and OPT, leaves what a LayerNorm has left, to rounding."""
    model = architecture.dense()
    drawn = moved(model)
    zero_outputs(model)
    assert min(drawn) > 1e-3
    assert max(moved(model)) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_every_method_begins_as_the_identity_or_is_refused(name: str, small: Any) -> None:
    method: Method = find(name)()
    model = convert(small("llama"), method)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    named = all(getattr(layer, "silent", ()) for key, layer in model.named_modules() if OUTPUT.search(key))
    assert named or name not in KNOWN
    if method.adapts or not named:
        with pytest.raises(
            ValueError, match="for new weights" if method.adapts else f"o_proj of {name} cannot start at zero"
        ):
            zero_outputs(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    else:
        zero_outputs(model)
        assert moved(model) == [0.0, 0.0]


@pytest.mark.parametrize("method", [None, CoLA(), SLTrain()], ids=["dense", "cola", "sltrain"])
def test_blocks_with_experts_begin_as_the_identity(method: Method | None) -> None:
    model = mixture()
    if method is not None:
        convert(model, method, targets=["self_attn", "experts"])
    assert min(moved(model)) > 1e-3
    zero_outputs(model)
    assert moved(model) == [0.0, 0.0]


def test_all_weights_of_a_cola_move_within_two_steps(small: Any) -> None:
    """B of the outputs in the first step, all else from the second on."""
    model = convert(small("llama"), CoLA()).train()
    zero_outputs(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, first[name])] == []


def test_dlr_whose_B_starts_elsewhere_is_refused(small: Any) -> None:
    with pytest.raises(ValueError, match="o_proj of cola cannot start at zero"):
        zero_outputs(convert(small("llama"), CoLA(init="dlr")))


def test_blocks_without_a_known_output_are_refused() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]))
    with pytest.raises(ValueError, match="a projection in 0.0 that writes to the residual stream"):
        zero_outputs(model)


def small_t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))


def small_recurrent_gemma() -> Any:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "lru_width": 32}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**shape, num_attention_heads=4, attention_window_size=16))


@pytest.mark.parametrize("make", [small_t5, small_recurrent_gemma])
def test_outputs_that_other_families_have_are_known(make: Any) -> None:
    model = make()
    zero_outputs(model)
    mixing = ("o", "wo", "o_proj", "linear_out", "down_proj")
    written = [p for name, p in model.named_parameters() if name.split(".")[-2] in mixing]
    assert len(written) >= 6 and not any(p.any() for p in written)


def small_ctrl() -> Any:
    return CTRLLMHeadModel(CTRLConfig(vocab_size=64, n_embd=32, dff=48, n_layer=2, n_head=4))


def small_minimax() -> Any:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    return MiniMaxForCausalLM(MiniMaxConfig(**shape, num_attention_heads=4, num_key_value_heads=4, num_local_experts=2))


@pytest.mark.parametrize("make", [small_ctrl, small_minimax])
def test_blocks_that_stay_no_identity_are_refused(make: Any) -> None:
    """CTRL's second layer of the MLP has a number for a name; MiniMax adds to what a norm has made."""
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"h\.0 of CTRL|layers\.0 of MiniMax"):
        zero_outputs(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="needs repeated blocks in an nn.ModuleList, and Sequential has none"):
        zero_outputs(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


@pytest.mark.parametrize(
    "changes", [{"method": "dense"}, {"method": "cola"}, {"method": "dense", "optimizer": "galore"}]
)
def test_a_recipe_asks_for_it(changes: dict[str, Any]) -> None:
    recipe = Recipe(zero_outputs=True, vocab_size=128, **changes)
    assert moved(build_model(recipe, build_config(recipe))) == [0.0, 0.0]


def test_a_recipe_that_trains_weights_on_does_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zero_outputs is for new weights, and start_from brings trained ones"):
        Recipe(zero_outputs=True, start_from=str(tmp_path))


def test_cola_makes_tokens_alike_unless_outputs_are_zero() -> None:
    """The mean cosine between two tokens after one block, of docs/study.md."""

    def alike(model: Any) -> float:
        ids = torch.randint(4096, (4, 256), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            states = nn.functional.normalize(
                model(ids, output_hidden_states=True).hidden_states[1].flatten(0, 1), dim=-1
            )
        return ((states.sum(0).square().sum() - len(states)) / (len(states) * (len(states) - 1))).item()

    found = {}
    for method in ("dense", "cola"):
        for zero in (False, True):
            torch.manual_seed(0)
            recipe = Recipe(size="20m", method=method, zero_outputs=zero, vocab_size=4096)
            found[method, zero] = alike(build_model(recipe, build_config(recipe)))
    assert found["dense", False] == pytest.approx(0.02, abs=0.01)
    assert found["cola", False] == pytest.approx(0.83, abs=0.03)
    assert max(found["dense", True], found["cola", True]) < 0.005
