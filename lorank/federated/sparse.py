"""Sparse communication around any rule (FLASC, CELLM): only the largest numbers go down and up.

    down    θ̃ = θ where |θ| is among the ⌊dN⌋ largest of all N numbers, else 0
    up      Δ = θ_i − θ̃, likewise the ⌊dN⌋ largest of |Δ|; the server takes θ + Δ for the client's state

Clients train densely, and Δ is measured from what they received. Of equal numbers the first ones are kept. A density of 1 sends all of
them as they are, so the rule is then exactly what it was.

Sends ⌊dN⌋ values of 4 bytes and as many places of 4 bytes, or N values if these are fewer bytes, as from d = 1/2 on.

Source: Kuo et al., "Federated LoRA with Sparse Communication" (FLASC), 2024, arXiv 2406.05233. What is published of CELLM (arXiv 2407.20557)
coincides with it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
VALUES, PLACES = "values", "places"
"""Names in a sparse payload: numbers, and where they are in all tensors end to end, in the order of their names."""


def kept(numbers: Tensor, density: float) -> Tensor:
    """Places of the ⌊dN⌋ numbers [N] of largest magnitude, ascending; the first ones among equals.

    Raises:
        ValueError: density is not above 0 and at most 1.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    count = math.floor(density * len(numbers) + 1e-9)  # 0.1 · 30 is a little less than 3
    return numbers.abs().sort(descending=True, stable=True).indices[:count].sort().values


def packed(tensors: Tensors, density: float) -> dict[str, Tensor]:
    """What is sent: the kept values and their places, or the tensors, with zeros where nothing is kept, if these are fewer bytes."""
    if density == 1 or not tensors:
        return dict(tensors)
    numbers = _joined(tensors)
    places = kept(numbers, density)
    values = numbers[places]
    if len(places) * (values.element_size() + 4) < len(numbers) * values.element_size():
        return {VALUES: values, PLACES: places.to(torch.int32)}
    return _parted(torch.zeros_like(numbers).index_copy(0, places, values), tensors)


def unpacked(payload: Tensors, like: Tensors) -> dict[str, Tensor]:
    """The tensors of a payload, in the shapes of `like`, with zeros where nothing was sent.

    Raises:
        ValueError: values and places do not fit each other or the shapes.
    """
    if VALUES not in payload:
        return dict(payload)
    values, places = payload[VALUES], payload[PLACES].long()
    total = sum(tensor.numel() for tensor in like.values())
    if values.shape != places.shape or values.dim() != 1 or len(places.unique()) < len(places):
        raise ValueError(
            f"values and places must be as many, all different, got {list(values.shape)} and {list(places.shape)}"
        )
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < total:
        raise ValueError(f"places must be below {total}, got {int(places.max())}")
    return _parted(values.new_zeros(total).index_copy(0, places, values), like)


def change(trained: Tensors, received: Tensors) -> dict[str, Tensor]:
    """Δ = θ_i − θ̃."""
    return {name: trained[name] - received[name] for name in trained}


def changed(state: Tensors, delta: Tensors) -> dict[str, Tensor]:
    """θ + Δ."""
    return {name: state[name] + delta[name] for name in delta}


def payload_bytes(payload: Tensors) -> int:
    """Bytes of the tensors that are sent."""
    return sum(tensor.numel() * tensor.element_size() for tensor in payload.values())


def _joined(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _parted(numbers: Tensor, like: Tensors) -> dict[str, Tensor]:
    names = sorted(like)
    parts = numbers.split([like[name].numel() for name in names])
    return {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}
