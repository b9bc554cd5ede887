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
halves the digits: singular values are good down to 1e-8 of the largest.
"""

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorank.conversion import method_of
from lorank.parametrization import SHARED, Parametrization
from lorank.projections import Place, linear_part, places
from lorank.spectrum import effective_rank, gram_spectrum, rank_leaving, scaled_difference, svdvals

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

    def to_dict(self, alpha: float = 0.95) -> dict[str, Any]:
        """As JSON types, with r(alpha) beside each spectrum."""
        found = [one.to_dict(alpha) for one in self.projections]
        counted = {"tokens": self.tokens, "gradient_tokens": self.gradient_tokens}
        return {"alpha": alpha, **counted, "notes": self.notes, "projections": found}


def analyze(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tokens: int | None = None,
    gradient_batches: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Analysis:
    """Spectra of every projection of a model of transformers that reads tokens, dense or converted by lorank.

    The model is run in evaluation mode where it is; its mode, gradients and parameters are afterwards what they were.

    Args:
        batches: ``input_ids`` [b, n], and ``attention_mask`` and ``labels`` if there is padding. What is padding does not
            count. A causal model's labels may be left out; a masked language model's gradients need them.
        tokens: stop after the batch in which so many are reached; None: all batches.
        gradient_batches: the first batches over which the loss is averaged for gradients; 0: no gradients. With one,
            each gradient is freed as soon as its singular values are known; several need room for all of them.
        say: told what is being done.

    Raises:
        ValueError: no projections in repeated blocks, no batches, or numbers that are not finite.
    """
    found = list(places(model))
    if not found:
        raise ValueError(
            f"found no linear layer inside a repeated block of this {type(model).__name__}; nothing to analyze"
        )
    training, device = model.training, next(model.parameters()).device
    rows = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches)
    first = list(itertools.islice(rows, max(gradient_batches, 1)))
    if not first:
        raise ValueError("the text gives not a single batch to look at")
    model.eval()
    try:
        with torch.no_grad():
            streams = Streams(found)
            with streams.attached():
                for batch in itertools.chain(first, rows):
                    streams.add(model, batch)
                    say(f"activations of {streams.tokens:,} tokens")
                    if tokens is not None and streams.tokens >= tokens:
                        break
            say("spectra of activations and weights")
            projections = streams.spectra(method_of(model))
        used = first[:gradient_batches]
        lossless = _why_no_loss(model, first[0]) if used else None
        if used and lossless is None:
            say("gradients")
            _gradient_spectra(model, found, used, {one.name: one for one in projections})
    finally:
        model.train(training)
    seen = 0 if lossless else sum(_real(batch) for batch in used)
    notes = [
        *([f"no gradients: {lossless}"] if lossless else []),
        *_notes(model, found, projections, streams.tokens, seen),
    ]
    return Analysis(projections, streams.tokens, seen, notes)


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
    if not _accepts(model, "labels"):
        return f"{kind} is a body without a head, which has no loss"
    if kind.endswith("ForMaskedLM") and "labels" not in batch:
        return f"the loss of {kind} is of masked tokens, and nothing is masked (has the tokenizer no mask token?)"
    return None


def _notes(
    model: nn.Module, found: list[Place], projections: list[Projection], tokens: int, gradient_tokens: int
) -> Iterator[str]:
    """What a reader has to know of these figures."""
    width = max((max(one.d_in, one.d_out) for one in projections), default=0)
    if tokens < 10 * width:
        yield f"{tokens:,} tokens are few for a width of {width:,}: no rank can exceed their number, and all come out low; take more"
    if any(one.weight_is == "product" for one in projections):
        yield "where a layer is not a linear map of its input (CoLA, CR-Net), weights mean the product B·A of its factors"
    if unused := {place.role for place in found} - {one.role for one in projections}:
        yield f"never called, so not shown: {', '.join(sorted(unused))}"
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
    """Sums of Gram matrices over batches, gathered by hooks on the projections; of their inputs alone if so asked."""

    def __init__(self, found: list[Place], *, outputs: bool = True):
        self.places = found
        self.wants_outputs = outputs
        self.tokens = 0
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.crosses: dict[str, Tensor] = {}
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
        if self.reads[first] == first:
            x_rows = self._rows(x)
            _accumulate(self.inputs, first, x_rows, x_rows)
        self.read = x, reader
        if not self.wants_outputs:
            return
        y = self._rows(output)
        for place in parts:
            own = place.rows(y.T).T
            _accumulate(self.outputs, place.name, own, own)
            above, earlier, previous = self.last.get(place.role, (-2, "", None))
            if above == place.depth - 1 and previous is not None and previous.shape == own.shape:
                self.before[place.name] = earlier
                _accumulate(self.crosses, place.name, own, previous)
            self.last[place.role] = place.depth, place.name, own

    def _rows(self, tensor: Tensor) -> Tensor:
        rows = tensor.detach().flatten(0, -2).double()  # [b n, d]
        return rows[self.mask] if self.mask is not None and len(self.mask) == len(rows) else rows

    def spectra(self, method: Parametrization | None) -> list[Projection]:
        found = []
        for place in self.places:
            name = place.name
            if name not in self.outputs:
                continue
            if not all(gram.isfinite().all() for gram in (self.outputs[name], self.inputs[self.reads[name]])):
                raise ValueError(
                    f"the activations of {name} are not finite numbers; the model has diverged, take an earlier one"
                )
            one = Projection(name, place.role, place.depth, self.reads[name], gram_spectrum(self.outputs[name]))
            one.d_in = len(self.inputs[one.reads])
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
    model: nn.Module, found: list[Place], batches: list[Batch], projections: dict[str, Projection]
) -> None:
    """Singular values of the mean loss's gradients, of each matrix as soon as it has its own."""
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
                projections[place.name].gradients[label] = svdvals(place.rows(matrix) if label == "W" else matrix)

    hooks = []
    try:
        for parameter in kept:
            parameter.requires_grad_(parameter in wanted).grad = None
        for done, batch in enumerate(batches, 1):
            if done == len(batches):
                hooks = [parameter.register_post_accumulate_grad_hook(reduce) for parameter in wanted]
            with torch.enable_grad():
                loss = model(**{"labels": batch["input_ids"], **batch}, **_without_cache(model)).loss
                if loss.requires_grad:
                    (loss / len(batches)).backward()
        for parameter in wanted:
            reduce(parameter)  # of a matrix that the last batch did not use
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, (trained, gradient) in kept.items():
            parameter.requires_grad_(trained).grad = gradient
