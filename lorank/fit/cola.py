"""A CoLA from a dense model: each matrix as a bottleneck with a non-linearity, fitted to what the layer gives on calibration text.

    W x ≈ B σ(A x)     min Σ |W x − B σ(A x)|² over inputs x of the text     W [m, n]   A [r, n]   B [m, r]   σ = SiLU

Start: the factors B₀ A₀ of rank r that are best on the text (`lorank.fit.svd`), with row i of A₀ scaled so that (A x)_i has root
mean square ρ (`reach`), and B by least squares. σ(z) = z/2 + z²/4 − …, so for ρ → 0 this is the best linear map, with a tiny A and a
huge B. The larger ρ is, the more non-linear the bottleneck and the larger the error. Then Adam moves A and B for some steps on samples of
inputs, and B follows once more by least squares. Of start and end the better one is kept. It is a start for training on, not a
compression: at equal rank a linear map loses less. The model is `lorank.CoLA` with nonlinearity "both", so that the block's own
activation stays.

Cost of a layer: as CoLA's; fitting: `steps` passes over `BATCH` inputs, in single precision.

Source: the layer is that of Liu et al., "CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation", arXiv 2502.10940,
who train from new weights. Fitting it to a dense model is ours; we know no paper that does.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorank.factors import nearest
from lorank.fields import Positive, Whole
from lorank.fit.structure import Found, Metric, Structure
from lorank.fit.svd import fill_factors
from lorank.method import Method, seeded_generator
from lorank.methods.cola import CoLA

BATCH = 1024
"""Inputs of a step."""
RATE = 0.03
"""Learning rate at first, in units of a factor's mean magnitude; it falls to zero along a line."""


def least_squares(Z: Tensor, Y: Tensor) -> Tensor:
    """B [m, r] that makes |Y − Z Bᵀ| least, with a small ridge; Z [N, r], Y [N, m], in double precision."""
    gram = Z.mT.double() @ Z.double()
    ridge = 1e-6 * gram.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), device=gram.device), Z.mT.double() @ Y.double()).mT


def linear_start(weight: Tensor, metric: Metric, rank: int, reach: float) -> tuple[Tensor, Tensor]:
    """A [r, n] with bottlenecks of root mean square `reach` on the sample, and B [m, r] by least squares, in single precision."""
    assert metric.rows is not None
    X = metric.rows
    A = nearest(weight, rank, metric.R)[1].to(X.dtype)
    size = (X @ A.mT).square().mean(0).sqrt().clamp(min=torch.finfo(X.dtype).tiny)
    A = A * (reach / size)[:, None]
    return A, least_squares(F.silu(X @ A.mT), X @ weight.to(X.dtype).mT).to(X.dtype)


def regress(X: Tensor, Y: Tensor, A: Tensor, B: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """A and B after so many steps of Adam on |Y − σ(X Aᵀ) Bᵀ|², X [N, n], Y [N, m]; B is then solved for."""
    factors = [A.clone().requires_grad_(), B.clone().requires_grad_()]
    generator = seeded_generator("fit", "cola")
    groups = [{"params": [one], "lr": RATE * one.detach().abs().mean().item()} for one in factors]
    with torch.enable_grad():
        optimizer = torch.optim.Adam(groups)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(steps):
            some = torch.randint(len(X), (min(BATCH, len(X)),), generator=generator).to(X.device)
            loss = (F.silu(X[some] @ factors[0].mT) @ factors[1].mT - Y[some]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    A = factors[0].detach()
    return A, least_squares(F.silu(X @ A.mT), Y).to(A.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedCoLA(Structure):
    """Bottlenecks with SiLU; ``lorank.fit(model, "cola", batches, budget=0.5)``."""

    name: ClassVar[str] = "cola"
    sample: ClassVar[int] = 4096
    is_linear: ClassVar[bool] = False

    reach: Positive = 1.0
    """ρ, root mean square of the bottlenecks at first."""
    steps: Whole = 300
    """Of the regression of a layer; 0: the linear start alone."""

    @classmethod
    def making(cls, method: Method) -> Structure | None:
        return cls() if isinstance(method, CoLA) and method == type(method)(rank=method.rank) else None  # CoLA-M too

    def method(self, rank: int | dict[str, int]) -> Method:
        return CoLA(rank=rank)

    def solve(self, weight: Tensor, metric: Metric, rank: int) -> Found:
        A, B = linear_start(weight, metric, rank, self.reach)
        assert metric.rows is not None
        X, Y = metric.rows, metric.rows @ weight.to(metric.rows.dtype).mT
        found = [(A, B)] + ([regress(X, Y, A, B, self.steps)] if self.steps else [])
        A, B = min(
            found, key=lambda pair: (F.silu(X @ pair[0].mT) @ pair[1].mT - Y).norm().nan_to_num(torch.inf).item()
        )
        return {"A": A.to(weight.dtype), "B": B.to(weight.dtype)}

    def apply(self, found: Found, x: Tensor) -> Tensor:
        return F.silu(x @ found["A"].mT) @ found["B"].mT

    def fill(self, layer: nn.Module, found: Found, bias: Tensor | None) -> None:
        fill_factors(layer, found, bias)
