"""The loss of a language model, from its logits: one way for every architecture, in training as in evaluation.

    loss = -1/N sum over the N predicted tokens of log p(token i + 1 | tokens up to i)        nats per token

Classes of transformers disagree about what they call the loss: some compare position i with token i, some average over
other tokens than they predict, some add what balances their experts. So models are called without labels. What an
architecture adds to its training loss (`auxiliary_loss`) is no part of the loss and of perplexity.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
"""The label of a position that is not predicted."""
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""What a model or its configuration calls the weight of the term that balances its experts."""


class Loss(NamedTuple):
    nats: Tensor
    """Cross-entropy: the sum over predicted tokens, divided by the items if their number is given, else by that of this batch."""
    auxiliary: Tensor | None
    """What the architecture adds in training; None: nothing."""

    @property
    def total(self) -> Tensor:
        """What training differentiates."""
        return self.nats if self.auxiliary is None else self.nats + self.auxiliary

    def detach(self) -> "Loss":
        return Loss(self.nats.detach(), None if self.auxiliary is None else self.auxiliary.detach())


def cross_entropy(logits: Tensor, labels: Tensor, items: Tensor | int | None = None, *, ahead: int = 1) -> Tensor:
    """Of logits [b, n, V] at labels [b, n] `ahead` positions later, in fp32: the sum divided by `items`; None: the mean.

    >>> cross_entropy(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]))  # log 8
    tensor(2.0794)
    """
    wanted = F.pad(labels, (0, ahead), value=IGNORED)[:, ahead:].to(logits.device)
    reduction = "mean" if items is None else "sum"
    nats = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction=reduction)
    return nats if items is None else nats / items


def predicted_tokens(labels: Tensor) -> Tensor:
    """How many of labels [b, n] are predicted: those that are not the first of their row, and not ignored."""
    return (labels[:, 1:] != IGNORED).sum()


def next_token_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    items: Tensor | int | None = None,
    *,
    owner: nn.Module | None = None,
    nats: Any = None,
    **settings: Any,
) -> Loss:
    """The loss of a causal language model on a batch of ``input_ids`` and ``labels`` [b, n].

    Args:
        items: predicted tokens of all the batches over which the loss is a mean; None: of this one.
        owner: the model itself, if `model` is a wrapper around it.
        nats: a function of logits, labels and items such as `cross_entropy`; None: the model's own head where that gives the
            loss without logits (`gives_loss`), else `cross_entropy`.
        settings: more arguments of the model.

    Raises:
        ValueError: the model adds a term whose weight is not known.
    """
    labels, owner = batch["labels"], model if owner is None else owner
    if nats is None and gives_loss(owner) and not isinstance(model, nn.DataParallel):  # which joins logits, not losses
        output = model(**batch, num_items_in_batch=items, next_token_alone=True, **settings)
        found = output.loss
    else:
        output = model(**{name: value for name, value in batch.items() if name != "labels"}, **settings)
        found = (nats or cross_entropy)(output.logits, labels, items)
    return Loss(found, auxiliary_loss(owner, output, labels, items))


def head_of(model: nn.Module) -> Any:
    """The layer that gives a language model's logits; None for a model without one."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def gives_loss(model: nn.Module) -> bool:
    """Whether a model computes the loss for its labels without logits (`lorank.loss_without_logits`)."""
    return getattr(head_of(model), "gives_loss", False) is True


def auxiliary_loss(model: nn.Module, output: Any, labels: Tensor, items: Tensor | int | None = None) -> Tensor | None:
    """What an architecture adds to its training loss, with its weight: the balance of experts, or a z-loss (Bamba); None:
    nothing. A z-loss is a mean over the same tokens as the loss.

    Raises:
        ValueError: the weight of the balance is not known.
    """
    found: list[Tensor] = []
    if isinstance(balance := getattr(output, "aux_loss", None), Tensor):
        weight = _setting(model, *COEFFICIENTS)
        if weight is None:
            raise ValueError(
                f"{type(model).__name__} balances its experts with a weight that lorank does not know; set "
                "shape.output_router_logits=false"
            )
        found.append(weight * balance.mean())  # of several devices in one process
    if weight := has_z_loss(model):
        wanted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:] != IGNORED
        squares = output.logits.float().logsumexp(-1).square() * wanted.to(output.logits.device)
        found.append(weight * squares.sum() / (predicted_tokens(labels) if items is None else items))
    return torch.stack(found).sum() if found else None


def has_z_loss(model: nn.Module) -> Any:
    """The weight of a term that pulls at the logits' sums (Bamba), or nothing."""
    return _setting(model, "z_loss_coefficient")


def balances_experts(model: nn.Module) -> bool:
    """Whether a model adds a term that balances its experts over a batch. It is a product of means over the tokens of a batch, so
    its mean over parts of a batch is another number. A setting that asks for it may be that of a model without experts, so the model
    is asked for the term on two tokens."""
    if not (_setting(model, "output_router_logits") and _setting(model, *COEFFICIENTS)):
        return False
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad(), torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
        return isinstance(getattr(model(input_ids=ids, use_cache=False), "aux_loss", None), Tensor)


def _setting(model: nn.Module, *names: str) -> Any:
    """The first of these that a model, its configuration or that of its text model has."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    for place in (model, config, text):
        for name in names:
            if (value := getattr(place, name, None)) is not None:
                return value
    return None
