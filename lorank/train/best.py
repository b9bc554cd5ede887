"""The optimizer, the learning rate and the start of a run that names none of them: what the study (docs/study.md) found best for its method.

    lr(d) = lr(d₀) (d₀ / d)^p        d width of the model   d₀ the nearest width of the study   p of `POWERS`

With these p an update changes what a layer puts out equally much at every width (Yang et al., "A Spectral Condition for Feature Learning",
arXiv 2310.17813). AdamW's update of a layer [d, d] has entries of size lr, which may add up to lr d. Muon's has singular
values of 0.2 lr √d. Spectron bounds the update of B A by lr.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from lorank.train.methods import resolved
from lorank.train.model import build_config
from lorank.train.places import entries
from lorank.train.recipe import Recipe

COLA = {"muon": {256: 5e-3}, "spectron": {256: 5e-2}, "adamw": {256: 2.5e-3}}
RATES: Mapping[str, Mapping[str, Mapping[int, float]]] = {
    "dense": {"muon": {256: 5e-3}, "adamw": {256: 2.5e-3}},
    "cola": COLA,
    "cola-m": COLA,
    "low-rank": {"muon": {256: 5e-3}, "adamw": {256: 2.5e-3}},
}
"""Method -> optimizer, the best first -> width -> its best rate."""
POWERS = {"adamw": 1.0, "muon": 0.5, "spectron": 0.0}
ZERO_OUTPUTS = {("dense", "muon"), ("dense", "adamw"), ("cola", "muon"), ("cola-m", "muon")}
"""(Method, optimizer) that end lower with blocks that begin as the identity (`lorank.zero_outputs`), at every rate tried from both starts."""


class Best(NamedTuple):
    """An optimizer with its rate and the recipe's `zero_outputs`, and where they come from."""

    optimizer: str
    lr: float
    zero_outputs: bool
    source: str


def best_for(method: str, width: int, optimizer: str | None = None) -> Best | None:
    """What to train a method with at a width, with the best optimizer or the given one; None: the study says nothing about it.

    >>> best_for("cola", 256)
    Best(optimizer='muon', lr=0.005, zero_outputs=True, source='the best for cola in docs/study.md')
    >>> best_for("cola", 1024, "adamw")
    Best(optimizer='adamw', lr=0.000625, zero_outputs=False, source='from the best for cola in docs/study.md, 0.0025 at a width of 256')
    """
    rates = RATES.get(method, {})
    optimizer = optimizer or next(iter(rates), "")
    if optimizer not in rates:
        return None
    near = min(rates[optimizer], key=lambda known: abs(known - width))
    found, source = rates[optimizer][near], f"the best for {method} in docs/study.md"
    zero = (method, optimizer) in ZERO_OUTPUTS
    if near == width:
        return Best(optimizer, found, zero, source)
    lr = float(f"{found * (near / width) ** POWERS[optimizer]:.3g}")
    return Best(optimizer, lr, zero, f"from {source}, {found:g} at a width of {near}")


def with_best(recipe: Recipe, given: Mapping[str, Any]) -> tuple[Recipe, str | None]:
    """A recipe from flags alone with the optimizer, the rate and the start that it does not name.

    Blocks begin as the identity only in a Llama of a size of `lorank.sizes` whose methods have no other setting than a rank: with others, or
    in another architecture, weights are drawn.

    Args:
        given: the settings that were named.

    Returns:
        The recipe, and what was chosen and why in a sentence; None if nothing was.

    Raises:
        ValueError: the model has no such configuration, or the methods or their settings do not fit.
    """
    named = {name.partition(".")[0] for name in given}
    whole = resolved(dataclasses.replace(recipe, rank=None, options={}))  # which the optimizer that is chosen may need
    method, optimizer = (next(iter(entries(value))) for value in (whole.method, whole.optimizer))
    settings, own = entries(whole.method)[method], entries(whole.optimizer)[optimizer]
    if recipe.start_from is not None or whole.gradient != "autograd" or method not in RATES:
        return recipe, None
    moved = "optimizer" in named or optimizer in entries(recipe.method)
    width = getattr(build_config(recipe), "hidden_size", None)
    if not isinstance(width, int) or width < 1:  # which is refused when the model is built
        return recipe, None
    if (best := best_for(method, width, optimizer if moved else None)) is None:
        return recipe, None
    words = {} if moved else {"optimizer": f"optimizer {best.optimizer}"}
    words["lr"] = f"learning rate {best.lr:g}"
    as_measured = recipe.model is None and not recipe.options and settings.keys() | own.keys() <= {"rank"}
    if best.zero_outputs and as_measured:
        words["zero_outputs"] = "zero outputs at the start"
    left = [name for name in words if name not in named]
    if not left:
        return recipe, None
    chosen = {name: getattr(best, name) for name in left}
    *first, last = (words[name] for name in left)
    return recipe.but(chosen), f"{', '.join(first)}{' and ' * bool(first)}{last}: {best.source}"
