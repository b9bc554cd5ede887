"""What an analysis finds: singular values of every projection, and notes for the reader."""

import dataclasses
from typing import Any

from torch import Tensor

from lorank.analysis.spectrum import effective_rank, rank_leaving


@dataclasses.dataclass
class Projection:
    """Singular values of one projection of one block, descending."""

    name: str
    role: str
    depth: int
    reads: str
    """The projection that holds the input's spectrum: itself, or the first that reads the same input."""
    output: Tensor
    input: Tensor | None = None
    difference: Tensor | None = None
    """Of Y_l − β Y_{l−1}; None in the first block."""
    beta: float | None = None
    weight: Tensor | None = None
    weight_is: str = "none"
    """weight; merged (the linear map that equals a converted layer); product (B·A of a layer that is not linear, as CoLA's
    and CR-Net's); none."""
    gradients: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """By trained matrix: "W" for a dense layer, "A" and "B" for factors."""
    d_in: int = 0

    @property
    def d_out(self) -> int:
        return len(self.output)

    def to_dict(self, alpha: float) -> dict[str, Any]:
        difference = _described(self.difference, alpha)
        if difference and self.difference is not None:
            energy = float(self.output.square().sum())
            difference["beta"] = self.beta
            difference["part_of_output_energy"] = float(self.difference.square().sum()) / energy if energy else 0.0
            difference["rank_at_output_error"] = rank_leaving(self.difference, (1 - alpha) * energy)
        return {
            **{name: getattr(self, name) for name in ("name", "role", "depth", "d_in", "d_out", "reads", "weight_is")},
            **{name: _described(getattr(self, name), alpha) for name in ("input", "output", "weight")},
            "difference": difference,
            "gradients": {name: _described(sigma, alpha) for name, sigma in sorted(self.gradients.items())},
        }


def _described(sigma: Tensor | None, alpha: float) -> dict[str, Any] | None:
    if sigma is None:
        return None
    values = [float(f"{value:.5g}") for value in sigma.tolist()]
    return {"rank": effective_rank(sigma, alpha), "width": len(values), "singular_values": values}


@dataclasses.dataclass
class Analysis:
    """What `lorank.analysis.analyze` found."""

    projections: list[Projection]
    tokens: int
    """Over which activations were summed."""
    gradient_tokens: int
    notes: list[str]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """Matrices of the blocks that no linear layer applies, such as Mixtral's experts: role -> parameters, over all depths."""

    def to_dict(self, alpha: float = 0.95) -> dict[str, Any]:
        """As JSON types, with r(alpha) next to each spectrum."""
        found = [one.to_dict(alpha) for one in self.projections]
        counted = {"tokens": self.tokens, "gradient_tokens": self.gradient_tokens, "left_out": self.left_out}
        return {"alpha": alpha, **counted, "notes": self.notes, "projections": found}
