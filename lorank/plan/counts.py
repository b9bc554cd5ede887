"""What one recipe's training takes: parameters, FLOPs and bytes, counted on a model without data."""

import dataclasses
import math

import torch
from torch import nn
from transformers import PreTrainedModel

from lorank import accounting
from lorank.optim.dct import forget_matrices
from lorank.optim.plain import AdamW
from lorank.train.build import build_estimator
from lorank.train.methods import (
    Methods,
    build_optimizer,
    gathered_bytes,
    kept_gradients,
    methods_of,
    state_bytes,
    step_flops,
)
from lorank.train.recipe import Recipe
from lorank.train.shape import uncounted

OPAQUE = {"adamw-8bit": AdamW()}
"""Rules whose kernels cannot be followed, and the rule that takes the same steps: theirs have the same temporary tensors,
as on a GPU, and smaller moments. (On a CPU these kernels make whole moments for a while.)"""


@dataclasses.dataclass(frozen=True)
class Counts:
    """A model's cost of training. FLOPs and memory are those of one micro-batch on one device, except for the step's."""

    parameters: accounting.Parameters
    flops: accounting.Flops
    tokens: int
    """Of the micro-batch."""
    memory: accounting.Memory
    step: accounting.Step
    """Bytes of the optimizer's step."""
    step_flops: float
    """Of the optimizer's own matrix products in an average step."""
    gathered_bytes: float = 0.0
    """What the optimizer makes whole on each device in an average step, if weights are sharded."""

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward passes, recomputation included."""
        return self.flops.total / self.tokens


def count(recipe: Recipe, model: PreTrainedModel, *, devices: int = 1) -> Counts:
    """What training `recipe`'s model takes on each of that many devices."""
    estimator, step = build_estimator(recipe, model), optimizer_step(recipe, model)
    if estimator is not None:
        flops, held = estimator.step_cost(
            batch_size=recipe.batch_size,
            sequence_length=recipe.sequence_length,
            optimizer_bytes=optimizer_bytes(recipe, model),
            autocast=recipe.precision == "bf16",
        )
        weights = accounting.held_bytes(model)
        if weights + step.most_bytes > held.peak_bytes:
            held = held._replace(peak_bytes=weights + step.most_bytes, peak_when="step")
        tokens = recipe.batch_size * recipe.sequence_length
        return Counts(accounting.count_parameters(model), flops, tokens, held, step, optimizer_flops(recipe, model))
    batch = recipe.micro_batch_size or recipe.batch_size
    try:
        flops = accounting.measure_flops(model, batch=batch, sequence_length=recipe.sequence_length)
    except ValueError as error:
        raise uncounted(error, model.config, recipe.shape) from error
    return Counts(
        accounting.count_parameters(model),
        flops,
        batch * recipe.sequence_length,
        memory(recipe, model, batch, devices=devices, step=step),
        step,
        optimizer_flops(recipe, model, devices=devices),
        gathered_bytes(recipe, model),
    )


def memory(
    recipe: Recipe, model: PreTrainedModel, batch: int, *, devices: int, step: accounting.Step | None = None
) -> accounting.Memory:
    """What each device holds that trains `recipe`'s model on `batch` sequences at a time; `step` is `optimizer_step`'s,
    if known.

    Gradients exist from the beginning of a micro-batch if others came before it, and where several devices train: there
    they lie in buckets that are never freed. DDP sorts its buckets once, before the second step, into new ones, unless it
    looks for unused parameters, which Trainer has it do for models without checkpoints.

    Raises:
        ValueError: the gradient is estimated, so that a chunk of its population decides what is held.
    """
    check_searchable(recipe)
    found = accounting.memory_estimate(
        model,
        optimizer_bytes=optimizer_bytes(recipe, model),
        step=step or optimizer_step(recipe, model),
        kept_gradients=kept_gradients(recipe, model),
        batch=batch,
        sequence_length=recipe.sequence_length,
        autocast=recipe.precision == "bf16",
        accumulate=devices > 1 or batch < recipe.batch_size,
        padded=recipe.documents != "packed",
    )
    sorted_anew = found.weights_bytes + found.optimizer_bytes + 2 * found.gradients_bytes
    if devices > 1 and model.is_activation_checkpointing and sorted_anew > found.peak_bytes:
        return found._replace(peak_bytes=sorted_anew, peak_when="forward")
    return found


def check_searchable(recipe: Recipe) -> None:
    """Raises ValueError if memory does not depend on the micro-batch, because the gradient is estimated."""
    method = methods_of(recipe).gradient
    if method.answers():
        raise ValueError(
            f"the memory of {method.name} depends on --option chunk and not on the batch, so it can be neither searched nor "
            "matched; leave out --fits or --match memory"
        )


def optimizer_flops(recipe: Recipe, model: PreTrainedModel, *, devices: int = 1) -> float:
    """Of the matrix products in an average step of the recipe's optimizer, on each device the same."""
    micro_batches = max(1, recipe.batch_size // (devices * (recipe.micro_batch_size or recipe.batch_size)))
    return step_flops(recipe, model, micro_batches=micro_batches)


def optimizer_step(recipe: Recipe, model: PreTrainedModel) -> accounting.Step:
    """What the recipe's optimizer and method hold in their largest step, one that refreshes bases."""
    usual = dataclasses.replace(recipe, lr=0.1, weight_decay=0.1, decay="matrices")
    found = methods_of(usual)
    followed = _followed(found)
    fewer = state_bytes(usual, model, followed) - state_bytes(usual, model, found)
    if hasattr(followed.optimizer, "update_gap"):
        often = dataclasses.replace(followed.optimizer, update_gap=1)  # type: ignore[call-arg]
        followed = followed._replace(optimizer=often)

    def build(twin: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(usual, twin, followed)

    forget_matrices()
    try:
        step = accounting.measure_step(model, build)
    finally:
        forget_matrices()
    more = accounting.rests_bytes(model) - fewer
    return accounting.Step(step.kept_bytes + more, step.most_bytes + more)


def _followed(found: Methods) -> Methods:
    """The same methods with a rule whose every tensor can be followed."""
    instead = OPAQUE.get(found.rule)
    if instead is None:
        return found
    if hasattr(found.optimizer, "rule"):
        return found._replace(optimizer=dataclasses.replace(found.optimizer, rule=instead.name))  # type: ignore[call-arg]
    return found._replace(optimizer=instead)


def optimizer_bytes(recipe: Recipe, model: PreTrainedModel) -> int:
    """What the recipe's optimizer keeps between steps."""
    return state_bytes(recipe, model)


def standing_bytes(recipe: Recipe, model: PreTrainedModel) -> int:
    """Weights, gradients and optimizer state of a step with several micro-batches: the least that it needs, known at once."""
    kept = kept_gradients(recipe, model)
    gradients = sum(math.prod(kept.get(p, p.shape)) * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + gradients + state_bytes(recipe, model)
