"""FedSVD: FFA-LoRA, but after each round the server finds a better A, with orthonormal rows, in the mean itself.

    B̄ = Σ p_i B_i    B̄ A = U Σ Vᵀ    A ← Vᵀ [r, n]    B ← U Σ [m, r]      the product is the same, and A Aᵀ = I

|A|₂ = 1 bounds the gradient of B by that of the layer's output, |∂ℓ/∂B| ≤ |∂ℓ/∂y| |x|, which suits clipping. It reads what the
clients have sent already and costs no privacy. B is then written in another basis, so that what an optimizer remembers of it must be
dropped; here every round begins with a new optimizer.

Sends for a layer, in a round: r (m + n) numbers down, and m r up.

Source: Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", 2025, arXiv 2505.12805.

Departure from the authors' code: the SVD is that of an r x r matrix, after a QR of either factor (`lorank.factors.svd`), and never forms
the product [m, n].
"""

from collections.abc import Sequence

from lorank.factors import orthogonalise
from lorank.federated.ffa import ffa
from lorank.federated.rule import Factors, Reduced, Rule


def fedsvd(before: Factors, after: Sequence[Factors], weights: Sequence[float]) -> Reduced:
    """The mean of the products, with orthonormal rows in A."""
    averaged = ffa(before, after, weights).factors or {}
    return Reduced({name: orthogonalise(pair) for name, pair in averaged.items()})


FEDSVD = Rule(name="fedsvd", reduce=fedsvd, trains="B")
