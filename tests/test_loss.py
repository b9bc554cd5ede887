"""One loss for every architecture: the mean cross-entropy over predicted tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorank.loss import auxiliary_loss, balances_experts, next_token_loss

SHAPES: dict[str, dict[str, Any]] = {
    "bart": {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "mixtral": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
    },
    "doge": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
    },
}


def model_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    tokens = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **tokens, **SHAPES[kind], **changes)).eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(2, 32, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 5:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind", SHAPES)
def test_it_is_the_cross_entropy_one_token_ahead(kind: str) -> None:
    model, given = model_of(kind), batch()
    log_p = model(given["input_ids"]).logits.double().log_softmax(-1)
    nats = [-log_p[row, t - 1, given["labels"][row, t]] for row in range(3) for t in range(1, 8) if row != 1 or t < 5]
    loss = next_token_loss(model, given)
    assert loss.nats.item() == pytest.approx(sum(nats).item() / len(nats), rel=1e-5)  # type: ignore[union-attr]
    assert next_token_loss(model, given, items=50).nats.item() == pytest.approx(sum(nats).item() / 50, rel=1e-5)  # type: ignore[union-attr]


def test_the_balance_of_experts_is_apart_with_its_weight() -> None:
    model, given = model_of("mixtral"), batch()
    loss = next_token_loss(model, given)
    assert loss.auxiliary is not None and loss.auxiliary > 0
    assert loss.total.item() == pytest.approx(model(**given).loss.item(), rel=1e-5)
    assert balances_experts(model) and not balances_experts(model_of("gpt2"))
    assert balances_experts(model_of("doge", is_moe=True)) and not balances_experts(model_of("doge"))


def test_a_balance_of_unknown_weight_is_refused() -> None:
    output = SimpleNamespace(aux_loss=torch.tensor(1.0))
    with pytest.raises(ValueError, match="Linear balances its experts with a weight that lorank does not know"):
        auxiliary_loss(nn.Linear(1, 1), output, torch.zeros(1, 2))


def test_a_z_loss_is_over_the_predicted_tokens() -> None:
    model: Any = nn.Module()
    model.config = SimpleNamespace(z_loss_coefficient=0.5)
    logits, labels = torch.zeros(1, 4, 8), torch.tensor([[1, 2, -100, -100]])
    found = auxiliary_loss(model, SimpleNamespace(logits=logits), labels)
    assert found is not None and found.item() == pytest.approx(0.5 * torch.tensor(8.0).log().item() ** 2)


def test_a_compiled_model_may_be_the_owner() -> None:
    """It has no length, and so no truth value."""
    config = AutoConfig.for_model("gpt2", **SHAPES["gpt2"], vocab_size=20)
    model = AutoModelForCausalLM.from_config(config).eval()
    compiled: Any = torch.compile(model, backend="eager")
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    torch.testing.assert_close(
        next_token_loss(compiled, batch, owner=compiled).nats, next_token_loss(model, batch).nats
    )
