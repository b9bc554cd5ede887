"""Spectra of the loss's gradients, each freed as soon as its singular values are known."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorank.analysis.batches import Batch, accepts, tokens_of, without_cache
from lorank.analysis.result import Projection
from lorank.analysis.spectrum import svdvals
from lorank.loss import cross_entropy
from lorank.sites import Place


def gradient_spectra(
    model: nn.Module, found: Sequence[Place], batches: Iterator[Batch], projections: Mapping[str, Projection]
) -> int:
    """Singular values of the gradients of the mean loss, into `projections`; returns the number of tokens."""
    wanted: dict[nn.Parameter, list[tuple[Place, str]]] = {}
    for place in (place for place in found if place.name in projections):
        for name, parameter in place.module.named_parameters():
            if parameter.requires_grad and parameter.ndim == 2 and min(parameter.shape) > 1:
                wanted.setdefault(parameter, []).append((place, name.removesuffix("weight").rstrip(".") or "W"))
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}

    def reduce(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            for place, label in wanted[parameter]:  # type: ignore[index]
                matrix = gradient.T if isinstance(place.module, Conv1D) else gradient
                sigma = svdvals(place.rows(matrix) if label == "W" else matrix)
                projections[place.name].gradients[label] = sigma / done  # of the mean

    hooks, done, tokens, masked = [], 0, 0, type(model).__name__.endswith("ForMaskedLM")
    following = next(batches, None)
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in wanted).grad = None
        while following is not None:
            batch, following = following, next(batches, None)
            done, tokens = done + 1, tokens + tokens_of(batch)
            if following is None:
                hooks = [parameter.register_post_accumulate_grad_hook(reduce) for parameter in wanted]
            with torch.enable_grad():
                given = {"labels": batch["input_ids"], **batch}
                labels = given.pop("labels")
                logits = model(**given, **without_cache(model)).logits
                loss = cross_entropy(logits, labels, ahead=0 if masked else 1)
                if loss.requires_grad:
                    loss.backward()
        for parameter in wanted:
            reduce(parameter)  # of a matrix that the last batch did not use
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, (trained, gradient) in before.items():
            parameter.requires_grad_(trained).grad = gradient
    return tokens


def why_no_loss(model: nn.Module, batch: Batch) -> str | None:
    """Why a model has no loss of tokens, and so no gradients; None if it has one."""
    kind = type(model).__name__
    named = (getattr(getattr(model, "config", None), "architectures", None) or [kind])[0]
    if not accepts(model, "labels"):
        if named != kind:
            return (
                f"only {kind}, the body of {named}, was analyzed, because the head of {named} is not a language model's"
            )
        return f"{kind} is a body without a head, which has no loss"
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        return f"the head of {kind} is not a language model's, so there is no loss of tokens"
    if kind.endswith("ForMaskedLM") and "labels" not in batch:
        return f"the loss of {kind} is of masked tokens, and nothing is masked (does the tokenizer have a mask token?)"
    return None
