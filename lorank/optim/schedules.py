"""Schedules of optimizers that begin anew during a run."""

import math

SMALLEST = 1e-6
"""Learning rate, as a part of the whole, at which a restart begins."""


def restarted_cosine(
    step: int, *, steps: int, warmup: int, min_lr_ratio: float, every: int, restart: int, late: int
) -> float:
    """Multiplier of lr: a warm-up from `min_lr_ratio`, then a cosine that is `late` by that many steps, and so has its peak that long
    after the warm-up; every `every` steps it restarts with `restart` steps of warm-up from nearly 0.

    >>> settings = dict(steps=10_000, warmup=1_000, min_lr_ratio=0.1, every=500, restart=5, late=1_000)
    >>> [round(restarted_cosine(step, **settings), 3) for step in (0, 499, 500, 505, 2005, 9999)]
    [0.1, 0.534, 0.0, 0.539, 1.0, 0.127]
    """
    rest = max(1, steps - warmup)
    cosine = lambda at: 0.5 * (1 + math.cos(math.pi * min(1, (at - warmup) / rest)))  # noqa: E731
    if step < warmup:
        at, top = step, 0.5 * (1 + math.cos(math.pi * late / rest))
        height = lambda at: min_lr_ratio + (top - min_lr_ratio) * at / warmup  # noqa: E731
    else:
        at = step - late
        height = lambda at: min_lr_ratio + (1 - min_lr_ratio) * cosine(at)  # noqa: E731
    since = at % every
    if at >= every and since < restart:
        return SMALLEST + since / restart * (height(at - since) - SMALLEST)
    return height(at)
