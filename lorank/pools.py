"""Candidates for the vectors of a factor: which of them are in use, which come next, and which vectors are frozen.

weight [r, d_in] (rows are vectors) or [d_out, r] (columns are)     candidates [c, width], c > r
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Pool:
    """One factor and its candidates; `dim` is the dimension of `weight` that counts vectors, 0 in A and 1 in B."""

    def __init__(self, weight: Tensor, dim: int, candidates: Tensor):
        c, r = len(candidates), weight.shape[dim]
        start = dim * (r // 2)  # B's pointer is half a round ahead
        self.weight, self.dim = weight, dim
        self.state = {
            "candidates": candidates,  # [c, width]; a vector in use is written back when it leaves
            "selected": torch.arange(c - r, c).roll(start),  # [r]: the last is just before the pointer, the first next
            "pointer": torch.tensor(start),  # the next vector to leave
            "frozen": torch.zeros(r, dtype=torch.int64),  # updates for which each vector stays frozen
        }
        self.candidates, self.selected, self.pointer, self.frozen = self.state.values()

    @property
    def vectors(self) -> Tensor:
        """[r, width], a view."""
        return self.weight.transpose(0, self.dim)

    def swap(self, rows: Tensor, leaving: Tensor, draw: torch.Generator | None) -> Tensor:
        """Store what leaves `rows` and return its successors: the next in turn or, with `draw`, any not in use."""
        c, k = len(self.candidates), len(rows)
        self.candidates[self.selected[rows]] = leaving.to(self.candidates.device)
        if draw is None:
            chosen = (self.selected[rows[0] - 1] + 1 + torch.arange(k)) % c
        else:
            chosen = torch.multinomial(torch.ones(c).index_fill_(0, self.selected, 0), k, generator=draw)
        self.selected[rows] = chosen
        self.pointer.copy_((rows[-1] + 1) % len(self.selected))
        return self.candidates[chosen].to(leaving.device)

    def hold(self) -> None:
        """Before a step: remove the gradient of frozen vectors, remember their values, and count one update."""
        rows = self.frozen.nonzero()[:, 0].to(self.weight.device)
        self.held = rows, self.vectors[rows]
        if self.weight.grad is not None and len(rows):
            self.weight.grad.transpose(0, self.dim)[rows] = 0
        self.frozen.sub_(1).clamp_(min=0)

    def put_back(self) -> None:
        """After a step: restore frozen vectors, because weight decay moves them without a gradient."""
        rows, values = self.held
        self.vectors[rows] = values


def room(a: Pool, b: Pool) -> int:
    """How many vectors of A and of B may leave at once: neither pointer may reach the vectors that the other has just frozen."""
    r = len(a.selected)
    return min(int((ahead.pointer - (after.frozen > 0).sum() - after.pointer) % r) for ahead, after in ((a, b), (b, a)))


def tensors_of(pools: Mapping[str, Sequence[Pool]]) -> dict[str, Tensor]:
    """The state of the pools of each layer's A and B, by names for a file."""
    factors = {f"{name}.{'AB'[pool.dim]}": pool for name, pair in pools.items() for pool in pair}
    return {f"{name}.{field}": value for name, pool in factors.items() for field, value in pool.state.items()}
