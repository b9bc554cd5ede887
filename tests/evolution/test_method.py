"""What EGGROLL says of a step before it is made: its cost to the number, its members, and the noise of each parameter."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lorank
from lorank import accounting
from lorank.evolution import egg as egg_module
from lorank.train.build import build_estimator
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
LLAMA = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, **HEADS}


def estimator_of(recipe: Recipe) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = build_model(recipe, build_config(recipe))
    return model, build_estimator(recipe, model)


def cost(estimator: Any, recipe: Recipe) -> Any:
    return estimator.step_cost(
        batch_size=recipe.batch_size, sequence_length=recipe.sequence_length, optimizer_bytes=0, autocast=False
    )


@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize("kind", ["float", "cola", "egg"])
def test_a_step_costs_what_it_is_said_to(kind: str, group_size: int, recipe: Any) -> None:
    """Operations to the number; bytes nearly, for only one chunk of members is looked at."""
    changes: dict[str, Any] = {"vocab_size": 256} if kind == "egg" else {"shape": LLAMA}
    if kind == "cola":
        changes |= {"method": "cola", "gradient": "eggroll", "rank": 4}
    options = {"population": 16, "chunk": 4, "group_size": group_size}
    r = recipe("egg" if kind == "egg" else "float", options=options, **changes)
    model, estimator = estimator_of(r)
    flops, memory = cost(estimator, r)
    ids = torch.randint(1, 256, (r.batch_size, r.sequence_length))
    meter = accounting.Meter([*model.parameters(), *model.buffers(), ids])
    with FlopCounterMode(display=False, custom_mapping=accounting.MORE_FLOPS) as counter, meter:
        estimator({"input_ids": ids, "labels": ids}, 0)
    assert flops.total == counter.get_total_flops()
    held = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    assert memory.peak_bytes - held == pytest.approx(meter.most, rel=0.05)
    assert (memory.activations_bytes, memory.optimizer_bytes) == (0, 0)
    assert memory.gradients_bytes == sum(p.grad.nbytes for p in model.parameters())


def test_flops_of_a_transformers_members_in_closed_form(recipe: Any) -> None:
    r = recipe("float", options={"rank": 2}, shape=LLAMA)  # 8 members of 4 sequences of 16
    flops, _ = cost(estimator_of(r)[1], r)
    d, d_ff, layers, tokens = 32, 80, 2, 8 * 4 * 16
    projections = [(d, d)] * 4 + [(d, d_ff)] * 2 + [(d_ff, d)]
    forward = layers * sum(2 * a * b for a, b in projections) + 2 * d * 300 + layers * 4 * 16 * d
    noise = 2 * 2 * (layers * sum(a + b for a, b in projections) + d + 300) + 2 * 2 * d  # the last is the lookup's
    assert flops.forward == tokens * (forward + noise)
    matrices = layers * sum(a * b for a, b in projections) + 2 * 300 * d
    assert flops.backward == 2 * 4 * (2 * matrices + (2 * layers + 1) * d)


def test_words_for_a_transformer(recipe: Any) -> None:
    options = {"population": 8, "freeze_others": True, "rank": 2, "sigma": 0.5, "group_size": 4, "chunk": 16}
    model, estimator = estimator_of(recipe("float", model="gpt2", vocab_size=100, options=options))
    own = dict(model.named_parameters())
    how = lambda name: estimator.treatment(name, own[name])  # noqa: E731
    assert how("transformer.wte.weight") == "rank-2 noise, σ = 0.5, also as lm_head.weight"
    assert how("transformer.h.3.attn.c_attn.weight") == "rank-2 noise, σ = 0.5"
    assert how("transformer.h.3.ln_1.bias") == "no noise, not stepped"
    assert [estimator.moves(own[f"transformer.h.3.ln_1.{name}"]) for name in ("weight", "bias")] == [False, False]
    total, matrices = sum(p.numel() for p in own.values()), 768 * (1024 + 100) + 12 * 12 * 768**2
    numbers = 2 * (1024 + 768 + 100 + 768 + 12 * 768 * (4 + 2 + 5 + 5))
    assert estimator.describe() == (
        "8 members, 8 at a time, each group of 4 on 2 sequences of 16; "
        f"noise on {matrices:,} of {total:,} parameters, from {numbers:,} numbers per pair"
    )


def test_words_for_egg(recipe: Any) -> None:
    model, estimator = estimator_of(recipe("egg", vocab_size=256))
    assert estimator.treatment("head", model.head) == "rank-1 int8 noise, σ = 2^-4"
    assert estimator.treatment("layers.0.bf", model.layers[0].bf) == "full int8 noise, σ = 2^-4"
    assert estimator.describe().startswith(
        "16 members, 16 at a time, each group of 2 on 1 sequence of 16; noise on 4,904 of"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("asked", [False, True])
def test_egg_is_compiled_where_the_recipe_says_so(asked: bool, recipe: Any) -> None:
    estimator = estimator_of(recipe("egg", vocab_size=256, compile=asked, options={"hidden_size": 16}))[1]
    assert (estimator.estimate.score is not egg_module.score) == asked


def test_from_python(small: Any, tokens: torch.Tensor) -> None:
    """As a training loop of one's own uses it: the loss falls, and nothing is kept for a backward pass."""
    model = lorank.convert(small("llama"), lorank.CoLA(rank=4))
    optimizer = lorank.optimizer(model, "adamw", lr=0.02)
    gradient = lorank.EGGROLL(population=64, sigma=0.03).gradient(model, batch_size=2, sequence_length=12, seed=0)
    losses = []
    for step in range(12):
        losses.append(gradient({"input_ids": tokens, "labels": tokens}, step))
        optimizer.step()
        optimizer.zero_grad()
    assert not losses[0].requires_grad and losses[-1] < losses[0] - 0.2
    assert gradient.state_dict() == {} and not gradient.carries
