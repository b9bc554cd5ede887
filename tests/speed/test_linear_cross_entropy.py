"""The loss without logits, against the loss of whole logits in float64, and on models."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import lorank
from lorank.accounting.meter import Meter
from lorank.loss import gives_loss, next_token_loss
from lorank.speed import linear_cross_entropy as fast

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(0))


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_whole_logits(
    items: int | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "AT_ONCE", 40)  # chunks of three tokens, the last of two
    draw = torch.Generator().manual_seed(0)
    x, W, b = (
        torch.randn(*shape, dtype=torch.float64, generator=draw, requires_grad=True)
        for shape in ((2, 7, 5), (11, 5), (11,))
    )
    given = (x, W, b) if bias else (x, W)
    y = torch.randint(11, (2, 7), generator=draw)
    y[1, 3:] = -100
    found = fast.linear_cross_entropy(x, W, b if bias else None, y, items)
    log_p = F.linear(x, W, b if bias else None).log_softmax(-1)
    each = [-log_p[row, i, y[row, i + 1]] for row in range(2) for i in range(6) if y[row, i + 1] != -100]
    expected = torch.stack(each).sum() / (items or len(each))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    ours, theirs = (torch.autograd.grad(3 * loss, given) for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


def test_a_model_gives_the_loss_and_the_same_gradients(ids: Tensor) -> None:
    model = llama()
    before = model(ids, labels=ids).loss
    before.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert lorank.loss_without_logits(model) is model and gives_loss(model)
    output = model(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.loss, before, rtol=1e-6, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted, rtol=1e-5, atol=1e-7)
    assert output.logits is None and model(ids).logits.shape == (3, 11, 50)
    again = next_token_loss(model, {"input_ids": ids, "labels": ids}).nats
    torch.testing.assert_close(again, before, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="the gradients of this loss were used already"):
        output.loss.backward()


def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "AT_ONCE", 16 * 4096)
    batch = dict.fromkeys(("input_ids", "labels"), torch.zeros(2, 128, dtype=torch.int64))
    most = []
    for model in (llama(vocab_size=4096), lorank.loss_without_logits(llama(vocab_size=4096))):
        with Meter([*model.parameters(), *batch.values()]) as meter:
            next_token_loss(model, batch).total.backward()
        most.append(meter.most)
    logits = 4 * 2 * 128 * 4096
    assert most[0] > 2 * logits and most[1] < logits / 2


def test_a_model_that_does_more_with_its_logits_stays_as_it_is() -> None:
    scaled = lorank.loss_without_logits(GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)))
    assert not gives_loss(scaled)


def test_the_balance_of_experts_stays_in_the_loss(ids: Tensor) -> None:
    """As transformers adds it, with its gradient at the router; `next_token_loss` has it apart."""
    shape = {**SHAPE, "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    model = MixtralForCausalLM(MixtralConfig(**shape))
    found = []
    for _ in range(2):
        output = model(ids, labels=ids)
        [gradient] = torch.autograd.grad(output.loss, model.model.layers[0].mlp.gate.weight)
        found.append((output.loss.detach(), gradient))
        lorank.loss_without_logits(model)
    assert gives_loss(model)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    apart = next_token_loss(model, {"input_ids": ids, "labels": ids})
    assert apart.auxiliary is not None and apart.auxiliary > 1
    torch.testing.assert_close(apart.total.detach(), found[0][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [BartForCausalLM, BertForMaskedLM, "own loss", "own forward"])
def test_a_model_whose_loss_is_another_stays_as_it_is(kind: Any) -> None:
    """Labels that are not shifted, a loss of the user's, and what a user has put around the model."""
    if kind is BartForCausalLM:
        model: Any = kind(BartConfig(vocab_size=50, d_model=32, decoder_layers=1, decoder_attention_heads=2))
    elif kind is BertForMaskedLM:
        model = kind(BertConfig(**SHAPE))
    else:
        model = llama()
    if kind == "own loss":
        model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    if kind == "own forward":
        before = model.forward
        model.forward = lambda *args, **kwargs: before(*args, **kwargs)
    forward = model.__dict__.get("forward")
    assert not gives_loss(lorank.loss_without_logits(model)) and model.__dict__.get("forward") is forward


def test_what_is_asked_later_is_done_with_logits(ids: Tensor) -> None:
    """Evaluation, labels that are shifted already, another index that is ignored, and another loss; -1 is no label."""
    plain, model = llama(), lorank.loss_without_logits(llama())
    other = ids.clone()
    other[0, :4] = -1
    for given in ({"labels": other, "ignore_index": -1}, {"labels": ids, "shift_labels": ids.flip(1)}):
        assert torch.equal(model(ids, **given).loss, plain(ids, **given).loss)
    with pytest.raises((IndexError, RuntimeError), match="-1"):
        model(ids, labels=other)
    assert torch.equal(model.eval()(ids, labels=ids).logits, plain(ids).logits)
    model.train().loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    assert torch.equal(model(ids, labels=ids).loss, plain(ids).logits.sum())


def test_a_model_without_weights_is_judged_alike() -> None:
    with torch.device("meta"):
        assert gives_loss(lorank.loss_without_logits(llama()))
        assert not gives_loss(lorank.loss_without_logits(BertForMaskedLM(BertConfig(**SHAPE))))


def test_a_call_that_failed_leaves_no_labels(ids: Tensor) -> None:
    model = lorank.loss_without_logits(llama())
    with pytest.raises(IndexError):
        model(ids + 50, labels=ids)
    assert model(ids).logits is not None


def test_it_is_one_graph_for_the_compiler(ids: Tensor) -> None:
    model = lorank.loss_without_logits(llama())
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_in_bf16_it_is_as_close_as_whole_logits(ids: Tensor) -> None:
    exact, whole = llama()(ids, labels=ids).loss, llama().bfloat16()(ids, labels=ids).loss
    found = lorank.loss_without_logits(llama().bfloat16())(ids, labels=ids).loss
    assert found.dtype == torch.float32 and abs(found - exact) <= 1.5 * abs(whole - exact) + 1e-3
