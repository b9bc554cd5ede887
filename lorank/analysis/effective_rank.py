"""How many dimensions a model uses: singular values of activations, weights and gradients, layer by layer.

The effective rank r(α) of a matrix is the least k whose k largest singular values hold the fraction α of the energy,

    Σ_{i ≤ k} σ_i²  ≥  α Σ_i σ_i²

which for activations motivates CoLA (arXiv 2502.10940). For every projection of every block, we analyze:

    X [n, d_in], Y [n, d_out]   its inputs and outputs over all n tokens; the mean is not subtracted
    Y_l − β Y_{l−1}             against the same projection one block before, β = ⟨Y_l, Y_{l−1}⟩ / |Y_{l−1}|²: the
                                observation behind CR-Net (arXiv 2509.18993)
    W [d_out, d_in]             its weight; for a layer that is not linear, the product of its factors
    ∂L/∂W                       of each trained matrix: the foundation of GaLore (arXiv 2403.03507)

Activations are streamed: σ(Y)² are the eigenvalues of YᵀY = Σ_batches Y_bᵀ Y_b [d, d], so that only sums of such Gram
matrices outlive a batch, and the difference follows from three of them. They are kept in float64 because squaring
halves the digits: singular values are accurate down to 1e-8 of the largest. Each input and output needs 8 d² bytes, and
the difference as much again. A large model exceeds memory (a Llama of 7B: 208 GB); the text is then read several
times, each time for some of the projections.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from lorank.analysis.batches import Batch, until
from lorank.analysis.gradients import gradient_spectra, why_no_loss
from lorank.analysis.result import Analysis, Projection
from lorank.analysis.spectrum import gram_spectrum, scaled_difference, svdvals
from lorank.analysis.streams import Streams
from lorank.analysis.weights import linear_part
from lorank.conversion import method_of
from lorank.method import SHARED, Method
from lorank.sites import Place, blocks, derived_layers, places


def analyze(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tokens: int | None = None,
    gradient_batches: int = 1,
    room_bytes: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Analysis:
    """Spectra of every projection of a transformers model that reads tokens, dense or converted by lorank.

    The model runs in evaluation mode on its own device; afterwards its mode, gradients and parameters are as before.

    Args:
        batches: ``input_ids`` [b, n], and ``attention_mask`` and ``labels`` if there is padding, which does not count.
            Labels are optional for a causal model; a masked language model's gradients need them. An iterator, which
            can be read only once, is kept in memory, a few bytes per token.
        tokens: stop after the batch that reaches that many; None: all batches.
        gradient_batches: the first batches over which the loss is averaged for gradients; 0: no gradients. With one,
            each gradient is freed as soon as its singular values are known; several need room for all gradients.
        room_bytes: memory for the Gram matrices; if they need more, the batches are read several times. None: once.
        say: called with a line about each step.

    Raises:
        ValueError: no projections in repeated blocks, no batches, or numbers that are not finite.
    """
    found = list(places(model))
    if not found:
        kinds = derived_layers(model)
        others = f" ({', '.join(kinds)} do more than a linear layer)" if kinds else ""
        raise ValueError(
            f"found no linear layer inside a repeated block of this {type(model).__name__}{others}; nothing to analyze"
        )
    training, device = model.training, next(model.parameters()).device
    if iter(batches) is batches:
        batches = list(until(batches, tokens))

    def rows() -> Iterator[Batch]:
        for batch in until(batches, tokens):
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    first = next(rows(), None)
    if first is None:
        raise ValueError("the text must give at least one batch, got none")
    lossless = why_no_loss(model, first) if gradient_batches else None
    spectra: dict[str, Projection] = {}
    model.eval()
    try:
        with torch.no_grad():
            survey = Streams(found, only=())
            with survey.attached():
                survey.add(model, first)
            passes = list(survey.passes(math.inf if room_bytes is None else room_bytes))
            for number, some in enumerate(passes, 1):
                streams, part = Streams(found, only=some, before=survey.before), f", part {number} of {len(passes)}"
                with streams.attached():
                    for batch in rows():
                        streams.add(model, batch)
                        say(f"activations of {streams.tokens:,} tokens{part if len(passes) > 1 else ''}")
                say("spectra of activations and weights")
                spectra |= {one.name: one for one in _spectra(streams, method_of(model))}
        projections = [spectra[place.name] for place in found if place.name in spectra]
        seen = 0
        if gradient_batches and lossless is None:
            say("gradients")
            seen = gradient_spectra(model, found, itertools.islice(rows(), gradient_batches), spectra)
    finally:
        model.train(training)
    notes = [f"no gradients: {lossless}"] if lossless else []
    if room_bytes is not None and (most := max(map(survey.bytes_of, passes))) > room_bytes:
        notes.append(
            f"the sums took {most / 2**30:.3g} GiB, more than the {room_bytes / 2**30:.3g} GiB requested, because a single "
            "projection needs them"
        )
    left_out = _left_out(model, found, spectra)
    notes += _notes(model, projections, streams.tokens, seen, left_out, survey.calls)
    return Analysis(projections, streams.tokens, seen, notes, left_out)


def _spectra(streams: Streams, method: Method | None) -> Iterator[Projection]:
    """Of the projections that the streams summed."""
    for place in streams.places:
        name = place.name
        if name not in streams.outputs or name not in streams.wanted:
            continue
        if not all(sums[name].isfinite().all() for sums in (streams.outputs, streams.inputs) if name in sums):
            raise ValueError(
                f"the activations of {name} are not finite; the model has diverged, use an earlier checkpoint"
            )
        one = Projection(name, place.role, place.depth, streams.reads[name], gram_spectrum(streams.outputs[name]))
        one.d_in = streams.shapes[name][0]
        if one.reads == name:
            one.input = gram_spectrum(streams.inputs[name])
        if name in streams.crosses:
            before = streams.outputs[streams.before[name]]
            one.beta, gram = scaled_difference(streams.outputs[name], before, streams.crosses.pop(name))
            one.difference = gram_spectrum(gram)
        weight, one.weight_is = linear_part(place.module, method)
        if weight is not None:
            one.weight = svdvals(place.rows(weight))
        yield one


# ---- what the reader should know


def _left_out(model: nn.Module, found: list[Place], shown: Collection[str]) -> dict[str, int]:
    covered = {parameter for place in found if place.name in shown for parameter in place.module.parameters()}
    left: dict[str, int] = {}
    for stack, _, block in blocks(model):
        for inner, parameter in block.named_parameters():
            if parameter not in covered and sum(size > 1 for size in parameter.shape) > 1:
                role = f"{stack}.*.{inner}"
                left[role] = left.get(role, 0) + parameter.numel()
    return left


def _notes(
    model: nn.Module,
    projections: list[Projection],
    tokens: int,
    gradient_tokens: int,
    left_out: Mapping[str, int],
    calls: Mapping[str, int],
) -> Iterator[str]:
    width = max((max(one.d_in, one.d_out) for one in projections), default=0)
    if tokens < 10 * width:
        yield (
            f"{tokens:,} tokens are few for a width of {width:,}: no rank can exceed the number of tokens, so all are too "
            "low; use more tokens"
        )
    if any(one.weight_is == "product" for one in projections):
        yield "for layers that are not linear (CoLA, CR-Net), the weight is the product B·A of the factors"
    if left_out:
        total = sum(parameter.numel() for parameter in model.parameters())
        yield (
            f"left out, because no linear layer applies them: {sum(left_out.values()):,} of the model's {total:,} parameters, in "
            f"{', '.join(left_out)}"
        )
    often: dict[int, list[str]] = {}
    for one in projections:
        often.setdefault(calls[one.name], []).append(one.role)
    for number, roles in often.items():
        if number > 1:
            yield f"applied {number} times per pass and shown once, over all calls together: {', '.join(dict.fromkeys(roles))}"
    if gradient_tokens:
        if shared := {name.split(".")[-1] for name, _ in model.named_children() if SHARED in name} | {
            name for name, _ in getattr(model, "base_model", model).named_children() if name.startswith(SHARED)
        }:
            yield f"gradients of what blocks share ({', '.join(sorted(shared))}) belong to no single block and are not shown"
        if missing := sorted({one.role for one in projections if not one.gradients}):
            yield f"no gradients, because the projection has no trained matrix: {', '.join(missing)}"
