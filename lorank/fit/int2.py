"""INT2.1: matrices of very few bits, and factors that are trained until the model gives what its float parent gives.

    y = Ŵ x + B A x (+ b)     Ŵ [m, n] rounded and frozen   B [m, r]   A [r, n]

The start is EoRA's closed form (`lorank.fit.eora`). Then all factors are trained together on the calibration text. The loss of N tokens is

    "parent"   1/N Σ KL(p ‖ q)  +  λ / L Σ_l |h_l − h'_l|² / |h_l|²
    "model"    ½ / N d Σ |h_L − h'_L|²  +  ½ / N Σ −log q(next token)

p and q are the distributions of parent and model over the vocabulary, h_l and h'_l [N, d] the outputs of their block l, the last one
after the final norm. A model without a head over a vocabulary has the terms of the hidden states alone. Every factor is moved by
Adam with a learning rate of `rate` times its mean magnitude, which falls to zero along a line. If the loss on the whole text is no
less in the end, the start stays. So the result is never further from the parent on that text than the closed form.

Cost: as EoRA's, that is b + 16 r (m + n) / m n bits for each weight of b bits with factors of 16 (`bits_per_weight`), without scales.
Fitting needs a copy of the dense model in memory, and one pass of it for each of the `steps`.

Source: Chai et al., "INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank Adaptation",
arXiv 2306.08162, trains factors next to a quantised base to match the parent. Its terms, ranks and data are not published in detail:
the first loss is our reading. The second is that of Lee et al., RILQ, arXiv 2412.01129, with the weights of the authors' code.

Departures: rounding is to the nearest (`lorank.fit.bases`), where the authors quantise with GPTQ; the start is EoRA's, where theirs is
B = 0 and RILQ's a random A; Ŵ is stored as ordinary numbers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.adapters.lora import LoRALinear
from lorank.analysis.batches import Batch, without_cache
from lorank.fields import Bounds, Positive, Whole
from lorank.fit.bases import Base
from lorank.fit.eora import EoRA

# ---- the mathematics


def bits_per_weight(bits: float, rank: int, d_in: int, d_out: int, *, of_factors: int = 16) -> float:
    """Bits for each weight of a matrix with a base of so many and two factors, without scales.

    >>> round(bits_per_weight(2, 13, 4096, 4096), 2)
    2.1
    """
    return bits + of_factors * rank * (d_in + d_out) / (d_in * d_out)


def from_parent(found: "Outputs", wanted: "Outputs", hidden: float) -> Tensor:
    """KL(p ‖ q) for each token, and `hidden` times the mean over blocks of the relative squared difference of outputs."""
    loss = found.states[0].new_zeros(())
    if hidden:
        lacks = [
            (h - own).square().sum() / h.square().sum() for own, h in zip(found.states, wanted.states, strict=True)
        ]
        loss = loss + hidden * torch.stack(lacks).mean()
    if found.logits is not None and wanted.logits is not None:
        q, p = (one.log_softmax(-1) for one in (found.logits, wanted.logits))
        loss = loss + F.kl_div(q, p, reduction="sum", log_target=True) / len(p)
    return loss


def of_model(found: "Outputs", wanted: "Outputs") -> Tensor:
    """RILQ's loss: half the mean squared difference of the last states, and half the loss of the next tokens."""
    loss = 0.5 * F.mse_loss(found.states[-1], wanted.states[-1])
    return loss if found.text is None else loss + 0.5 * found.text


# ---- what models give


@dataclasses.dataclass
class Outputs:
    """Of a model on a batch, for its N tokens that are not padding, in single precision or better."""

    states: list[Tensor]
    """[N, d] of each block."""
    logits: Tensor | None
    """[N, V]."""
    text: Tensor | None
    """Mean of −log q(next token)."""

    @classmethod
    def of(cls, model: nn.Module, batch: Batch) -> "Outputs":
        given = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items() if name != "labels"}
        out = model(**given, **without_cache(model), output_hidden_states=True)
        ids = given["input_ids"]
        mask = given.get("attention_mask", torch.ones_like(ids)).bool()
        wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        states = out.get("hidden_states") or (*out["encoder_hidden_states"], *out["decoder_hidden_states"])
        logits, text = out.get("logits"), None
        logits = logits.to(wide) if logits is not None and logits.shape[:2] == ids.shape else None
        if logits is not None:
            both = mask[:, 1:] & mask[:, :-1]
            text = F.cross_entropy(logits[:, :-1][both], ids[:, 1:][both])
        rows = [one[mask].to(wide) for one in states if one.shape[:2] == ids.shape]
        return cls(rows[1:] or rows, None if logits is None else logits[mask], text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class INT2(EoRA):
    """Rounded matrices and trained factors; ``lorank.fit(model, "int2", batches, budget=0.1)``."""

    name: ClassVar[str] = "int2"
    needs_parent: ClassVar[bool] = True

    base: Base = "int2"
    """What becomes of the matrix, as in `EoRA`."""
    loss: Literal["parent", "model"] = "parent"
    """Predictions and hidden states of the parent, or RILQ's: last states and the text itself."""
    hidden: Annotated[float, Bounds(least=0)] = 1.0
    """λ, weight of the hidden states in "parent"."""
    steps: Whole = 100
    """Of training; 0: the closed form."""
    rate: Positive = 0.02
    """Learning rate of a factor, in units of its mean magnitude at first."""

    def distance(self, model: nn.Module, parent: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch."""
        with torch.no_grad():
            wanted = Outputs.of(parent, batch)
        found = Outputs.of(model, batch)
        return of_model(found, wanted) if self.loss == "model" else from_parent(found, wanted, self.hidden)

    def after(self, model: nn.Module, parent: nn.Module, data: Sequence[Batch]) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
        factors = [p for layer in layers for p in (layer.A.weight, layer.B.weight)]
        training = model.training
        model.eval(), parent.eval()
        start, first = [p.detach().clone() for p in factors], self._mean(model, parent, data)
        groups: list[dict[str, Any]] = [{"params": [p], "lr": self.rate * p.abs().mean().item()} for p in factors]
        optimizer = torch.optim.Adam(groups)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, self.steps))
        with torch.enable_grad():
            for step in range(self.steps):
                gradients = torch.autograd.grad(self.distance(model, parent, data[step % len(data)]), factors)
                for p, gradient in zip(factors, gradients, strict=True):
                    p.grad = gradient
                optimizer.step()
                rates.step()
        optimizer.zero_grad()
        if self.steps and not self._mean(model, parent, data) < first:
            with torch.no_grad():
                for p, old in zip(factors, start, strict=True):
                    p.copy_(old)
        model.train(training)

    @torch.no_grad()
    def _mean(self, model: nn.Module, parent: nn.Module, data: Sequence[Batch]) -> float:
        return sum(self.distance(model, parent, batch).item() for batch in data) / len(data)
