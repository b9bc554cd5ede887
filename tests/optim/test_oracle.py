"""`LowRankOptimizer` against the optimizers that lorank had before it: the same weights to 1e-12 in float64."""

import io
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lorank import Adafactor, AdamW8bit, DCTAdamW, Fira, GaLore, Method, Muon, Trion
from lorank.optim.legacy import dct_adamw, fira, galore, muon_adamw, subspace, trion

SHAPES = [(12, 20), (20, 12), (16, 16), (20, 12)]


def adamw_8bit(groups: Any, **settings: Any) -> torch.optim.Optimizer:
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(groups, **settings)


def adafactor(groups: Any, *, betas: Any, eps: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, **settings)


OLD = {"adamw": None, "adamw-8bit": adamw_8bit, "adafactor": adafactor, "muon": muon_adamw.MuonAdamW}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [*SHAPES, (12,), (8, 6)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def groups(some: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": some[:3], "rank": 4, "weight_decay": 0.1},
        {"params": some[3:4], "rank": 30, "weight_decay": 0.0},
        {"params": some[4:], "weight_decay": 0.1, "rank": None},
    ]


def steps(optimizer: Any, some: list[nn.Parameter], count: int = 7, parts: int = 1) -> list[torch.Tensor]:
    for step in range(count):
        for part in range(parts):
            generator = torch.Generator().manual_seed(100 + 10 * step + part)
            given = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in some]
            torch.stack([(p * G).sum() for p, G in zip(some, given, strict=True)]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in some]


def same(new: Method, old: Any, dtype: torch.dtype, parts: int = 1, **given: Any) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    mine = groups(ours) if "rank" in dir(new) else [{k: v for k, v in g.items() if k != "rank"} for g in groups(ours)]
    its = (
        groups(theirs) if "rank" in dir(new) else [{k: v for k, v in g.items() if k != "rank"} for g in groups(theirs)]
    )
    if isinstance(new, Muon):
        for one, other in zip(mine[:2], its[:2], strict=True):
            one["rule"], other["momentum"] = "muon", 0.95
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4}
    a = steps(new.optimizer(mine, **settings), ours, parts=parts)
    b = steps(old(its, **settings, **given), theirs, parts=parts)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


DTYPES = [torch.float64, torch.float32]
GALORE = [
    (projection, basis, stagger, in_backward)
    for projection, basis, stagger, in_backward in itertools.product(
        ["std", "reverse_std", "left", "right", "full"], ["singular", "svd", "randomised"], [False, True], [False, True]
    )
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", OLD)
def test_galore(rule: Any, dtype: torch.dtype) -> None:
    if rule == "adamw-8bit" and dtype == torch.float64:
        pytest.skip("bitsandbytes has no float64")
    for projection, basis, stagger, in_backward in GALORE:
        options: dict[str, Any] = {"projection": projection, "basis": basis, "stagger": stagger, "update_gap": 3}
        options["in_backward"] = in_backward
        old = galore.GaLoreAdamW if rule == "adamw" else lambda g, **s: subspace.Subspace(g, OLD[rule], **s)
        same(GaLore(**options, rule=rule), old, dtype, parts=2, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projection", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("residual", ["paper", "repo"])
@pytest.mark.parametrize("scaling", ["column", "matrix"])
def test_fira(projection: Any, residual: Any, scaling: Any, dtype: torch.dtype) -> None:
    options = {"projection": projection, "residual": residual, "scaling": scaling, "update_gap": 3, "stagger": True}
    same(Fira(**options), fira.FiraAdamW, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("error_feedback", ["none", "full", "8bit"])
@pytest.mark.parametrize("transform", ["matmul", "fft"])
def test_dct(error_feedback: Any, transform: Any, dtype: torch.dtype) -> None:
    for gap, rotate, norm in ((1, True, 1.0), (3, True, 2.0), (2, False, 1.0)):
        options: dict[str, Any] = {"update_gap": gap, "rotate": rotate, "ell_norm": norm, "transform": transform}
        options["error_feedback"] = error_feedback
        same(DCTAdamW(**options), dct_adamw.DCTAdamW, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["dion", "kj", "kimi", "none"])
def test_trion(scale: Any, dtype: torch.dtype) -> None:
    for options in ({}, {"transform": "fft"}, {"momentum": 1.0}, {"orthonormalise_in": "bfloat16", "adamw_lr": 0.1}):
        same(Trion(scale=scale, **options), trion.Trion, dtype, scale=scale, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_rank(dtype: torch.dtype) -> None:
    same(Muon(), muon_adamw.MuonAdamW, dtype)
    same(Adafactor(), adafactor, dtype)
    if dtype == torch.float32:
        same(AdamW8bit(), adamw_8bit, dtype)


@pytest.mark.parametrize(
    "which",
    ["galore", "galore-muon", "galore-adafactor", "galore-adamw-8bit", "fira", "dct-adamw", "trion", "muon", "adafactor", "adamw-8bit"],
)  # fmt: skip
def test_states_of_the_old_ones_are_loaded(which: str) -> None:
    dtype = torch.float32 if "8bit" in which else torch.float64
    ours, theirs = parameters(dtype), parameters(dtype)
    rule = which.partition("-")[2] if which.startswith("galore") else ""
    gap = {"update_gap": 3}
    new, old, options = {
        "galore": (GaLore, galore.GaLoreAdamW, gap),
        "fira": (Fira, fira.FiraAdamW, gap),
        "dct-adamw": (DCTAdamW, dct_adamw.DCTAdamW, {"error_feedback": "8bit", **gap}),
        "trion": (Trion, trion.Trion, {}),
        "muon": (Muon, muon_adamw.MuonAdamW, {}),
        "adafactor": (Adafactor, adafactor, {}),
        "adamw-8bit": (AdamW8bit, adamw_8bit, {}),
    }.get(which, (GaLore, lambda g, **s: subspace.Subspace(g, OLD[rule], **s), gap))
    mine, its = groups(ours), groups(theirs)
    if "rank" not in dir(new):
        mine, its = ([{k: v for k, v in g.items() if k != "rank"} for g in part] for part in (mine, its))
    if which == "muon":
        for one, other in zip(mine[:2], its[:2], strict=True):
            one["rule"], other["momentum"] = "muon", 0.95
    settings: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4}
    a = new(**options, **({"rule": rule} if rule else {})).optimizer(mine, **settings)
    b = old(its, **settings, **options)
    steps(b, theirs, 4)
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    file = io.BytesIO()
    torch.save(b.state_dict(), file)
    file.seek(0)
    a.load_state_dict(torch.load(file, weights_only=True))
    for one, other in zip(steps(a, ours, 4), steps(b, theirs, 4), strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
