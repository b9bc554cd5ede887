"""What server and clients send each other, and whether it can be used."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorank.factors import Pair
from lorank.federated.rule import Factors
from lorank.federated.sparse import payload_bytes

MERGED = "merged"


@dataclass
class Package:
    """One message: some values, which JSON can hold, and tensors by name."""

    values: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of the tensors."""
        return payload_bytes(self.tensors)


@dataclass
class Memory:
    """What a client keeps between rounds."""

    version: int = 0
    """How many merges its frozen weights have."""
    rounds: int = 0
    """In how many rounds it has trained, each of which costs privacy."""
    merged: dict[str, Tensor] = field(default_factory=dict)
    """Sum of the merged products, by layer [m, n]."""


def tensors_of(factors: Factors, which: str = "BA") -> dict[str, Tensor]:
    """The factors "B", "A" or both by the names layer.B and layer.A."""
    return {
        f"{name}.{side}": factor
        for name, pair in factors.items()
        for side, factor in zip("BA", pair, strict=True)
        if side in which
    }


def factors_of(tensors: Mapping[str, Tensor], names: Sequence[str], others: Factors | None = None) -> dict[str, Pair]:
    """Pairs of these layers; a factor that is not there is that of `others`."""

    def one(name: str, side: str) -> Tensor:
        found = tensors.get(f"{name}.{side}")
        if found is not None:
            return found
        if others is None:
            raise KeyError(f"{name}.{side}")
        return others[name]["BA".index(side)]

    return {name: (one(name, "B"), one(name, "A")) for name in names}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that have the prefix, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def why_unfit(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> str | None:
    """Why tensors of a client cannot be used where `like` is expected, in words; None if they can."""
    if missing := sorted(like.keys() - tensors.keys()):
        return f"it sent no {missing[0]}"
    if unknown := sorted(tensors.keys() - like.keys()):
        return f"it sent {unknown[0]}, which nobody asked for"
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape:
            return f"{name} must have the shape {list(like[name].shape)}, got {list(tensor.shape)}"
        if tensor.dtype != like[name].dtype:
            return f"{name} must be numbers of {like[name].dtype}, got {tensor.dtype}"
        if not tensor.square().sum().isfinite():  # then a product of two factors is finite, too
            return f"{name} must be finite numbers, got {'too large ones' if tensor.isfinite().all() else 'others'}"
    return None


def number(value: Any) -> float | None:
    """A finite number that a client sent; None if it is something else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    return None


def whole(value: Any, least: int, most: int = 2**53) -> bool:
    """Whether a client sent a whole number from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, allow_nan=False)
