"""Stochastic rounding of bfloat16 weights: up or down by chance, so that what is stored has the exact weight as its mean.

    W ← ⌊V⌋ + u  with probability (V - ⌊V⌋) / u,  else ⌊V⌋

    V the new weight in fp32     ⌊V⌋ the bfloat16 next to it towards 0     u the distance to the one after it

bfloat16 has 8 significant bits. Rounded to the nearest, a step of less than 0.2 % of a weight, and weight decay at usual learning
rates, change nothing, however often they are repeated.

Source: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv 1502.02551.
"""

import torch
from torch import Tensor


def rounded(V: Tensor, seed: int) -> Tensor:
    """V, fp32, in bfloat16. The same in every process and machine of a kind for one seed.

    >>> W = rounded(torch.full((10_000,), 1 + 2**-10), seed=0)  # an eighth of the way from 1 to 1 + 2**-7
    >>> sorted(set(W.tolist())), abs(W.float().mean().item() - (1 + 2**-10)) < 1e-4
    ([1.0, 1.0078125], True)
    """
    generator = torch.Generator(V.device).manual_seed(seed)
    bits = V.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, V.shape, generator=generator, device=V.device, dtype=torch.int32)
    up = ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
    return torch.where(up.isfinite(), up, V.to(torch.bfloat16))  # what is not finite, or would not be, as usual
