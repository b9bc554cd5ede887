"""The quality of a language model on held-out text: perplexity, published-compatible perplexity, and bits per byte."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorank.auto import type_of
from lorank.loss import next_token_loss, predicted_tokens
from lorank.pretrained import positions_of
from lorank.speed.linear_cross_entropy import loss_without_logits
from lorank.train.data import TextSize, collate, end_of, load_evaluation
from lorank.train.data.corpus import MOST_TOKENS
from lorank.train.model import check_causal, check_positions, check_separate
from lorank.train.saved import load_model
from lorank.train.text import Text, text_of
from lorank.train.watching import tell


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
    text: str | None = None
    """Which text it was, in words; None: not known."""

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
    def is_comparable(self) -> bool:
        """Whether there are batches enough for the published-compatible figure to mean something; see `comparable`."""
        return comparable(self.perplexity, self.published_compatible_perplexity)

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


def comparable(unbiased: float, published_compatible: float) -> bool:
    """Whether the published-compatible perplexity is within a tenth of the unbiased one. With few batches it says more about their
    number than about the model: exp(5.7 / 2) = 17 for one batch of perplexity 300.

    >>> comparable(34.1, 33.9), comparable(300.0, 17.3)
    (True, False)
    """
    return unbiased < 1.1 * published_compatible


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    max_tokens: int | None = None,
    bytes_per_token: Callable[[int], float] | None = None,
) -> Evaluation:
    """Evaluate a causal language model of transformers on batches of ``input_ids`` and ``labels`` [b, n] (-100: not
    counted). `bytes_per_token` gives the UTF-8 bytes per token of the text in which the first so many tokens are predicted.

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
            predicted = int(predicted_tokens(batch["labels"]))
            if predicted == 0:
                continue
            mean = next_token_loss(model, batch, use_cache=False).nats.double().item()
            nats, losses = nats + mean * predicted, losses + mean
            tokens, count = tokens + predicted, count + 1
            tell("evaluating", tokens, _all_of(batches, tokens, count, max_tokens), "tokens")
            if max_tokens is not None and tokens >= max_tokens:
                break
    finally:
        model.train(training)
    if tokens == 0:
        raise ValueError("the evaluation data contain no token to predict")
    return Evaluation(nats, tokens, count, losses, bytes_per_token and bytes_per_token(tokens))


def _all_of(batches: Iterable[Any], tokens: int, count: int, max_tokens: int | None) -> int | None:
    """About how many tokens an evaluation predicts, after `count` batches; None for a stream."""
    try:
        expected = round(tokens / count * len(batches))  # type: ignore[arg-type]
    except TypeError:  # without a length
        return max_tokens
    return expected if max_tokens is None else min(expected, max_tokens)


def evaluate_folder(
    model: str, *, tokenizer: str | None = None, max_tokens: int | None = None, **text: Any
) -> Evaluation:
    """`evaluate` for a saved model (run folder, model folder or hub name): of a run on the text that it held out, or on any
    source of text that training accepts.

    Args:
        tokenizer: another than the model's own.
        max_tokens: predicted tokens after which it stops; default: as the run's last evaluation, else 10 million.
        text: fields of `lorank.train.text.Text`, from `data` to `batch_size`.

    Raises:
        ValueError: there is no model or no text; the seed, or text that has changed, holds out what the run was trained on; the model sees the tokens it
            predicts, or has weights that are not finite; or sequences are longer than its positions.
    """
    chosen = text_of(model, **text)
    loaded, own = load_model(model, tokenizer=tokenizer)
    check_causal(loaded)
    if chosen.documents == "separate":
        check_separate(loaded)
    chosen = with_length(chosen, loaded)
    rows = max_tokens or chosen.validation_tokens or MOST_TOKENS
    batches, size = text_for(loaded, own, chosen, max_tokens=rows)
    stop = max_tokens or chosen.last_tokens or rows
    found = evaluate(loss_without_logits(loaded), batches, max_tokens=stop, bytes_per_token=size.per_token)
    return found._replace(text=str(chosen))


def with_length(text: Text, model: nn.Module) -> Text:
    """The text with a length of sequences: its own, else 256 tokens, or the model's positions if they are fewer."""
    return dataclasses.replace(text, sequence_length=text.sequence_length or min(256, positions_of(model) or 256))


def text_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    max_tokens: int,
    make_batch: Callable[..., dict[str, Any]] | None = None,
) -> tuple[DataLoader, TextSize]:
    """A text for a model in batches, and its bytes per token. Errors are `evaluate_folder`'s. `make_batch` makes a batch from
    rows, by default `lorank.train.data.collate`."""
    embeddings = getattr(model.get_input_embeddings(), "weight", None)
    if model.main_input_name != "input_ids" or embeddings is None:
        raise ValueError(f"the model must read tokens, got type {type_of(model.config)!r}; use a language model")
    assert text.sequence_length is not None
    check_positions(model, text.sequence_length)
    rows, size = load_evaluation(
        text.data,
        tokenizer,
        sequence_length=text.sequence_length,
        documents=text.documents,
        text_column=text.text_column,
        stream=text.stream,
        seed=text.seed,
        held_out=text.held_out,
        held_out_hash=text.held_out_hash,
        validation_tokens=text.validation_tokens,
        max_tokens=max_tokens,
    )
    make = make_batch or partial(collate, vocab_size=embeddings.shape[0], end=end_of(text.documents, tokenizer))
    return DataLoader(rows, batch_size=text.batch_size, collate_fn=make), size  # type: ignore[arg-type]
