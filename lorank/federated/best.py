"""FlexLoRA: the best factors of rank r for the mean of the updates, where averaging takes the means of the factors.

    B A = the nearest matrix of rank r to Σ p_i B_i A_i [m, n], by its SVD      p_i = w_i / Σ w

The stack of all factors has that mean exactly, and its SVD is that of a matrix Σ r_i x Σ r_i, so [m, n] is not formed. Ranks may
differ: a client of rank r_i gets the first r_i, which are the best of that rank.

Sends for a layer, in a round: r_i (m + n) numbers down, and as many up.

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", NeurIPS 2024,
arXiv 2402.11505.
"""

from collections.abc import Sequence

from lorank.factors import orthogonalise, stack
from lorank.federated.rule import Factors, Reduced, Rule, shares, shortened


def best(before: Factors, after: Sequence[Factors], weights: Sequence[float]) -> Reduced:
    """The pair of rank r that is nearest to the mean of the products, with orthonormal rows in A, so that no rank is lost where it is 0."""
    p = shares(weights)
    rank = max(A.shape[0] for _, A in before.values())
    exact = {name: stack([one[name] for one in after], p) for name in before}
    return Reduced(shortened({name: orthogonalise(pair) for name, pair in exact.items()}, rank))


BEST = Rule(name="best", reduce=best, any_ranks=True)
