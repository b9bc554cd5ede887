"""From which sparsity on is it faster to read only the chosen ranks of a mixture? The two forms of `lorank.adapters.gated`, in turn.

    python benchmarks/gathered.py [--width 2048] [--rounds 41]

A layer's low-rank part, forward, fp32: "all" multiplies r ranks and a gate of zeros, as layers do; "chosen" reads k rows of A and k
columns of B for each token. Both are given the chosen ranks and their weights. The figure is the time of "all" over that of "chosen",
medians of calls that take turns: above 1, "chosen" is faster.
"""

import argparse
import statistics
import time

import torch
from turns import in_turns

from lorank.adapters.gated import gated, gathered, spread


def ratio(width: int, rank: int, k: int, tokens: int, rounds: int) -> float:
    draw = torch.Generator().manual_seed(0)
    x, A = torch.randn(tokens, width, generator=draw), torch.randn(rank, width, generator=draw)
    columns = torch.randn(rank, width, generator=draw)  # B column by column
    B, rows = columns.T.contiguous(), columns.T
    weights, chosen = torch.rand(tokens, rank, generator=draw).topk(k)
    forms = {
        "all": lambda: gated(x @ A.T, spread(weights, chosen, rank)) @ B.T,
        "chosen": lambda: gathered(x, A, rows, chosen, weights),
    }
    torch.testing.assert_close(forms["chosen"](), forms["all"](), rtol=1e-3, atol=1e-2)
    times = in_turns(forms, rounds, clock=time.perf_counter)
    return statistics.median(times["all"]) / statistics.median(times["chosen"])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=41)
    asked = parser.parse_args()
    print(f"width {asked.width}, fp32, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':16s}" + "".join(f"{f'k = {k}':>9s}" for k in (1, 4, 8, 32)))
    for tokens in (1, 4, 32, 256):
        for rank in (64, 256, 1024):
            row = "".join(f"{ratio(asked.width, rank, k, tokens, asked.rounds):9.2f}" for k in (1, 4, 8, 32))
            print(f"{f'{tokens} x r {rank}':16s}{row}", flush=True)


if __name__ == "__main__":
    main()
