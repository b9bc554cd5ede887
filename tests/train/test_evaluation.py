"""The evaluator: unbiased perplexity, the published-compatible one, bits per byte."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorank.train.evaluation import Evaluation, evaluate
from lorank.train.watching import watched_by


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**shape))


def batch(*lengths: int, width: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sequences of `lengths` tokens, padded to `width` with label -100."""
    ids = torch.randint(0, 40, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("n", [1, 2, 91, 182])
def test_the_published_evaluator_divides_by_one_too_many(n: int) -> None:
    loss = 3.5
    found = Evaluation(nats=loss * 100 * n, tokens=100 * n, batches=n, sum_of_batch_losses=loss * n)
    assert found.perplexity == pytest.approx(math.exp(loss))
    assert found.published_compatible_perplexity == pytest.approx(math.exp(loss * n / (n + 1)))


def test_the_specs_example_of_the_bias() -> None:
    """A reported 34.06 with 182 batches is about 34.7 unbiased."""
    loss = math.log(34.06) * 183 / 182
    found = Evaluation(nats=loss, tokens=1, batches=182, sum_of_batch_losses=loss * 182)
    assert found.published_compatible_perplexity == pytest.approx(34.06)
    assert found.perplexity == pytest.approx(34.7, abs=0.05)


def test_every_token_counts_the_same_whatever_batch_it_is_in(model: LlamaForCausalLM) -> None:
    batches = [batch(8, 8, seed=1), batch(3, seed=2), batch(5, 2, seed=3)]
    found = evaluate(model, batches)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for b in batches:  # by hand, token by token, in float64
            log_p = model(b["input_ids"]).logits.double().log_softmax(-1)
            for row in range(len(b["labels"])):
                for t in range(1, 8):
                    if b["labels"][row, t] != -100:
                        nats -= log_p[row, t - 1, b["labels"][row, t]].item()
                        tokens += 1
    assert found.tokens == tokens == 14 + 2 + 4 + 1
    assert found.loss == pytest.approx(nats / tokens, rel=1e-6)


def test_bits_per_byte_undo_the_tokenizer(model: LlamaForCausalLM) -> None:
    found = evaluate(model, [batch(8)], bytes_per_token=lambda predicted: 4.0)
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / (found.tokens * 4.0))
    assert evaluate(model, [batch(8)]).bits_per_byte is None


def test_it_stops_after_the_batch_that_reaches_the_limit(model: LlamaForCausalLM) -> None:
    found = evaluate(model, [batch(8, seed=i) for i in range(5)], max_tokens=8)
    assert (found.batches, found.tokens) == (2, 14)


def test_training_mode_comes_back_and_no_gradient_stays(model: LlamaForCausalLM) -> None:
    model.train()
    evaluate(model, [batch(8)])
    assert model.training and all(p.grad is None for p in model.parameters())


def test_nothing_to_predict_is_an_error(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(model, [batch(0)])


@pytest.mark.parametrize("max_tokens, total", [(None, 42), (20, 20)])
def test_it_tells_how_far_it_is(model: LlamaForCausalLM, max_tokens: int | None, total: int) -> None:
    heard: list[tuple[object, ...]] = []
    with watched_by(lambda *told: heard.append(told)):
        evaluate(model, [batch(8, 8, seed=i) for i in range(3)], max_tokens=max_tokens)
    assert heard == [("evaluating", done, total, "tokens") for done in (14, 28, 42)[: len(heard)]]
    assert heard[-1][1] >= total  # type: ignore[operator]
