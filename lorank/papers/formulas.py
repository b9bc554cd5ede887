"""Closed forms of costs, as papers give them for one Llama block with its seven projections on a sequence of n tokens.

d = hidden size, d_ff = intermediate size, r = rank, n = tokens of a sequence. A multiply-add counts as two
floating-point operations (FLOPs). Costs that belong to one method are in that method's file.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from lorank.sizes import SIZES

VOCABULARY = 32_000
"""Rows of the embeddings in all C4 tables of these papers."""

Row = Literal["dense", "cola", "relora", "sltrain", "galore"]
"""A row of the CoLA paper's table of compute."""


class Shape(NamedTuple):
    """What the closed forms of a Llama need."""

    vocab_size: int
    d: int
    d_ff: int
    layers: int

    @property
    def projections(self) -> list[tuple[int, int]]:
        """[d_out, d_in] of the seven in a block."""
        return [(self.d, self.d)] * 4 + [(self.d_ff, self.d)] * 2 + [(self.d, self.d_ff)]

    def over_projections(self, count: Callable[[int, int], int]) -> int:
        """A count per matrix [d_out, d_in], summed over all blocks."""
        return self.layers * sum(count(m, n) for m, n in self.projections)


def shape_of(size: str) -> Shape:
    found = SIZES[size]
    return Shape(VOCABULARY, found.hidden_size, found.intermediate_size, found.layers)


# ---- parameters


def dense_parameters(vocab_size: int, d: int, d_ff: int, layers: int) -> int:
    """Parameters of an untied Llama: 2 V d + L (4 d² + 3 d d_ff + 2 d) + d.

    >>> dense_parameters(32_000, 512, 1376, 8)
    58073600
    """
    return 2 * vocab_size * d + layers * (4 * d * d + 3 * d * d_ff + 2 * d) + d


def cola_parameters(vocab_size: int, d: int, d_ff: int, layers: int, r: int) -> int:
    """The same with CoLA in all seven projections: 2 V d + L (8 d r + 3 r (d + d_ff) + 2 d) + d.

    >>> cola_parameters(32_000, 512, 1376, 8, 128)
    42770944
    """
    return 2 * vocab_size * d + layers * (8 * d * r + 3 * r * (d + d_ff) + 2 * d) + d


def crnet_parameters(vocab_size: int, d: int, d_ff: int, layers: int, r: int) -> int:
    """With CR-Net: 2 V d + L 2 d + d + (4 d² + 3 d d_ff) + (L - 1) (11 d r + 3 d_ff r + 7) (arXiv 2509.18993).

    >>> crnet_parameters(32_000, 2048, 5461, 24, 448)
    582441057
    """
    first, later = 4 * d * d + 3 * d * d_ff, 11 * d * r + 3 * d_ff * r + 7
    return 2 * vocab_size * d + layers * 2 * d + d + first + (layers - 1) * later


# ---- FLOPs


def block_forward_flops(row: Row, d: int, d_ff: int, r: int, n: int) -> int:
    """Forward FLOPs of one block on one sequence (arXiv 2502.10940, table of compute; re-derived)."""
    dense = 8 * n * d * d + 6 * n * d * d_ff
    attention = 4 * n * n * d
    factors = 16 * n * d * r + 6 * n * r * (d + d_ff)
    rebuilt = 8 * d * d * r + 6 * d * d_ff * r  # SLTrain forms W = B A once per call
    return attention + {
        "dense": dense,
        "cola": factors,
        "relora": dense + factors,
        "sltrain": dense + rebuilt,
        "galore": dense,
    }[row]  # fmt: skip


def block_training_flops(row: Row, d: int, d_ff: int, r: int, n: int) -> int:
    """Forward and backward FLOPs of one block on one sequence (arXiv 2502.10940, table of compute; re-derived).

    Backward is twice forward, but ReLoRA's frozen weights need no gradient, and GaLore adds the projection of
    gradients, down and up. What SLTrain and GaLore add does not depend on n: it is paid per call and per optimizer
    step.

    >>> block_training_flops("dense", 512, 1376, 128, 256), block_training_flops("cola", 512, 1376, 128, 256)
    (5259657216, 2321547264)
    """
    forward = block_forward_flops(row, d, d_ff, r, n)
    if row == "relora":
        return 3 * forward - (8 * n * d * d + 6 * n * d * d_ff)
    return 3 * forward + (16 * d * d * r + 12 * d * d_ff * r if row == "galore" else 0)


def break_even_ratio(d: int, d_ff: int) -> float:
    """r / d below which CoLA costs less than dense: (24 d² + 18 d d_ff) / (48 d + 18 (d + d_ff)) / d.

    >>> round(break_even_ratio(512, 1376), 4), round(break_even_ratio(2048, 5461), 4)
    (0.6328, 0.6316)
    """
    return (24 * d * d + 18 * d * d_ff) / (48 * d + 18 * (d + d_ff)) / d


def recompute_flops(scheme: Literal["blocks", "cola-m", "cola-m authors"], d: int, r: int, n: int) -> float:
    """FLOPs that backward spends on one block's forward pass again, at d_ff = 2.5 d (arXiv 2502.10940, section 4).

    "blocks" is vanilla checkpointing of a dense block, 23 n d² + 4 n² d. The paper gives 18.5 n d r + 4 n² d for
    CoLA-M, half of a CoLA block's factors. The authors' code runs A again as well: 37 n d r + 4 n² d. For our own
    count see `bottleneck_recompute_flops`.

    >>> round(recompute_flops("blocks", 2048, 512, 256) / recompute_flops("cola-m", 2048, 512, 256), 3)
    4.585
    """
    products = {"blocks": 23 * n * d * d, "cola-m": 18.5 * n * d * r, "cola-m authors": 37 * n * d * r}
    return products[scheme] + 4 * n * n * d


def bottleneck_recompute_flops(d: int, d_ff: int, r: int, n: int) -> int:
    """What `lorank.keep_bottlenecks` runs again per block, at any d_ff: 2 n r (4 d + 2 d_ff) + 4 n² d.

    These are the B factors of q, k, v, o (d wide) and gate, up (d_ff wide), and attention. Down's B is not run again:
    the backward pass needs its input, not its output. At d_ff = 2.5 d that is 18 n d r + 4 n² d, a little below the
    paper's 18.5.
    """
    return 2 * n * r * (4 * d + 2 * d_ff) + 4 * n * n * d


# ---- memory


def training_state_bytes(parameters: int, *, weights: int = 2, gradients: int = 2, moments: int = 4) -> int:
    """Bytes of weights, gradients and Adam's two moments; 8 per parameter in pure bf16, as in the paper's memory
    column."""
    return parameters * (weights + gradients + moments)


# ---- from counts to coefficients


def coefficients(count: Callable[..., float], terms: Sequence[Callable[..., float]], points: Sequence) -> list[float]:
    """The coefficients with which the sum of `terms` equals `count`; both are called with each of `points`.

    >>> coefficients(lambda x: 3 * x + 2, [lambda x: x, lambda x: 1], [(1,), (2,), (5,)])
    [3.0, 2.0]
    """
    rows = torch.tensor([[float(term(*point)) for term in terms] for point in points], dtype=torch.float64)
    values = torch.tensor([float(count(*point)) for point in points], dtype=torch.float64)
    scale = rows.norm(dim=0)
    found = torch.linalg.lstsq(rows / scale, values[:, None], driver="gelsd").solution[:, 0] / scale
    return [round(float(x), 4) + 0.0 for x in found]
