"""What the weights learned: singular values of each projection of a saved model, averaged over its blocks."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorank.analysis import spectrum
from lorank.analysis.weights import linear_part
from lorank.conversion import method_of
from lorank.sites import places
from lorank.train.folder import write_whole
from lorank.train.saved import load_model

ENERGY = 0.95
POINTS = 60
"""At which a spectrum is kept, at equal distances in index / width."""


@torch.no_grad()
def learned_spectra(folder: Path) -> dict[str, dict[str, Any]]:
    """Projection -> rank at 95 % of the energy (as a part of the narrower side, mean over blocks), and the spectrum.

    The energy of W is the sum of its squared singular values. If a projection is not one linear map, as CoLA's
    B·silu(A·x), the singular values are those of B·A. Kept in spectra.json next to the model.
    """
    kept = folder / "spectra.json"
    if kept.exists():
        return json.loads(kept.read_text())
    model, _ = load_model(str(folder))
    found: dict[str, list[tuple[float, list[float]]]] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for projection, weight in projections(model):
        sigma = torch.linalg.svdvals(weight.float().to(device)).cpu()
        found.setdefault(projection, []).append((effective_rank(sigma), _sampled(sigma)))
    spectra = {
        projection: {
            "effective_rank": _mean([rank for rank, _ in rows]),
            "spectrum": [_mean(column) for column in zip(*(curve for _, curve in rows), strict=True)],
        }
        for projection, rows in found.items()
    }
    write_whole(kept, json.dumps(spectra))
    return spectra


def projections(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(last part of the name, matrix [d_out, d_in]) of each projection of each block."""
    method = method_of(model)
    for place in places(model):
        weight, _ = linear_part(place.module, method)
        if weight is not None:
            yield place.name.rpartition(".")[2], place.rows(weight)


def effective_rank(sigma: Tensor) -> float:
    """r(0.95) over the number of singular values: the share of them that holds 95 % of the energy."""
    return spectrum.effective_rank(sigma, ENERGY) / len(sigma)


def _sampled(sigma: Tensor) -> list[float]:
    """σ_i / σ_1 at POINTS places from the first to the last."""
    places = torch.linspace(0, len(sigma) - 1, POINTS).round().long()
    return (sigma[places] / sigma[0].clamp_min(1e-30)).tolist()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
