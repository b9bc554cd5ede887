"""What estimators of both kinds say of a step: its population in words, and what it holds in memory."""

from typing import Any, Literal

from torch import nn

from lorank.accounting import Memory, held_bytes


def in_words(estimate: Any, batch_size: int, sequence_length: int, *, rank: int, per_entry: int = 1) -> str:
    """Who estimates a step's gradient, on which data and from how many random numbers.

    Args:
        rank: of the noise of a matrix.
        per_entry: numbers drawn for one entry of a vector.
    """
    groups = estimate.population // (estimate.group_size or estimate.population)
    rows = batch_size // groups
    everything = sum(p.numel() for p in estimate.model.parameters())
    drawn = sum(rank * sum(p.shape) if p.ndim == 2 else per_entry * p.numel() for p in estimate.perturbed)
    return (
        f"{estimate.population:,} members, {min(estimate.chunk, estimate.population):,} at a time, "
        f"{f'each group of {estimate.group_size} on' if groups > 1 else 'all on the same'} {rows:,} "
        f"sequence{'s' * (rows > 1)} of {sequence_length}; noise on {sum(p.numel() for p in estimate.perturbed):,} of "
        f"{everything:,} parameters, from {drawn:,} numbers per pair"
    )


def step_memory(
    model: nn.Module, gradients: int, optimizer_bytes: int, most: int, when: Literal["forward", "step"]
) -> Memory:
    """Of a step that keeps no activations and holds at most `most` bytes besides weights and optimizer state."""
    weights = sum(t.numel() * t.element_size() for t in set(model.state_dict(keep_vars=True).values()))
    return Memory(weights, gradients, optimizer_bytes, 0, held_bytes(model) + optimizer_bytes + most, when)
