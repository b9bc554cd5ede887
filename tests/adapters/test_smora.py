"""SMoRA: a router over ranks, whose load evens out."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank.accounting import memory_estimate
from lorank.adapters.gated import gathered
from lorank.adapters.smora import Balance, SMoRALinear, choose
from lorank.train.model import empty_model
from lorank.train.recipe import Recipe


def layer(**changes: Any) -> SMoRALinear:
    torch.manual_seed(0)
    made = SMoRALinear(nn.Linear(12, 10), 8, **{"scale": 2.0, "top_k": 3, "expert_rank": 1, "speed": 1e-5, **changes})
    nn.init.normal_(made.B.weight)
    return made


def test_the_gate_sums_to_k_over_the_k_largest() -> None:
    p = torch.tensor([[0.9, 0.2, 0.6, 0.3], [0.1, 0.5, 0.4, 0.1]])
    values, chosen = choose(p, 2)
    assert chosen.tolist() == [[0, 2], [1, 2]]
    torch.testing.assert_close(values, torch.tensor([[1.2, 0.8], [10 / 9, 8 / 9]]))


@pytest.mark.parametrize("expert_rank", [1, 2])
def test_the_layer_is_the_sum_over_its_chosen_experts(expert_rank: int) -> None:
    """Token by token, with matrices B_i A_i."""
    made, x = layer(expert_rank=expert_rank).eval(), torch.randn(6, 12)
    p = torch.sigmoid(x @ made.router.weight.T)
    for t in range(6):
        best = p[t].argsort(descending=True)[:3]
        y = made.W(x[t])
        for i in best.tolist():
            rows = slice(i * expert_rank, (i + 1) * expert_rank)
            y = y + 2.0 * 3 * p[t, i] / p[t, best].sum() * made.B.weight[:, rows] @ made.A.weight[rows] @ x[t]
        torch.testing.assert_close(made(x)[t], y, rtol=1e-4, atol=1e-5)


def test_gathered_ranks_give_the_layer_too() -> None:
    made, x = layer().eval(), torch.randn(2, 6, 12)
    values, chosen = made.choose(x)
    assert torch.equal(values.sum(-1).round(decimals=5), torch.full((2, 6), 3.0))
    torch.testing.assert_close(made.W(x) + 2.0 * gathered(x, made.A.weight, made.B.weight, chosen, values), made(x))


def test_the_router_is_half_of_the_adapter_again() -> None:
    with torch.device("meta"):
        made = SMoRALinear(nn.Linear(4096, 4096), 64, scale=2.0, top_k=8, expert_rank=1, speed=0.0)
    router, factors = made.router.weight.numel(), made.A.weight.numel() + made.B.weight.numel()
    assert router == 4096 * 64 == factors / 2


def test_load_evens_out_over_steps() -> None:
    """Inputs so skewed that three experts get all tokens; and only training counts."""
    made = layer(speed=1e-2)
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1)) + 3.0
    hook = Balance(made, torch.optim.SGD(made.trained(), lr=0.0))
    made.eval()(x)
    assert made.router.counts is None
    shares = []
    for _ in range(120):
        made.train()(x)
        shares.append((made.router.counts.max() / made.router.counts.sum()).item())
        hook.after_step()
    assert shares[0] > 0.3 and shares[-1] < 0.18, "the mean is 1/8"
    assert made.router.steps.dtype == torch.int32 and made.bfloat16().router.steps.abs().max() > 8


def test_balance_is_saved_and_an_expert_at_the_mean_stays(tmp_path: Any, small: Any) -> None:
    model = lorank.convert(small("llama"), lorank.SMoRA(rank=4, top_k=1)).train()
    optimizer = lorank.optimizer(model, lr=1e-3)
    lorank.step_hook(model, optimizer, steps=2)
    lorank.checkpoint(model, lorank.checkpointing.keep_nothing)
    for tokens in torch.arange(24).view(2, 1, 12):
        model(input_ids=tokens, labels=tokens).loss.backward()
    router = model.model.layers[0].mlp.up_proj.router
    assert router.counts.sum() == 24, "micro-batches and blocks that are computed again count once"
    expected = torch.sign(router.counts.double().mean() - router.counts)
    optimizer.step()
    assert torch.equal(router.steps, expected.int()) and router.counts is None
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.router.steps, router.steps)


def test_its_memory_is_planned_on_shapes_alone() -> None:
    """Counts of the load come about in the forward pass, on whatever the layer is then."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "head_dim": 8}
    model = empty_model(Recipe(method="smora", model="llama", rank=4, vocab_size=64, shape=shape))
    found = memory_estimate(model, batch=2, sequence_length=8)
    assert found.activations_bytes > 0 and model.model.layers[0].mlp.up_proj.router.counts is None


def test_an_expert_has_whole_ranks(small: Any) -> None:
    dense = small("llama")
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(
        ValueError, match="expert_rank must divide the rank 16 of model.layers.0.self_attn.q_proj, got 3"
    ):
        lorank.convert(dense, lorank.SMoRA(rank=16, expert_rank=3))
    assert dense.state_dict().keys() == before.keys()
