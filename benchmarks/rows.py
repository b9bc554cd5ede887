"""What benchmarks/images.py and benchmarks/ratings.py share: a short training, and a row of a table over seeds.

Each row has the best of several learning rates, each three times the one before, by the part of seed 0 that is there to choose by; then mean ±
standard deviation over the seeds on the part to report.
"""

from collections.abc import Callable, Sequence
from statistics import mean, stdev

import torch
from torch import Tensor, nn

SEEDS = (0, 1, 2)

Loss = Callable[[Tensor, torch.Generator], Tensor]
Measure = Callable[[bool], list[float]]
"""Figures on the part to report, or on the one to choose by; the last one counts."""
Run = Callable[[float, int], tuple[nn.Module, Measure]]
"""From a learning rate and a seed to what was trained."""


def fit(loss: Loss, module: nn.Module, lr: float, seed: int, *, steps: int, count: int, batch: int = 32) -> None:
    """AdamW on what trains; `loss` gets indices of examples, out of `count`, and a generator for whatever else it draws."""
    draw, trained = torch.Generator().manual_seed(seed), [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    module.train()
    for _ in range(steps):
        loss(torch.randint(count, (batch,), generator=draw), draw).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    module.eval()


def row(name: str, run: Run, usual: float, *, least: bool = False, digits: int = 1) -> None:
    """Print a row. With a `usual` rate of 0 nothing is trained; with `least` the smallest figure is the best."""

    def tried(lr: float, seed: int) -> tuple[float, list[float], int]:
        module, measure = run(lr, seed)
        with torch.no_grad():
            chosen_by, reported = measure(False)[-1], measure(True)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return -chosen_by if least else chosen_by, reported, trained

    found = {lr: tried(lr, 0) for lr in ((usual / 3, usual, usual * 3) if usual else (0.0,))}
    best = max(found, key=lambda lr: found[lr][0])
    while usual and best in (min(found), max(found)) and len(found) < 5:
        lr = best / 3 if best == min(found) else best * 3
        found[lr] = tried(lr, 0)
        best = max(found, key=lambda lr: found[lr][0])
    seeds = [found[best], *(tried(best, seed) for seed in SEEDS[1:])]
    columns = zip(*(figures for _, figures, _ in seeds), strict=True)
    shown = "".join(f"{f'{mean(column):.{digits}f} ± {stdev(column):.{digits}f}':>16s}" for column in columns)
    print(f"{name:24s}{f'{best:.1e}' if usual else '-':>9s}{seeds[0][2]:9,d}{shown}", flush=True)


def title(what: str, columns: Sequence[str]) -> None:
    shown = "".join(f"{column:>16s}" for column in columns)
    print(f"\n{what:24s}{'lr':>9s}{'trained':>9s}{shown}", flush=True)
