"""Starts of low rank with equal norms, and probes where their values are known."""

import pytest
import torch

from lorank.analysis.rich_lazy import alignment, low_rank_start, sign_agreement, tangents, weight_change


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_starts_have_the_norm_of_the_weight() -> None:
    """And with equal Frobenius norm the spectral norm grows: the confound."""
    W = drawn(100, 100)
    for rank in (1, 5, 100):
        one, other = low_rank_start(W, rank), low_rank_start(W, rank, "spectral")
        assert torch.linalg.matrix_rank(one) == rank == torch.linalg.matrix_rank(other)
        torch.testing.assert_close(torch.linalg.norm(one), torch.linalg.norm(W), rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.linalg.matrix_norm(other, 2), torch.linalg.matrix_norm(W, 2))
    assert 2 < torch.linalg.matrix_norm(low_rank_start(W, 5), 2) / torch.linalg.matrix_norm(W, 2) < 3
    torch.testing.assert_close(low_rank_start(W, 100), W)
    with pytest.raises(ValueError, match="rank must be from 1 to 100, got 0"):
        low_rank_start(W, 0)


def test_alignments_are_those_of_the_kernels() -> None:
    H, other = drawn(30, 7), drawn(30, 9, seed=1)
    K, L = H @ H.T, other @ other.T
    expected = torch.trace(K @ L) / torch.linalg.norm(K) / torch.linalg.norm(L)
    assert alignment(H, other) == pytest.approx(expected.item(), rel=1e-12)
    assert 0 < alignment(H, other) < 0.9
    rotation = torch.linalg.qr(drawn(7, 7, seed=2))[0]
    assert alignment(H, 3 * H @ rotation) == pytest.approx(1, abs=1e-12)
    assert alignment(H, torch.zeros(30, 7).index_fill_(1, torch.tensor(0), 1)) >= 0


def test_a_model_linear_in_its_weights_keeps_its_tangents() -> None:
    x, W = drawn(5, 4), drawn(3, 4, seed=1).requires_grad_()
    J = tangents(x @ W.T, W)
    torch.testing.assert_close(J.view(5, 3, 3, 4), torch.einsum("ij,na->nija", torch.eye(3).double(), x))
    moved = (W - 5 * drawn(3, 4, seed=3)).detach().requires_grad_()
    assert alignment(J, tangents(x @ moved.T, moved)) == pytest.approx(1, abs=1e-12)
    assert alignment(J, tangents((x @ moved.T).tanh(), moved)) < 1 - 1e-4
    assert weight_change(W, moved) == pytest.approx(5 * torch.linalg.norm(drawn(3, 4, seed=3)).item())
    assert sign_agreement(torch.tensor([1.0, -1, 0, 2]), torch.tensor([3.0, 1, 0, -2])) == 0.5
