"""FLoRA: the server stacks the clients' factors instead of averaging them, so that nothing is lost.

    B = [B_1 ... B_K] [m, Σ r_i]    A = [p_1 A_1; ...; p_K A_K] [Σ r_i, n]    B A = Σ p_i B_i A_i    exactly

The weights p_i = w_i / Σ w are on one side only; on both they would be squared. Ranks may differ. The stack goes to all clients, who add
its product to their frozen weights, W ← W + B A, and begin the next round with new factors: A random, from the round's seed, and B zero.

Sends for a layer, in a round: Σ r_i (m + n) numbers down, and r_i (m + n) up.

Source: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS 2024,
arXiv 2409.05976.

Departure from the authors' code: a client's scale α/r_i is folded into its B_i, where ranks differ.
"""

from collections.abc import Sequence

from lorank.factors import stack
from lorank.federated.rule import Factors, Reduced, Rule, shares


def flora(before: Factors, after: Sequence[Factors], weights: Sequence[float]) -> Reduced:
    """New factors for all, and the stack of the clients' for the weights."""
    p = shares(weights)
    return Reduced(None, {name: stack([one[name] for one in after], p) for name in before})


FLORA = Rule(name="flora", reduce=flora, sends="", any_ranks=True)
