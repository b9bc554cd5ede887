"""The loss of a language model without its logits: head and cross-entropy together, some tokens at a time.

    z = x Wᵀ (+ b)    loss = 1/N Σᵢ (log Σᵥ exp zᵢᵥ − zᵢ,yᵢ)        x [n, d]   W [V, d]   y [n] labels, N of which are predicted

A chunk of c tokens has its logits [c, V] only while they are used. With p = softmax(z) the gradient of the logits, times N, is
G = p − onehot(y), so that the chunk also gives

    dx = G W [c, d]        dW += Gᵀ x [V, d]        db += Σᵢ Gᵢ

in the forward pass; the backward pass multiplies them by the gradient of the loss and 1/N. That is the same three products as with logits,
and instead of the logits [n, V], their logarithms in fp32 and their gradient there are dW, which is needed anyway, and one chunk.

`loss_without_logits` gives a model a head like this. In training it then takes ``labels`` and returns ``loss`` with ``logits=None``, as
models with Liger's kernels do. Without labels, and in evaluation, it returns logits.

The idea is that of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009, whose kernels also leave
out entries of p that are nearly zero; here all are there.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorank.loss import IGNORED, auxiliary_loss, cross_entropy, has_z_loss, head_of
from lorank.sites import body_of

Model = TypeVar("Model", bound=nn.Module)
AT_ONCE = 2**24
"""Logits of a chunk: 64 MiB in fp32."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, labels: Tensor, items: Tensor) -> Tensor:
        number = torch.promote_types(x.dtype, torch.float32)
        wanted, predicted = labels.masked_fill(labels == IGNORED, 0), (labels != IGNORED).to(x.dtype)[:, None]
        for_x, for_W, for_b = ctx.needs_input_grad[:3]
        dx = torch.empty_like(x) if for_x else None
        dW = db = None
        nats, many = x.new_zeros((), dtype=number), max(1, AT_ONCE // len(W))
        for first in range(0, len(x), many):
            rows = slice(first, first + many)
            z, y, mask = F.linear(x[rows], W, b).to(number), wanted[rows, None], predicted[rows]
            log_p = torch.log_softmax(z, -1, out=z)
            nats -= (log_p.gather(1, y) * mask).sum()
            if not any(ctx.needs_input_grad):
                continue
            G = log_p.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=number)).to(x.dtype)
            if dx is not None:
                dx[rows] = (G @ W) * mask
            if for_W:
                dW = _plus_product(dW, G, x[rows] * mask, number)
            if for_b:
                db = _plus_product(db, G, mask, number)
        ctx.kept = dx, None if dW is None else dW.to(W.dtype), None if b is None or db is None else db[:, 0].to(b.dtype)
        ctx.items = items
        return nats / items

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kept is None:
            raise RuntimeError(
                "the gradients of this loss were used already; call the model again instead of retain_graph"
            )
        kept, ctx.kept = ctx.kept, None
        share = grad / ctx.items
        return *(None if one is None else one.mul_(share) for one in kept), None, None


def _plus_product(total: Tensor | None, G: Tensor, x: Tensor, number: torch.dtype) -> Tensor:
    """The total + Gᵀ x, in place, and no tensor for the product alone where the kernels can."""
    if total is None:
        return (G.mT @ x).to(number)
    if G.dtype == number and not torch.is_autocast_enabled(x.device.type):
        return total.addmm_(G.mT, x)
    return total.add_(G.mT @ x)


def linear_cross_entropy(
    x: Tensor, W: Tensor, b: Tensor | None, labels: Tensor, items: Tensor | int | None = None
) -> Tensor:
    """`lorank.loss.cross_entropy` of the logits x Wᵀ + b [b, n, V], which are never there as a whole.

    Args:
        x: [b, n, d], what the head gets.
        W, b: [V, d] and [V], the head's.
        labels: [b, n]; position i predicts label i + 1.
        items: what the sum is divided by; None: the predicted labels.

    >>> linear_cross_entropy(torch.zeros(1, 3, 4), torch.zeros(8, 4), None, torch.tensor([[1, 2, 3]]))  # log 8
    tensor(2.0794)
    """
    wanted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(x.device).flatten()
    count = (wanted != IGNORED).sum() if items is None else torch.as_tensor(items, device=x.device)
    return _LinearCrossEntropy.apply(x.flatten(0, -2), W, b, wanted, count)  # type: ignore[no-any-return]


class LossHead(nn.Linear):
    """A head that gives the loss in the place of logits while it has labels."""

    gives_loss: ClassVar[bool] = True
    labels: Tensor | None = None
    """[b, n], for the call that is running."""
    items: Tensor | int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.labels is None:
            return super().forward(x)
        if torch.compiler.is_compiling() or hasattr(self.weight, "device_mesh"):  # or one of several devices' parts
            return cross_entropy(super().forward(x), self.labels, self.items)
        return linear_cross_entropy(x, self.weight, self.bias, self.labels, self.items)


ELSEWHERE = ("shift_labels", "ignore_index", "logits_to_keep")
"""Arguments with which a model's own loss is another one."""


def loss_without_logits(model: Model) -> Model:
    """Let a causal language model that is trained compute the loss for ``labels`` without making its logits, in place. The term that balances
    experts is part of it as ever.

    A model whose logits are more than its head's outputs (scaled, capped, cut) stays as it is, and so does one whose loss is more than
    the cross-entropy of the next token, or whose ``forward`` somebody has replaced. A loss or arguments that are set later have
    logits again.

    Returns:
        The model.
    """
    head = head_of(model)
    plain = type(head) is nn.Linear and "forward" not in model.__dict__ and body_of(model) is not model
    if plain and not has_z_loss(model) and _is_next_token_loss(model, head):
        head.__class__ = LossHead
        model.forward = types.MethodType(_forward_of(type(model)), model)  # a deep copy of the model has its own
    return model


class _States(dict[str, Tensor]):
    """What a body may return: hidden states, and nothing else that a model may ask for."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("last_hidden_state") if key == 0 else super().__getitem__(key)


def _is_next_token_loss(model: Any, head: nn.Linear) -> bool:
    """Whether the head's outputs are the model's logits, the same tensor, and its loss is that of the next token. What follows the body is run
    on six tokens, with logits that are made up, so that no weights are needed."""
    body = body_of(model)
    before = {module: module.__dict__.get("forward") for module in (body, head)}
    ids = torch.arange(6, device="cpu")[None]
    labels = torch.where(ids == 2, IGNORED, (ids * ids + 1) % head.out_features)
    made_up = torch.arange(6 * head.out_features, device="cpu").view(1, 6, -1).float().sin()
    states = torch.ones(1, 6, head.in_features, device="cpu")
    balances = getattr(model.config, "output_router_logits", False)  # by a term that `auxiliary_loss` knows
    body.__dict__["forward"] = lambda *args, **kwargs: _States(last_hidden_state=states)
    head.__dict__["forward"] = lambda x: made_up
    try:
        with torch.no_grad(), torch.device("cpu"):
            given = {"input_ids": ids, **({"output_router_logits": False} if balances else {})}
            logits, loss = model(**given).logits, model(**given, labels=labels).loss
            return logits is made_up and torch.allclose(loss, cross_entropy(made_up, labels))
    except Exception:  # modelling code that wants more of its body
        return False
    finally:
        for module, own in before.items():
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own


def _forward_of(kind: type[nn.Module]) -> Callable[..., Any]:
    """A class's forward, which hands labels to the head, and what comes from there on as the loss. `next_token_loss` wants the loss of the
    next token alone, in evaluation too."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, next_token_alone: bool = False, **kwargs: Any) -> Any:
        asked = kwargs.get("labels") is not None and kwargs.get("return_dict") is not False
        others = any(kwargs.get(name) is not None for name in ELSEWHERE) or "_loss_function" in self.__dict__
        if not asked or ((others or not self.training) and not next_token_alone):
            return kind.forward(self, *args, **kwargs)
        head, labels, items = head_of(self), kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        head.labels, head.items = labels, items
        try:
            output = kind.forward(self, *args, **kwargs)
        finally:
            head.labels = head.items = None
        loss = output.logits
        if not next_token_alone and (more := auxiliary_loss(self, output, labels, items)) is not None:
            loss = loss + more
        return type(output)(**{**output, "loss": loss, "logits": None})

    return forward
