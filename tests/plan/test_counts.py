"""What one recipe takes, against reality: a counter of operations, and the resident memory of real steps."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorank import accounting
from lorank.optim.dct import dct_matrix
from lorank.papers import formulas
from lorank.plan.counts import count, memory, optimizer_bytes, optimizer_step
from lorank.plan.forecast import with_method
from lorank.sizes import SIZES
from lorank.train.methods import optimizer_groups
from lorank.train.model import empty_model
from lorank.train.recipe import Recipe

TINY: dict[str, Any] = {"vocab_size": 300, "sequence_length": 32, "batch_size": 16, "micro_batch_size": 2}


# ---- FLOPs, to the number


def closed_form(method: str, batch: int, n: int = 256) -> int:
    """Training FLOPs of a 20m of two blocks with a vocabulary of 8,000 on [batch, n] tokens."""
    (d, f, _, _, r), layers = SIZES["20m"], 2
    each = {m: formulas.block_training_flops(m, d, f, r, n) for m in ("dense", "cola", "relora")}  # type: ignore[arg-type]
    head = 6 * n * d * 8_000
    atoms = round(layers / 3)
    blocks = {
        "dense": batch * layers * each["dense"],
        "low-rank": batch * layers * each["cola"],
        "cola": batch * layers * each["cola"],
        "relora": batch * layers * each["relora"],
        "switchlora": batch * layers * each["relora"],
        "crnet": batch * (each["dense"] + (layers - 1) * each["cola"]),
        # once per call, whatever the batch: W = B A + S and the gradients through it; W_l = Σ c_s D_s
        "sltrain": layers * (batch * each["dense"] + 24 * d * d * r + 18 * d * f * r + 8 * d * d * r + 6 * d * f * r),
        "masa": layers * (batch * each["dense"] + 3 * 4 * 2 * atoms * d * d),
    }
    return blocks[method] + batch * head


@pytest.mark.parametrize("method", ["dense", "low-rank", "cola", "relora", "switchlora", "crnet", "sltrain", "masa"])
def test_flops_equal_the_closed_forms(method: str) -> None:
    recipe = with_method(Recipe(size="20m", shape={"num_hidden_layers": 2}, rank=64, vocab_size=8_000), method)
    found = accounting.measure_flops(empty_model(recipe), batch=3)
    assert found.total == closed_form(method, batch=3)
    assert found.recompute == 0


# ---- memory, against a process


GALORE = {"method": "galore", "rank": 64, "options": {"in_backward": True}}
SMALL = {
    "size": "20m",
    "vocab_size": 8000,
    "sequence_length": 128,
    "micro_batch_size": 2,
}
PEAKS: list[dict[str, Any]] = [
    {**SMALL, "method": "dense", "batch_size": 2},
    {**SMALL, "method": "cola", "batch_size": 2},
    {**SMALL, "method": "cola-m", "batch_size": 4},
    {**SMALL, "method": "dense", "batch_size": 2, "sequence_length": 16},
    {**SMALL, **GALORE, "batch_size": 4, "sequence_length": 16},
    {"size": "tiny", "vocab_size": 1000, "method": "cola-m", "batch_size": 1, "sequence_length": 2048},
    {
        "size": "tiny",
        "vocab_size": 500,
        "method": "cola",
        "batch_size": 2,
        "sequence_length": 1024,
        "documents": "padded",
    },
]
FEW = {"size": "20m", "vocab_size": 2000, "sequence_length": 64, "batch_size": 2}
STEPS: list[dict[str, Any]] = [
    {**FEW, "method": "dense", "optimizer": "muon"},
    {**FEW, "method": "dense", "optimizer": "adafactor"},
    {**FEW, "method": "galore", "rank": 64},
    {**FEW, "method": "trion", "rank": 64},
    {**FEW, "method": "switchlora", "sequence_length": 16},  # whose AdamW makes all denominators at once
]
"""With few tokens the most is held in the optimizer's step: products, Gram matrices, what is not done in place."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of resident memory are Linux's")
def test_predicted_peaks_are_those_of_real_steps(tmp_path: Path, save_mixture: Callable[..., dict[str, Any]]) -> None:
    """Within 10 %, of resident memory, over two steps with AdamW: the first peak with moments is in the second."""
    script = Path(__file__).with_name("peak_of_a_process.py")
    # every tensor of some size in pages of its own, which go back when it is freed
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    mixtures: list[dict[str, Any]] = [
        {**save_mixture(kind, tmp_path), "precision": precision, "batch_size": 8, "sequence_length": 128}
        for kind, precision in (("mixtral", "fp32"), ("qwen3_moe", "bf16"))
    ]
    cases = PEAKS + STEPS + mixtures
    command = [sys.executable, str(script), json.dumps(cases)]
    real = json.loads(subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout)
    whens = []
    for settings, measured in zip(cases, real, strict=True):
        recipe = Recipe.from_dict(settings)
        found = memory(recipe, empty_model(recipe), recipe.micro_batch_size or recipe.batch_size, devices=1)
        whens.append(found.peak_when)
        assert found.peak_bytes == pytest.approx(measured, rel=0.1), settings
    assert whens[:3] == ["forward"] * 3, "in the head, which makes its gradients there"
    assert whens[3] == "step", "with few tokens the most is held when all gradients are there"
    assert set(whens[len(PEAKS) : -len(mixtures)]) == {"step"}


def test_a_step_is_followed_without_leaving_its_bases_behind() -> None:
    """A cosine basis is kept for the next call; one without data would break it."""
    recipe = Recipe(size="tiny", vocab_size=64, method="trion", rank=8)
    optimizer_step(recipe, empty_model(recipe))
    assert type(dct_matrix(256, torch.device("cpu"), torch.float32)) is torch.Tensor


def test_moments_of_a_byte_are_taken_off_the_step() -> None:
    recipe = Recipe(size="tiny", vocab_size=64)
    model = empty_model(recipe)
    whole, small = (
        optimizer_step(dataclasses.replace(recipe, optimizer=rule), model) for rule in ("adamw", "adamw-8bit")
    )
    saved = optimizer_bytes(recipe, model) - optimizer_bytes(dataclasses.replace(recipe, optimizer="adamw-8bit"), model)
    assert whole.kept_bytes - small.kept_bytes == whole.most_bytes - small.most_bytes == saved > 0


def test_a_gradient_projected_as_it_arrives_is_smaller() -> None:
    """The closed form; that reality agrees, within 10 %, is of use only where the whole gradients are more than that."""
    whole, projected = (
        count(recipe := Recipe(**{**TINY, **GALORE, "options": options}), empty_model(recipe))
        for options in ({}, GALORE["options"])
    )
    d, f, layers, _, _ = SIZES["tiny"]
    saved = 4 * layers * (4 * d * (d - 64) + 3 * f * (d - 64))
    assert whole.memory.gradients_bytes - projected.memory.gradients_bytes == saved
    assert (
        whole.memory.peak_bytes - projected.memory.peak_bytes > 0.9 * saved
    )  # micro-batches: all are there at the peak
    assert saved > 0.15 * whole.memory.peak_bytes
    assert projected.memory.optimizer_bytes == whole.memory.optimizer_bytes


def test_what_the_peak_is_made_of() -> None:
    recipe = Recipe(size="20m", vocab_size=8000, batch_size=4)
    once, again = (
        accounting.memory_estimate(empty_model(recipe), batch=4, sequence_length=256, accumulate=a)
        for a in (False, True)
    )
    state = once.weights_bytes + once.optimizer_bytes
    assert state + max(once.gradients_bytes, once.activations_bytes) <= once.peak_bytes <= 1.3 * once.total_bytes
    assert again.activations_bytes == once.activations_bytes
    # at the beginning of backward, where the peak is, the gradients of earlier micro-batches are there in full
    assert 0.8 * once.gradients_bytes < again.peak_bytes - once.peak_bytes <= once.gradients_bytes


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 4), ("bf16", 4), ("bf16-pure", 2)])
def test_memory_knows_the_dtype(precision: str, bytes_each: int) -> None:
    recipe = Recipe(**TINY, precision=precision)  # type: ignore[arg-type]
    found = count(recipe, empty_model(recipe))
    n = found.parameters.total
    memory = found.memory
    expected = (bytes_each * n, bytes_each * n, 2 * bytes_each * n)
    assert (memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes) == expected


@pytest.mark.parametrize(("method", "counters"), [("galore", 12), ("fira", 12), ("dct-adamw", 8), ("trion", 8)])
def test_state_has_the_bytes_of_its_formula(method: str, counters: int) -> None:
    """Counted on the tensors of a real step without data; beside the formula, each parameter has counters of steps."""
    recipe = Recipe(size="20m", vocab_size=32000, method=method, rank=64, precision="bf16-pure")
    model = empty_model(recipe)
    ranks = {p: group["rank"] for group in optimizer_groups(recipe, model) for p in group["params"] if group["rank"]}
    kept = optimizer_step(recipe, model).kept_bytes
    (d, f, layers, _, _), r, bf16 = SIZES["20m"], 64, 2
    formula = {
        "galore": lambda m, n: (2 * r * max(m, n) + r * min(m, n)) * bf16,
        "fira": lambda m, n: (2 * r * max(m, n) + r * min(m, n)) * bf16 + 4,
        "dct-adamw": lambda m, n: 2 * r * max(m, n) * bf16 + 4 * r,
        "trion": lambda m, n: m * n * bf16,
    }[method]
    projected = layers * (4 * formula(d, d) + 3 * formula(d, f))
    others = 2 * bf16 * (2 * 32000 * d + (2 * layers + 1) * d)  # AdamW's moments of embedding, head and norms
    shared = (
        d * d * 4 if method in ("dct-adamw", "trion") else 0
    )  # the cosines, one matrix for all: every short side is d
    assert len(ranks) == 7 * layers
    assert kept - projected - others - shared == counters * 7 * layers + 4 * (2 + 2 * layers + 1)
