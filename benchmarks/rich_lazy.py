"""Do recurrent weights of low rank learn more richly? A small reproduction of arXiv 2310.08513, with its confound.

    python benchmarks/rich_lazy.py [--seeds 3] > benchmarks/results/rich_lazy.txt

A network of 60 tanh units sees two noisy channels for 16 steps and says in the end which had the larger mean (two alternatives,
forced choice). Its recurrent weights start as W₀, drawn from a normal distribution, or as W₀ cut to a rank and rescaled to the
Frobenius or the spectral norm of W₀. All are trained by SGD with momentum for as many steps. "aligned" starts from the leading
direction of what an earlier network learned, at either norm. Given are means over seeds: the spectral radius at the start,
accuracy, the change of the recurrent weights, and the alignment of hidden states and of tangent kernels with those at the start.
"""

import argparse
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorank.analysis.rich_lazy import alignment, low_rank_start, sign_agreement, tangents, weight_change

UNITS, TIME, BATCH, STEPS, RATE = 60, 16, 64, 150, 0.02
RANKS = (1, 3, 10, 60)


class Net(NamedTuple):
    """Recurrent [d, d], input [d, 2] and output [2, d] weights."""

    W: Tensor
    U: Tensor
    V: Tensor

    def states(self, x: Tensor) -> Tensor:
        """The last hidden states [b, d] for inputs [b, time, 2]."""
        h = x.new_zeros(len(x), UNITS)
        for t in range(x.shape[1]):
            h = torch.tanh(h @ self.W.T + x[:, t] @ self.U.T)
        return h


def trials(generator: torch.Generator, number: int = BATCH) -> tuple[Tensor, Tensor]:
    labels = torch.randint(2, (number,), generator=generator)
    x = torch.randn(number, TIME, 2, generator=generator)
    return x + 0.4 * F.one_hot(labels, 2)[:, None], labels


def trained(W: Tensor, seed: int) -> tuple[Net, dict[str, float]]:
    """A network from these recurrent weights, and what became of it."""
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn = [
        torch.randn(UNITS, 2, generator=generator) / 2**0.5,
        torch.randn(2, UNITS, generator=generator) / UNITS**0.5,
    ]
    net = Net(*(one.clone().requires_grad_() for one in (W, *drawn)))
    probe, answers = trials(torch.Generator().manual_seed(7), 200)

    def seen() -> tuple[Tensor, Tensor, Tensor]:
        H = net.states(probe)
        logits = H @ net.V.T
        J = tangents(logits[:40, 1] - logits[:40, 0], net.W)
        return H.detach(), J, logits.detach()

    H, J, _ = seen()
    optimizer = torch.optim.SGD(net, lr=RATE, momentum=0.9)
    for _ in range(STEPS):
        x, labels = trials(generator)
        optimizer.zero_grad()
        F.cross_entropy(net.states(x) @ net.V.T, labels).backward()
        optimizer.step()
    end = seen()
    return net, {
        "radius": torch.linalg.eigvals(W).abs().max().item(),
        "accuracy": (end[2].argmax(1) == answers).float().mean().item(),
        "change": weight_change(W, net.W.detach()),
        "states": alignment(H, end[0]),
        "tangents": alignment(J, end[1]),
        "signs": sign_agreement(W, net.W.detach()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        W = torch.randn(UNITS, UNITS, generator=torch.Generator().manual_seed(seed)) * 0.9 / UNITS**0.5
        for matching in ("frobenius", "spectral"):
            for rank in RANKS:
                net, found = trained(low_rank_start(W, rank, matching), seed)
                rows.setdefault(f"{matching}, rank {rank}", []).append(found)
                if rank == UNITS:
                    learned = net.W.detach() - W
        aligned = low_rank_start(learned, 1)
        for matching, norm in (
            ("frobenius", torch.linalg.norm),
            ("spectral", lambda one: torch.linalg.matrix_norm(one, 2)),
        ):
            start = aligned * norm(W) / norm(aligned)
            rows.setdefault(f"aligned, {matching}", []).append(trained(start, seed)[1])
    print(f"{options.seeds} seeds, {STEPS} steps of {BATCH} trials; |W| is that of rank {UNITS} in rows 'frobenius'")
    names = ("radius", "accuracy", "change", "states", "tangents", "signs")
    print(f"{'':22}" + "".join(f"{name:>10}" for name in names))
    for row, found in rows.items():
        print(f"{row:22}" + "".join(f"{statistics.fmean(one[name] for one in found):10.3f}" for name in names))


if __name__ == "__main__":
    main()
