"""The algebra of factor pairs: exact identities in double precision, against dense products."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorank.factors import Pair, balance, grow, mean, merge, nearest, orthogonalise, prune, stack, svd, truncate

EXACT = {"rtol": 0, "atol": 1e-12}


def draw(m: int, r: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    return B.to(dtype), torch.randn(r, n, generator=generator, dtype=torch.float64).to(dtype)


def product(pair: Pair) -> Tensor:
    return pair[0] @ pair[1]


@pytest.mark.parametrize("shape", [(9, 3, 7), (4, 6, 12), (12, 6, 4)])  # the others have more ranks than a product can
def test_rewritten_pairs_have_the_same_product(shape: tuple[int, int, int]) -> None:
    pair, k = draw(*shape), min(shape)
    for written in (orthogonalise(pair), balance(pair), truncate(pair, k)):
        torch.testing.assert_close(product(written), product(pair), **EXACT)
    S = svd(pair)[1]
    torch.testing.assert_close(S, torch.linalg.svdvals(product(pair))[:k], **EXACT)
    B, A = orthogonalise(pair)
    torch.testing.assert_close(A @ A.T, torch.eye(k, dtype=A.dtype), **EXACT)
    torch.testing.assert_close(B.T @ B, torch.diag(S.square()), rtol=1e-12, atol=1e-11)
    B, A = balance(pair)
    torch.testing.assert_close(B.T @ B, torch.diag(S), **EXACT)
    torch.testing.assert_close(A @ A.T, torch.diag(S), **EXACT)
    assert B.square().sum() + A.square().sum() <= sum(factor.square().sum() for factor in pair)


def test_a_zero_product_has_an_orthonormal_a() -> None:
    B, A = orthogonalise((torch.zeros(9, 3), draw(9, 3, 7, dtype=torch.float32)[1]))
    torch.testing.assert_close(A @ A.T, torch.eye(3))
    assert not B.any()
    _, A = orthogonalise((torch.zeros(9, 3), torch.zeros(3, 7)))
    torch.testing.assert_close(A @ A.T, torch.eye(3))


def test_truncation_reaches_the_tail_of_the_values() -> None:
    pair = draw(9, 5, 7)
    sigma = torch.linalg.svdvals(product(pair))
    for rank in (1, 3, 5):
        short = truncate(pair, rank)
        assert short[1].shape == (rank, 7)
        error = torch.linalg.norm(product(pair) - product(short))
        torch.testing.assert_close(error, sigma[rank:].square().sum().sqrt(), **EXACT)
    assert truncate(pair, 8)[1].shape == (5, 7)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        truncate(pair, 0)


def test_ranks_are_pruned_and_grown() -> None:
    pair = draw(9, 4, 7)
    wanted = sum(torch.outer(pair[0][:, i], pair[1][i]) for i in (0, 2))
    for keep in (torch.tensor([0, 2]), torch.tensor([True, False, True, False])):
        torch.testing.assert_close(product(prune(pair, keep)), wanted, **EXACT)
    B, A = grow(pair, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(B[:, :4], pair[0]) and torch.equal(A[:4], pair[1]) and not B[:, 4:].any()
    assert 0.2 < A[4:].abs().max() <= 7**-0.5
    assert torch.equal(A, grow(pair, 3, generator=torch.Generator().manual_seed(1))[1])
    with pytest.raises(ValueError, match="keep must have one bool for each of the 4 ranks"):
        prune(pair, torch.tensor([True]))


def test_stacked_pairs_sum_their_products() -> None:
    pairs, weights = [draw(9, r, 7, seed) for seed, r in enumerate((2, 4, 1))], (0.5, 0.3, 0.2)
    wanted = sum(w * product(pair) for w, pair in zip(weights, pairs, strict=True))
    B, A = stack(pairs, weights)
    assert A.shape == (7, 7)
    torch.testing.assert_close(B @ A, wanted, **EXACT)
    torch.testing.assert_close(product(stack(pairs)), sum(map(product, pairs)), **EXACT)
    torch.testing.assert_close(
        merge(torch.ones(9, 7, dtype=A.dtype), (B, A), scale=2.0), 1 + 2 * wanted, rtol=0, atol=1e-12
    )


def test_the_mean_of_factors_lacks_their_covariance() -> None:
    pairs, counts = [draw(9, 3, 7, seed) for seed in range(3)], (5, 3, 2)
    p = [count / 10 for count in counts]
    B, A = mean(pairs, counts)
    covariance = sum(w * (b - B) @ (a - A) for w, (b, a) in zip(p, pairs, strict=True))
    torch.testing.assert_close(B @ A + covariance, product(stack(pairs, p)), **EXACT)
    shared = [(b, pairs[0][1]) for b, _ in pairs]  # FFA: one A for all
    torch.testing.assert_close(product(mean(shared, counts)), product(stack(shared, p)), **EXACT)


def test_only_merging_forms_the_product() -> None:
    """Nothing else makes a tensor as large as what its pairs are."""
    pairs = [draw(90, 3, 70, seed) for seed in range(2)]

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            made = [one.numel() for one in tree_leaves(found) if isinstance(one, Tensor)]
            self.numbers = max(self.numbers, *made, 0)
            return found

    with Largest() as seen:
        for function in (svd, orthogonalise, balance):
            function(pairs[0])
        truncate(pairs[0], 2)
        prune(grow(pairs[0], 1), torch.tensor([0]))
        truncate(stack(pairs), 4)
        mean(pairs)
        assert seen.numbers <= 2 * 3 * 90
        merge(torch.zeros(90, 70), pairs[0])
        assert seen.numbers == 90 * 70


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a pair must be B \[m, r\] and A \[r, n\], got \[9, 2\] and \[3, 7\]"):
        balance((torch.zeros(9, 2), torch.zeros(3, 7)))
    with pytest.raises(ValueError, match=r"products of one shape, got \[\[9, 7\], \[8, 7\]\]"):
        stack([draw(9, 2, 7), draw(8, 2, 7)])
    with pytest.raises(ValueError, match="one weight for each pair"):
        stack([draw(9, 2, 7)], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"equal ranks for a mean of the factors, got \[2, 3\]; use stack"):
        mean([draw(9, 2, 7), draw(9, 3, 7)])
    with pytest.raises(ValueError, match="at least 0 and have a positive sum"):
        mean([draw(9, 2, 7)], [0.0])


def test_half_precision_rounds_once_and_experts_are_a_batch() -> None:
    pair = draw(9, 3, 7, dtype=torch.bfloat16)
    B, A = balance(pair)
    assert B.dtype == A.dtype == torch.bfloat16
    torch.testing.assert_close(
        product(balance((pair[0].double(), pair[1].double()))), (B.double() @ A.double()), rtol=0, atol=0.1
    )
    many = tuple(torch.stack(each) for each in zip(*(draw(9, 3, 7, seed) for seed in range(4)), strict=True))
    for function in (orthogonalise, balance, lambda pair: truncate(pair, 2)):
        B, A = function(many)
        one = function((many[0][2], many[1][2]))
        torch.testing.assert_close(B[2] @ A[2], product(one), **EXACT)


def test_the_nearest_pair_reaches_the_whitened_tail() -> None:
    """EoRA: the error on data is the tail of the whitened values, below plain SVD's, whose error in the weights is less."""
    W, X = draw(8, 8, 6)[0] @ draw(8, 8, 6)[1], draw(40, 6, 6, 3)[0] * torch.tensor([9.0, 3, 1, 1, 0.5, 0.1])
    gram = X.T @ X
    eigenvalues, Q = torch.linalg.eigh(gram)
    other = Q * eigenvalues.sqrt()  # another root of the Gram matrix, EoRA's own
    sigma = torch.linalg.svdvals(W @ other)
    for rank in (1, 3, 5):
        white = product(nearest(W, rank, torch.linalg.cholesky(gram)))
        plain = product(nearest(W, rank))
        on_data = [torch.linalg.norm((W - found) @ X.T) for found in (white, plain)]
        torch.testing.assert_close(on_data[0], sigma[rank:].square().sum().sqrt(), rtol=1e-10, atol=0)
        assert on_data[0] < on_data[1]
        assert torch.linalg.norm(W - white) > torch.linalg.norm(W - plain)
        U, S, Vh = torch.linalg.svd(W @ other)
        theirs = U[:, :rank] * S[:rank] @ Vh[:rank] @ torch.linalg.inv(other)
        torch.testing.assert_close(white, theirs, rtol=0, atol=1e-10)
        scaled = product(nearest(W, rank, torch.linalg.cholesky(1e4 * gram)))
        torch.testing.assert_close(white, scaled, rtol=0, atol=1e-10)
    torch.testing.assert_close(product(nearest(W, 6, torch.linalg.cholesky(gram))), W, rtol=0, atol=1e-10)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[object]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_factors_give_the_same(mesh: object) -> None:
    pairs = [draw(8, 3, 6, seed) for seed in range(2)]
    sharded = [tuple(distribute_tensor(factor, mesh, [Shard(0)]) for factor in pair) for pair in pairs]
    functions = [
        lambda pairs: stack(pairs, (0.5, 0.5)),
        lambda pairs: mean(pairs, (1, 3)),
        lambda pairs: truncate(pairs[0], 2),
        lambda pairs: orthogonalise(pairs[1]),
        lambda pairs: balance(pairs[1]),
        lambda pairs: prune(pairs[0], torch.tensor([True, False, True])),
        lambda pairs: prune(grow(pairs[0], 2, generator=torch.Generator().manual_seed(3)), torch.tensor([4, 1])),
    ]
    for function in functions:
        found = function(sharded)
        torch.testing.assert_close(found[0].full_tensor() @ found[1].full_tensor(), product(function(pairs)), **EXACT)
    grown = [grow(one[0], 2, generator=torch.Generator().manual_seed(3))[1] for one in (sharded, pairs)]
    assert torch.equal(grown[0].full_tensor(), grown[1])
    W = draw(8, 6, 6, 5)[0]
    found = merge(distribute_tensor(W, mesh, [Shard(1)]), sharded[0], 0.5)
    torch.testing.assert_close(found.full_tensor(), merge(W, pairs[0], 0.5), **EXACT)
