"""What the weights learned: singular values of every projection of a saved model, averaged over its blocks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorank.conversion import blocks, method_of
from lorank.train.run import load_model
from lorank.train.trainer import write_whole

ENERGY = 0.95
POINTS = 60
"""At which a spectrum is kept, at equal distances in index / width."""


@torch.no_grad()
def learned_spectra(folder: Path) -> dict[str, dict[str, Any]]:
    """Projection -> rank at 95 % of the energy (as a part of the narrower side, mean over blocks), and the spectrum.

    The energy of W is the sum of its squared singular values. Where a projection is no single linear map, CoLA's
    B·silu(A·x), it is the product B·A that is looked at. Kept in spectra.json beside the model.
    """
    kept = folder / "spectra.json"
    if kept.exists():
        return json.loads(kept.read_text())
    model, _ = load_model(str(folder))
    found: dict[str, list[tuple[float, list[float]]]] = {}
    taken: set[str] = set()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for prefix, _, block in blocks(model):
        for name, module in block.named_modules():
            if any(
                name.startswith(f"{parent}.")
                for parent in (t.partition(":")[2] for t in taken if t.startswith(f"{prefix}:"))
            ):
                continue
            weight = linear_part(module, method_of(model))
            if weight is None or min(weight.shape) < 2:
                continue
            taken.add(f"{prefix}:{name}")
            sigma = torch.linalg.svdvals(weight.float().to(device)).cpu()
            found.setdefault(name.rpartition(".")[2], []).append((_rank(sigma), _sampled(sigma)))
    spectra = {
        projection: {
            "effective_rank": _mean([rank for rank, _ in rows]),
            "spectrum": [_mean(column) for column in zip(*(curve for _, curve in rows), strict=True)],
        }
        for projection, rows in found.items()
    }
    write_whole(kept, json.dumps(spectra))
    return spectra


def linear_part(module: nn.Module, method: Any) -> Tensor | None:
    """The matrix [d_out, d_in] of a projection: its own weight, what its method merges it to, or B·A; None if it is
    none of these."""
    if type(module).__name__ == "Conv1D":
        return module.weight.T  # type: ignore[operator,return-value]
    if isinstance(module, nn.Linear):
        return module.weight
    if method is not None and type(module).__module__ == type(method).__module__:
        try:
            return method.merged(module)[0]
        except (ValueError, AttributeError, TypeError, NotImplementedError):
            factors = getattr(module, "A", None), getattr(module, "B", None)
            if all(isinstance(factor, nn.Linear) for factor in factors):
                return factors[1].weight @ factors[0].weight  # type: ignore[union-attr,operator]
    return None


def _rank(sigma: Tensor) -> float:
    """r(0.95) over the number of singular values: how many hold 95 % of the energy."""
    energy = sigma.double().square().cumsum(0)
    return int((energy < ENERGY * energy[-1]).sum() + 1) / len(sigma) if energy[-1] > 0 else 0.0


def _sampled(sigma: Tensor) -> list[float]:
    """σ_i / σ_1 at POINTS places from the first to the last."""
    places = torch.linspace(0, len(sigma) - 1, POINTS).round().long()
    return (sigma[places] / sigma[0].clamp_min(1e-30)).tolist()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
