"""FFA-LoRA: A is frozen and the same everywhere, so that the mean of the B_i is the mean of the updates.

    Σ p_i B_i A = (Σ p_i B_i) A      A [r, n] random, from the seed   B_i [m, r] trained, zero at first   p_i = w_i / Σ w

Noise σ on every entry of B alone moves the product by σ² m |A|² in expectation. On both factors it would be
σ² (m |A|² + n |B|²) + σ⁴ m n r.

Sends for a layer, in a round: m r numbers down, and as many up.

Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.
"""

from collections.abc import Sequence

from lorank.factors import mean
from lorank.federated.rule import Factors, Reduced, Rule


def ffa(before: Factors, after: Sequence[Factors], weights: Sequence[float]) -> Reduced:
    """The mean of the B_i, and A as it was."""
    return Reduced(
        {name: (mean([(one[name][0], A) for one in after], weights)[0], A) for name, (_, A) in before.items()}
    )


FFA = Rule(name="ffa", reduce=ffa, trains="B", sends="B")
