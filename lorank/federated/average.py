"""Federated averaging of both factors, as most LoRA systems do it (FedIT), and what it gets wrong.

    B̄ = Σ p_i B_i    Ā = Σ p_i A_i      B_i [m, r]   A_i [r, n]   p_i = w_i / Σ w

The product of the means is not the mean of the products. It lacks their covariance, which is zero only if all A_i or all B_i agree:

    Σ p_i B_i A_i − B̄ Ā = Σ p_i (B_i − B̄)(A_i − Ā)

Sends for a layer, in a round: r (m + n) numbers down, and as many up.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, arXiv 1602.05629;
on LoRA, Zhang et al., "Towards Building the Federated GPT", ICASSP 2024, arXiv 2305.05644.
"""

from collections.abc import Sequence

from lorank.factors import Pair, mean, merge, stack
from lorank.federated.rule import Factors, Reduced, Rule, shares


def average(before: Factors, after: Sequence[Factors], weights: Sequence[float]) -> Reduced:
    """The mean of the B_i and the mean of the A_i."""
    return Reduced({name: mean([one[name] for one in after], weights) for name in before})


def lost(pairs: Sequence[Pair], weights: Sequence[float]) -> float:
    """|Σ p_i B_i A_i − B̄ Ā| / |Σ p_i B_i A_i|: which part of the clients' mean update the mean of the factors is not."""
    B, A = stack(pairs, shares(weights))
    exact = B @ A
    wrong = merge(exact, mean(pairs, weights), scale=-1.0)
    return float(wrong.norm() / exact.norm()) if exact.any() else 0.0


AVERAGE = Rule(name="average", reduce=average)
