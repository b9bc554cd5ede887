"""The quality of a language model on held-out text: perplexity, published-compatible perplexity, and bits per byte."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn


class Evaluation(NamedTuple):
    """Sums over an evaluation, from which all figures follow."""

    nats: float
    """Negative log-likelihood of all predicted tokens, in nats."""
    tokens: int
    """Predicted tokens: those with a label, without the first of each sequence."""
    batches: int
    sum_of_batch_losses: float
    """Sum over batches of each batch's mean loss, in nats per token."""
    bytes_per_token: float | None = None
    """UTF-8 bytes of text per predicted token."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token, all tokens weighted equally."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss): the unbiased figure."""
        return _exp(self.loss)

    @property
    def published_compatible_perplexity(self) -> float:
        """What the evaluation code of GaLore, SLTrain, Fira and CoLA prints: exp(sum of N batch losses / (N + 1)).

        Their batch counter starts at 1, so with N batches of loss l they report exp(l N / (N + 1)), which is too low.
        Report it next to the unbiased figure to compare with their tables, never alone. It depends on the batch size.
        """
        return _exp(self.sum_of_batch_losses / (self.batches + 1))

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits per UTF-8 byte: comparable between tokenizers."""
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    def to_dict(self) -> dict[str, float | None]:
        return {
            "loss_nats_per_token": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "published_compatible_perplexity": self.published_compatible_perplexity,
            "tokens": self.tokens,
            "batches": self.batches,
        }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    max_tokens: int | None = None,
    bytes_per_token: float | None = None,
) -> Evaluation:
    """Evaluate a causal language model of transformers on batches of ``input_ids`` and ``labels`` [b, n] (-100: not
    counted).

    Stops after the batch in which `max_tokens` predicted tokens are reached. The model's training mode is restored.

    Raises:
        ValueError: the batches contain no token to predict.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    nats = losses = 0.0
    tokens = count = 0
    try:
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            predicted = int((batch["labels"][:, 1:] != -100).sum())  # the model shifts labels by one
            if predicted == 0:
                continue
            mean = model(**batch, use_cache=False).loss.double().item()
            nats, losses = nats + mean * predicted, losses + mean
            tokens, count = tokens + predicted, count + 1
            if max_tokens is not None and tokens >= max_tokens:
                break
    finally:
        model.train(training)
    if tokens == 0:
        raise ValueError("the evaluation data contain no token to predict")
    return Evaluation(nats, tokens, count, losses, bytes_per_token)
