"""Codebooks: ordinary vector quantisation and pure low rank in their limits, sizes, and models that come out."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorank
from lorank.fit import VectorQuantised, fit
from lorank.fit.structure import Metric, as_matrix
from lorank.fit.vector_quantised import sub_vectors


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_without_a_map_it_is_vector_quantisation() -> None:
    """Each sub-vector has the nearest codeword, and each codeword is the mean of its sub-vectors."""
    W, structure = drawn(30, 22), VectorQuantised(size=4, dimensions=4, steps=0, sweeps=200)
    found = structure.solve(W, Metric(), 12)
    words, points, codes = found["C"] @ found["M"], sub_vectors(W, 4), found["codes"].flatten().long()
    torch.testing.assert_close(found["M"] @ found["M"].T, torch.eye(4, dtype=W.dtype))
    assert torch.equal(torch.cdist(points, words).argmin(1), codes)
    for k in range(12):
        torch.testing.assert_close(words[k], points[codes == k].mean(0))
    torch.testing.assert_close(as_matrix(structure, found, 22), words[codes].view(30, 24)[:, :22])


def test_enough_codewords_leave_the_error_of_the_subspace() -> None:
    kinds = drawn(9, 6)
    W = kinds[torch.arange(40) % 9].view(10, 24)
    sigma = torch.linalg.svdvals(sub_vectors(W, 6))
    for e in (2, 5):
        structure = VectorQuantised(size=6, dimensions=e, steps=0)
        lack = torch.linalg.norm(W - as_matrix(structure, structure.solve(W, Metric(), 20), 24))
        torch.testing.assert_close(lack, sigma[e:].norm(), rtol=1e-9, atol=1e-12)


def test_training_lowers_the_error_on_the_text() -> None:
    W, R = drawn(24, 32), torch.linalg.cholesky(torch.diag(torch.arange(1.0, 33).double() ** -1) + 0.01)
    lack = lambda steps: torch.linalg.norm(  # noqa: E731
        (W - as_matrix(one := VectorQuantised(steps=steps, size=4), one.solve(W, Metric(R), 16), 32)) @ R
    )
    assert lack(60) < 0.98 * lack(0)


def test_sizes_are_those_of_codes_and_codewords() -> None:
    """32 v / log₂ K before the codebook, and the largest codebook that fits."""
    structure = VectorQuantised(size=8, dimensions=4)
    whole = 4096 * 4096
    assert structure.parameters(256, 4096, 4096) == whole * math.log2(256) / (32 * 8) + (256 + 8) * 4
    for room in (0.02, 0.05, 0.3):
        K = structure.rank_within(room * whole, 4096, 4096)
        assert structure.parameters(K, 4096, 4096) <= room * whole
        assert K == 2**15 or structure.parameters(K + 1, 4096, 4096) > room * whole


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_codebook_is_saved_loaded_merged_and_trained(small: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    data = [torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    dense, seen = small(kind), []
    model = fit(copy.deepcopy(dense), VectorQuantised(steps=5, size=4), data, budget=0.2, see=seen.append)
    assert sum(one.parameters for one in seen) <= 0.2 * sum(one.d_in * one.d_out for one in seen)
    wanted = model(data[0]).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(data[0]).logits, wanted)
    loaded(data[0], labels=data[0]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loaded.parameters())
    torch.testing.assert_close(lorank.merge(loaded)(data[0]).logits, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="dimensions must be at most size=2, got 4"):
        VectorQuantised(size=2)
