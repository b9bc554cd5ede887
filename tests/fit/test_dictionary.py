"""CoSpaDi against independent mathematics, and models that come out of it."""

import copy
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lorank
from lorank.factors import nearest
from lorank.fit import SVD, SparseDictionary, fit
from lorank.fit.budget import choose_ranks
from lorank.fit.dictionary import by_ksvd, by_mod, coded, pursue, solved
from lorank.fit.structure import Metric, as_matrix
from lorank.method import Site


def trained_like(m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix and a metric whose spectra fall as powers."""
    draw = lambda *size: torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)  # noqa: E731
    U, _, Vh = torch.linalg.svd(draw(m, n), full_matrices=False)
    W = U * torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -0.7 @ Vh
    X = draw(4 * n, n) * torch.arange(1, n + 1) ** -0.5
    return W, torch.linalg.cholesky(X.T @ X / len(X))


def lack(structure: SparseDictionary, W: Tensor, R: Tensor | None, rank: int) -> Tensor:
    found = structure.solve_together([W], [Metric(R)], [rank])[0]
    rest = W - as_matrix(structure, found, W.shape[1])
    return torch.linalg.norm(rest if R is None else rest @ R)


@pytest.mark.parametrize("update", ["ksvd", "mod"])
@pytest.mark.parametrize(("m", "n"), [(48, 32), (32, 48)])
def test_at_equal_budget_it_beats_the_svd(m: int, n: int, update: Any) -> None:
    """On plain and whitened errors, at half and at six tenths of the parameters."""
    W, whitening = trained_like(m, n)
    for part in (0.5, 0.6):
        structure = SparseDictionary(update=update, sweeps=8)
        k, r = int(part * m * n / (n + m / 2)), int(part * m * n / (m + n))
        assert structure.parameters(k, n, m) <= part * m * n < structure.parameters(k + 2, n, m)
        for R in (None, whitening):
            tail = torch.linalg.svdvals(W if R is None else W @ R)[r:].norm()
            assert lack(structure, W, R, k) < 0.97 * tail


def test_as_many_entries_as_atoms_is_the_svd() -> None:
    W, R = trained_like(12, 10)
    structure = SparseDictionary(ratio=1, sweeps=1)
    B, A = nearest(W, 4, R)
    torch.testing.assert_close(
        as_matrix(structure, structure.solve_together([W], [Metric(R)], [4])[0], 10), B @ A, rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("move", [by_ksvd, by_mod])
def test_no_sweep_raises_the_error(move: Any) -> None:
    T, k, s = trained_like(24, 20, seed=3)[0], 12, 4
    A = torch.linalg.svd(T, full_matrices=False)[2][:k]
    places, values = coded(T, A, s)
    errors = []
    for _ in range(12):
        B = torch.zeros(24, k, dtype=T.dtype).scatter(1, places, values)
        errors.append(torch.linalg.norm(T - B @ A).item())
        A, B = move(T, A, B)
        errors.append(torch.linalg.norm(T - B @ A).item())
        torch.testing.assert_close(A.norm(dim=1), torch.ones(k, dtype=T.dtype))
        places, values = coded(T, A, s, places)
    assert all(new <= old * (1 + 1e-9) for old, new in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_matching_pursuit_is_greedy_and_entries_are_best() -> None:
    """Against a pursuit that is written out, and least squares of torch."""
    generator = torch.Generator().manual_seed(1)
    T = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    A = torch.nn.functional.normalize(torch.randn(10, 8, generator=generator, dtype=torch.float64), dim=1)
    places = pursue(T, A, 3)
    for t, chosen, values in zip(T, places, solved(T, A, places), strict=True):
        have: list[int] = []
        rest = t
        for _ in range(3):
            have.append(int((A @ rest).abs().argmax()))
            best = torch.linalg.lstsq(A[have].T, t[:, None]).solution[:, 0]
            rest = t - best @ A[have]
        assert have == chosen.tolist()
        torch.testing.assert_close(values, best, rtol=0, atol=1e-9)
        least = min(
            torch.linalg.norm(t - torch.linalg.lstsq(A[[*c]].T, t[:, None]).solution[:, 0] @ A[[*c]])
            for c in combinations(range(10), 3)
        )
        assert least <= rest.norm() * (1 + 1e-12)


def test_a_group_shares_its_atoms(small: Callable[..., Any], tmp_path: Path) -> None:
    """The dictionary is that of the stacked matrices, on the sum of their inputs' squares."""
    data = [torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    dense, seen, rows = small("llama").double(), [], {}
    structure, name = SparseDictionary(sweeps=3, groups=1), "mlp.down_proj"
    model = fit(copy.deepcopy(dense), structure, data, budget=0.5, see=seen.append)
    layers = [block.get_submodule(name) for block in model.model.layers]
    assert layers[0].A is layers[1].A is model.base_model.lorank_atoms["model_layers_mlp_down_proj_0"]
    one = next(one for one in seen if name in one.name)
    whole = 2 * one.d_in * one.d_out
    k, s = layers[0].A.out_features, layers[0].values.shape[1]
    assert 0.45 * whole < k * one.d_in + 2 * s * one.d_out <= 0.5 * whole and s == k // 2

    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda m, args: rows.setdefault(m, []).append(args[0]))
        for block in dense.model.layers
    ]
    for batch in data:
        dense(batch)
    for hook in hooks:
        hook.remove()
    inputs = [torch.cat(found).flatten(0, -2) for found in rows.values()]
    R = torch.linalg.cholesky(sum(X.T @ X for X in inputs))
    W = torch.cat([module.weight for module in rows])
    wanted = structure.solve_together([W], [Metric(R)], [k])[0]
    found = torch.cat([layer.merged()[0] for layer in layers])
    error, least = (torch.linalg.norm((W - one) @ R) for one in (found, as_matrix(structure, wanted, W.shape[1])))
    torch.testing.assert_close(error, least, rtol=1e-3, atol=0)
    alone = fit(copy.deepcopy(dense), SparseDictionary(sweeps=3), data, budget=0.5)
    assert "lorank_atoms" not in dict(alone.base_model.named_children())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(data[0]).logits, model(data[0]).logits)
    torch.testing.assert_close(lorank.merge(loaded)(data[0]).logits, model(data[0]).logits)


def test_sizes_are_those_of_the_paper() -> None:
    """A fifth removed of 4096 x 4096 at ratio 2: 2184 atoms and 1092 entries, where plain factors have rank 1638."""
    square = Site("layers.0.w", "layers.*.w", 0, torch.nn.Linear(4096, 4096, bias=False, device="meta"))
    structure = SparseDictionary()
    assert choose_ranks(structure, [square], 0.8, "uniform", dict) == {square.name: 2184}
    assert choose_ranks(SVD(), [square], 0.8, "uniform", dict) == {square.name: 1638}
    assert structure.parameters(2184, 4096, 4096) == 4096 * (2184 + 1092)


def test_odd_matrices_have_dictionaries() -> None:
    """Zero, of low rank, with zero rows, and with more atoms than inputs."""
    W = torch.zeros(40, 6, dtype=torch.float64)
    assert lack(SparseDictionary(sweeps=2), W, None, 4) == 0
    W[::3] = trained_like(14, 6)[0]
    for rank, ratio in ((8, 4.0), (5, 1.0)):
        assert lack(SparseDictionary(ratio=ratio, sweeps=2), W, None, rank) <= W.norm()
    few = torch.outer(torch.arange(8.0), torch.arange(6.0)).double()
    assert lack(SparseDictionary(sweeps=2), few, None, 4) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_fitted_dictionary_is_saved_loaded_and_merged(small: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    data = [torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    dense, seen = small(kind), []
    model = fit(copy.deepcopy(dense), SparseDictionary(sweeps=8), data, budget=0.5, see=seen.append)
    wanted = model(data[0]).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(data[0]).logits, wanted) and loaded.config.lorank["method"] == "sparse-codes"
    torch.testing.assert_close(lorank.merge(loaded)(data[0]).logits, wanted, rtol=0, atol=1e-5)
    assert sum(one.parameters for one in seen) <= 0.5 * sum(one.d_in * one.d_out for one in seen)
    plain: list[Any] = []
    fit(dense, "svd", data, budget=0.5, see=plain.append)
    first = [(new.output_error, old.output_error) for new, old in zip(seen, plain, strict=True) if ".0." in new.name]
    assert all(new < old for new, old in first)  # of the same inputs


def test_energy_needs_singular_values(small: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="policy must be 'uniform' or 'break-even' with dictionary"):
        fit(small("llama"), "dictionary", policy="energy")
