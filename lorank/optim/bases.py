"""Bases of subspaces: r orthonormal directions of the left side that hold most of a gradient G [m, n].

    singular       P = the r leading eigenvectors of G Gᵀ, which are the left singular vectors of G
    randomised     P ← orthonormalised G Gᵀ P, twice, from random directions

The eigenvectors are taken of the smaller Gram matrix in float64, where squaring costs no accuracy that single precision
had: on a gradient of 768 x 2048 the projector of rank 256 is off by 4e-8, that of a single-precision SVD by 1e-5 to 3e-5, in
more time. `benchmarks/optimizers.py` prints both, and what the randomised basis holds. A singular vector is one up to its
sign, which matters here: moments outlive their basis. So its largest entry is made positive, on every machine alike.

Source of the second: Halko, Martinsson and Tropp, "Finding structure with randomness", arXiv 0909.4061.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Basis = Callable[[Tensor, int], Tensor]
"""From gradients G [k, m, n] in fp32 or fp64 and a rank r <= min(m, n): P [k, m, r] with orthonormal columns."""
Projection = Literal["std", "reverse_std", "left", "right", "full"]
"""Which side is projected: "std" the longer one, so that moments are r wide on the shorter (m >= n from the right);
"reverse_std" the other; "left", "right"; or "full" for both."""


def sides(projection: Projection, m: int, n: int) -> tuple[bool, bool]:
    """Whether a gradient [m, n] is projected from the left, from the right, or both."""
    if projection == "full":
        return True, True
    right = {"std": m >= n, "reverse_std": m < n, "left": False, "right": True}[projection]
    return not right, right


def inside_shape(projection: Projection, m: int, n: int, rank: int) -> tuple[int, int]:
    """Of R, for a gradient [m, n]."""
    left, right = sides(projection, m, n)
    return rank if left else m, rank if right else n


def basis_shapes(projection: Projection, m: int, n: int, rank: int) -> dict[str, tuple[int, int]]:
    """Of the bases that are kept, by their names in a state."""
    left, right = sides(projection, m, n)
    return {**({"left": (m, rank)} if left else {}), **({"right": (rank, n)} if right else {})}


def singular_basis(G: Tensor, rank: int) -> Tensor:
    """The r leading left singular vectors; where LAPACK does not converge, `randomised_basis`."""
    wide = G.shape[-2] <= G.shape[-1]
    X = G.double()
    try:
        vectors = torch.linalg.eigh(X @ X.mT if wide else X.mT @ X).eigenvectors
    except torch.linalg.LinAlgError:
        return randomised_basis(G, rank)
    leading = vectors[..., -rank:].flip(-1)
    return oriented((leading if wide else torch.linalg.qr(X @ leading).Q).to(G.dtype))


def oriented(P: Tensor) -> Tensor:
    """The same columns [..., m, r], each with the sign that makes its largest entry positive."""
    largest = P.gather(-2, P.abs().argmax(dim=-2, keepdim=True))
    return P * largest.sign()


def svd_basis(G: Tensor, rank: int) -> Tensor:
    """The same by an SVD in the gradient's precision, as the authors of GaLore do: slower and less exact. The same way out."""
    try:
        return oriented(torch.linalg.svd(G, full_matrices=False).U[..., :rank])
    except torch.linalg.LinAlgError:
        return randomised_basis(G, rank)


def randomised_basis(G: Tensor, rank: int, iterations: int = 2, seed: int = 0) -> Tensor:
    """Nearly the same in a fraction of the time: of the exact one's energy 99.99 % where singular values fall like 1/i, and 94 %
    where they hardly fall (a Gaussian 768 x 2048 at rank 256), though in other directions: the projector is off by half."""
    generator = torch.Generator(G.device).manual_seed(seed)
    start = torch.randn(
        G.shape[-1], rank, generator=generator, device=G.device, dtype=G.dtype
    )  # whatever it is stacked with
    P = G @ start
    for _ in range(iterations):
        P = G @ torch.linalg.qr(G.mT @ torch.linalg.qr(P).Q).Q
    return oriented(torch.linalg.qr(P).Q)


BASES: dict[str, Basis] = {"singular": singular_basis, "svd": svd_basis, "randomised": randomised_basis}


def basis_flops(basis: str, m: int, n: int, rank: int) -> int:
    """FLOPs of the matrix products that find a basis [m, r] of a gradient [m, n]; those of eigh, SVD and QR are left out, as no
    formula gives what those of a library need.

    singular: the Gram matrix of the shorter side, and from the right singular vectors to the left ones where m > n.

    >>> basis_flops("singular", 10, 20, 3), basis_flops("singular", 20, 10, 3), basis_flops("svd", 10, 20, 3)
    (4000, 5200, 0)
    """
    apply = 2 * m * n * rank
    return {
        "singular": 2 * m * n * min(m, n) + (apply if m > n else 0),
        "svd": 0,
        "randomised": 5 * apply,
    }[basis]


def basis_bytes(p: Tensor, basis: int, gap: int) -> float:
    """What processes that share p gather in an average step for its basis of that many numbers, found anew every `gap` steps: the basis on
    the way into the subspace and out of it, and each time it is found G and the sum of what each process has found."""
    itemsize = p.element_size()
    return 2 * basis * itemsize + (p.numel() * itemsize + 2 * basis * max(itemsize, 4)) / gap
