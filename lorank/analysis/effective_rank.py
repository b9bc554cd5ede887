"""How many dimensions a model uses: singular values of activations, weights and gradients, layer by layer.

The effective rank r(α) of a matrix is the least k whose k largest singular values hold the part α of the energy,

    Σ_{i ≤ k} σ_i²  ≥  α Σ_i σ_i²

which for activations motivates CoLA (arXiv 2502.10940). Looked at are, for every projection of every block:

    X [n, d_in], Y [n, d_out]   what it reads and gives, over all n tokens; no mean is taken off
    Y_l − β Y_{l−1}             against the same projection one block before, β = ⟨Y_l, Y_{l−1}⟩ / |Y_{l−1}|²: the
                                observation behind CR-Net (arXiv 2509.18993)
    W [d_out, d_in]             its weight; of what is not linear, the product of its factors
    ∂L/∂W                       of each matrix that is trained: what GaLore stands on (arXiv 2403.03507)

Activations are streamed: σ(Y)² are the eigenvalues of YᵀY = Σ_batches Y_bᵀ Y_b [d, d], so that only sums of such Gram
matrices live longer than a batch, and the difference follows from three of them. They are kept in float64, for squaring
halves the digits: singular values are good down to 1e-8 of the largest. A matrix takes 8 d² bytes for each input and output
and as much again for the difference, which for a large model is more than memory holds (all of a Llama of 7B: 208 GB); then
the text is gone through several times, each time for some of the projections.
"""

import contextlib
import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorank.analysis.spectrum import (
    effective_rank,
    gram_spectrum,
    rank_leaving,
    scaled_difference,
    svdvals,
)
from lorank.conversion import method_of
from lorank.method import SHARED, Method
from lorank.sites import Place, blocks, derived_layers, places

Batch = dict[str, Any]


@dataclasses.dataclass
class Projection:
    """Singular values of one projection of one block, descending."""

    name: str
    role: str
    depth: int
    reads: str
    """The projection under which the input's spectrum is found: itself, or the first that reads the same input."""
    output: Tensor
    input: Tensor | None = None
    difference: Tensor | None = None
    """Of Y_l − β Y_{l−1}; None in the first block."""
    beta: float | None = None
    weight: Tensor | None = None
    weight_is: str = "none"
    """weight; merged (the linear map that a converted layer amounts to); product (B·A of a layer that is not linear in its
    input alone, as CoLA's and CR-Net's); none."""
    gradients: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """By matrix that is trained: "W" for a dense layer, "A" and "B" for factors."""
    d_in: int = 0

    @property
    def d_out(self) -> int:
        return len(self.output)

    def to_dict(self, alpha: float) -> dict[str, Any]:
        def spectrum(sigma: Tensor | None) -> dict[str, Any] | None:
            if sigma is None:
                return None
            values = [float(f"{value:.5g}") for value in sigma.tolist()]
            return {"rank": effective_rank(sigma, alpha), "width": len(values), "singular_values": values}

        difference = spectrum(self.difference)
        if difference and self.difference is not None:
            energy = float(self.output.square().sum())
            difference["beta"] = self.beta
            difference["part_of_output_energy"] = float(self.difference.square().sum()) / energy if energy else 0.0
            difference["rank_at_output_error"] = rank_leaving(self.difference, (1 - alpha) * energy)
        return {
            **{name: getattr(self, name) for name in ("name", "role", "depth", "d_in", "d_out", "reads", "weight_is")},
            **{name: spectrum(getattr(self, name)) for name in ("input", "output", "weight")},
            "difference": difference,
            "gradients": {name: spectrum(sigma) for name, sigma in sorted(self.gradients.items())},
        }


@dataclasses.dataclass
class Analysis:
    """What `analyze` found."""

    projections: list[Projection]
    tokens: int
    """Over which activations were summed."""
    gradient_tokens: int
    notes: list[str]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """Matrices of the blocks that no linear layer applies, as the experts of Mixtral: role -> parameters, all depths together."""

    def to_dict(self, alpha: float = 0.95) -> dict[str, Any]:
        """As JSON types, with r(alpha) beside each spectrum."""
        found = [one.to_dict(alpha) for one in self.projections]
        counted = {"tokens": self.tokens, "gradient_tokens": self.gradient_tokens, "left_out": self.left_out}
        return {"alpha": alpha, **counted, "notes": self.notes, "projections": found}


def analyze(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tokens: int | None = None,
    gradient_batches: int = 1,
    room_bytes: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Analysis:
    """Spectra of every projection of a model of transformers that reads tokens, dense or converted by lorank.

    The model is run in evaluation mode where it is; its mode, gradients and parameters are afterwards what they were.

    Args:
        batches: ``input_ids`` [b, n], and ``attention_mask`` and ``labels`` if there is padding. What is padding does not
            count. A causal model's labels may be left out; a masked language model's gradients need them. What can be gone
            through once only (an iterator) is kept, which is a few bytes per token.
        tokens: stop after the batch in which so many are reached; None: all batches.
        gradient_batches: the first batches over which the loss is averaged for gradients; 0: no gradients. With one,
            each gradient is freed as soon as its singular values are known; several need room for all of them.
        room_bytes: for the Gram matrices; where they need more, the batches are gone through several times. None: once.
        say: told what is being done.

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
        batches = list(_until(batches, tokens))

    def rows() -> Iterator[Batch]:
        for batch in _until(batches, tokens):
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    first = next(rows(), None)
    if first is None:
        raise ValueError("the text gives not a single batch to look at")
    lossless = _why_no_loss(model, first) if gradient_batches else None
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
                spectra |= {one.name: one for one in streams.spectra(method_of(model))}
        projections = [spectra[place.name] for place in found if place.name in spectra]
        seen = 0
        if gradient_batches and lossless is None:
            say("gradients")
            seen = _gradient_spectra(model, found, itertools.islice(rows(), gradient_batches), spectra)
    finally:
        model.train(training)
    notes = [f"no gradients: {lossless}"] if lossless else []
    if room_bytes is not None and (most := max(map(survey.bytes_of, passes))) > room_bytes:
        notes.append(
            f"sums took {most / 2**30:.3g} GiB, more than the {room_bytes / 2**30:.3g} asked for: one projection alone needs that"
        )
    left_out = _left_out(model, found, spectra)
    notes += _notes(model, projections, streams.tokens, seen, left_out, survey.calls)
    return Analysis(projections, streams.tokens, seen, notes, left_out)


def _until(batches: Iterable[Batch], tokens: int | None) -> Iterator[Batch]:
    """Batches to the one with which so many tokens are reached."""
    seen = 0
    for batch in batches:
        yield batch
        seen += _real(batch)
        if tokens is not None and seen >= tokens:
            return


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """What a forward pass is told so that it keeps nothing for a next one; models that keep nothing do not know the word."""
    parameters = inspect.signature(model.forward).parameters.values()
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters)
    return {"use_cache": False} if _accepts(model, "use_cache") or open_ended else {}


def _why_no_loss(model: nn.Module, batch: Batch) -> str | None:
    """Why a model has no loss whose gradient could be looked at; None if it has one."""
    kind = type(model).__name__
    named = (getattr(getattr(model, "config", None), "architectures", None) or [kind])[0]
    if named != kind and not _accepts(model, "labels"):
        return (
            f"{kind} is looked at, the body of {named}, whose head is no language model's: there is no loss of tokens"
        )
    if not _accepts(model, "labels"):
        return f"{kind} is a body without a head, which has no loss"
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        return f"the head of {kind} is no language model's: there is no loss of tokens"
    if kind.endswith("ForMaskedLM") and "labels" not in batch:
        return f"the loss of {kind} is of masked tokens, and nothing is masked (has the tokenizer no mask token?)"
    return None


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
    """What a reader has to know of these figures."""
    width = max((max(one.d_in, one.d_out) for one in projections), default=0)
    if tokens < 10 * width:
        yield f"{tokens:,} tokens are few for a width of {width:,}: no rank can exceed their number, and all come out low; take more"
    if any(one.weight_is == "product" for one in projections):
        yield "where a layer is not a linear map of its input (CoLA, CR-Net), weights mean the product B·A of its factors"
    if left_out:
        total = sum(parameter.numel() for parameter in model.parameters())
        yield (
            f"left out, being matrices that no linear layer applies: {sum(left_out.values()):,} of the model's {total:,} parameters, in "
            f"{', '.join(left_out)}"
        )
    often: dict[int, list[str]] = {}
    for one in projections:
        often.setdefault(calls[one.name], []).append(one.role)
    for number, roles in often.items():
        if number > 1:
            yield f"applied {number} times in each pass, and shown once, over all of them together: {', '.join(dict.fromkeys(roles))}"
    if gradient_tokens:
        if shared := {name.split(".")[-1] for name, _ in model.named_children() if SHARED in name} | {
            name for name, _ in getattr(model, "base_model", model).named_children() if name.startswith(SHARED)
        }:
            yield f"gradients of what blocks share ({', '.join(sorted(shared))}) belong to no block and are not shown"
        if missing := sorted({one.role for one in projections if not one.gradients}):
            yield f"without a matrix of their own that is trained, so without gradients: {', '.join(missing)}"


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------


def _real(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


class Streams:
    """Sums of Gram matrices over batches, gathered by hooks on the projections; of their inputs alone if so asked, or of some
    projections only, for which it has to be known which ones are `before` them."""

    def __init__(
        self,
        found: list[Place],
        *,
        outputs: bool = True,
        only: Collection[str] | None = None,
        before: Mapping[str, str] | None = None,
    ):
        self.places = found
        self.wants_outputs = outputs
        self.wanted = {place.name for place in found} if only is None else set(only)
        self.beside = {earlier for name, earlier in (before or {}).items() if name in self.wanted}
        """Those of which outputs are summed too, for they are what the wanted ones are compared with."""
        self.shapes: dict[str, tuple[int, int]] = {}
        """Name -> (d_in, d_out)."""
        self.tokens = 0
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.crosses: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}
        """Name -> how often it was called."""
        self.reads: dict[str, str] = {}
        self.before: dict[str, str] = {}
        """Name of a projection -> the same one block before."""
        self._forget()

    def _forget(self) -> None:
        """Let go of what belongs to the batch at hand."""
        self.mask: Tensor | None = None
        self.read: tuple[Tensor, str] | None = None  # the input last seen and who read it first
        self.last: dict[str, tuple[int, str, Tensor]] = {}  # role -> depth, name and outputs of the block before

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        modules: dict[nn.Module, list[Place]] = {}
        for place in self.places:
            modules.setdefault(place.module, []).append(place)
        hooks = [module.register_forward_hook(partial(self._see, parts)) for module, parts in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, model: nn.Module, batch: Batch) -> None:
        mask = batch.get("attention_mask")
        self.mask = None if mask is None or bool(mask.all()) else mask.flatten().bool()
        try:
            model(**{name: batch[name] for name in batch if name != "labels"}, **_without_cache(model))
        finally:
            self._forget()
        self.tokens += _real(batch)

    def _see(self, parts: list[Place], module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x, first = args[0], parts[0].name
        reader = self.read[1] if self.read is not None and self.read[0] is x else first
        for place in parts:
            self.reads.setdefault(place.name, reader)
            self.calls[place.name] = self.calls.get(place.name, 0) + 1
        if self.reads[first] == first and first in self.wanted:
            x_rows = self._rows(x).double()
            _accumulate(self.inputs, first, x_rows, x_rows)
        self.read = x, reader
        if not self.wants_outputs:
            return
        y = self._rows(output)
        for place in parts:
            name, own = place.name, place.rows(y.T).T
            self.shapes[name] = x.shape[-1], own.shape[-1]
            if name in self.wanted or name in self.beside:
                own = own.double()
                _accumulate(self.outputs, name, own, own)
            above, earlier, previous = self.last.get(place.role, (-2, "", None))
            if above == place.depth - 1 and previous is not None and previous.shape == own.shape:
                self.before[name] = earlier
                if name in self.wanted:
                    _accumulate(self.crosses, name, own, previous)
            self.last[place.role] = place.depth, name, own

    def _rows(self, tensor: Tensor) -> Tensor:
        rows = tensor.detach().flatten(0, -2)  # [b n, d]
        return rows[self.mask] if self.mask is not None and len(self.mask) == len(rows) else rows

    def bytes_of(self, names: Collection[str]) -> int:
        """Of all sums that are needed for some projections that were seen."""
        total = 0
        for name in names:
            (d_in, d_out), earlier = self.shapes[name], self.before.get(name)
            total += d_out**2 + (self.reads[name] == name) * d_in**2
            total += 0 if earlier is None else d_out**2 * (2 if earlier not in names else 1)
        return 8 * total

    def passes(self, room: float) -> Iterator[list[str]]:
        """The projections that were seen, from first block to last, in groups whose sums fit in so many bytes; one at least in
        each."""
        group: list[str] = []
        for place in sorted(self.places, key=lambda place: place.depth):
            if place.name in self.shapes:
                if group and self.bytes_of([*group, place.name]) > room:
                    yield group
                    group = []
                group.append(place.name)
        if group:
            yield group

    def spectra(self, method: Method | None) -> list[Projection]:
        found = []
        for place in self.places:
            name = place.name
            if name not in self.outputs or name not in self.wanted:
                continue
            if not all(
                gram.isfinite().all() for gram in (self.outputs[name], self.inputs.get(name)) if gram is not None
            ):
                raise ValueError(
                    f"the activations of {name} are not finite numbers; the model has diverged, take an earlier one"
                )
            one = Projection(name, place.role, place.depth, self.reads[name], gram_spectrum(self.outputs[name]))
            one.d_in = self.shapes[name][0]
            if one.reads == name:
                one.input = gram_spectrum(self.inputs[name])
            if name in self.crosses:
                before = self.outputs[self.before[name]]
                one.beta, gram = scaled_difference(self.outputs[name], before, self.crosses.pop(name))
                one.difference = gram_spectrum(gram)
            weight, one.weight_is = linear_part(place.module, method)
            if weight is not None:
                one.weight = svdvals(place.rows(weight))
            found.append(one)
        return found


def _accumulate(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
    if name in sums:
        sums[name].addmm_(left.T, right)
    else:
        sums[name] = left.T @ right


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


def _gradient_spectra(
    model: nn.Module, found: list[Place], batches: Iterator[Batch], projections: dict[str, Projection]
) -> int:
    """Singular values of the mean loss's gradients, of each matrix as soon as it has its own; returns the number of tokens."""
    wanted: dict[nn.Parameter, list[tuple[Place, str]]] = {}
    for place in found:
        for name, parameter in place.module.named_parameters():
            if (
                place.name in projections
                and parameter.requires_grad
                and parameter.ndim == 2
                and min(parameter.shape) > 1
            ):
                wanted.setdefault(parameter, []).append((place, name.removesuffix("weight").rstrip(".") or "W"))
    kept = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}

    def reduce(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            for place, label in wanted[parameter]:  # type: ignore[index]
                matrix = gradient.T if isinstance(place.module, Conv1D) else gradient
                sigma = svdvals(place.rows(matrix) if label == "W" else matrix)
                projections[place.name].gradients[label] = sigma / done  # of the mean

    hooks, done, tokens = [], 0, 0
    following = next(batches, None)
    try:
        for parameter in kept:
            parameter.requires_grad_(parameter in wanted).grad = None
        while following is not None:
            batch, following = following, next(batches, None)
            done, tokens = done + 1, tokens + _real(batch)
            if following is None:
                hooks = [parameter.register_post_accumulate_grad_hook(reduce) for parameter in wanted]
            with torch.enable_grad():
                loss = model(**{"labels": batch["input_ids"], **batch}, **_without_cache(model)).loss
                if loss.requires_grad:
                    loss.backward()
        for parameter in wanted:
            reduce(parameter)  # of a matrix that the last batch did not use
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, (trained, gradient) in kept.items():
            parameter.requires_grad_(trained).grad = gradient
    return tokens


def linear_part(module: nn.Module, method: Method | None) -> tuple[Tensor | None, str]:
    """A projection's own weight, what its method merges it to, or the product of its factors, and which of these it is."""
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.T if isinstance(module, Conv1D) else module.weight, "weight"
    try:
        return (None, "none") if method is None else (method.merged(module)[0], "merged")
    except (ValueError, AssertionError, AttributeError, TypeError):  # not linear, or no projection at all
        A, B, W = (getattr(module, name, None) for name in "ABW")
        if isinstance(A, nn.Linear) and isinstance(B, nn.Linear):
            return B.weight @ A.weight, "product"
        return (W.weight, "weight") if isinstance(W, nn.Linear) else (None, "none")
