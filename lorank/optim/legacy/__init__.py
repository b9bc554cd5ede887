"""The optimizers before `LowRankOptimizer`, until nothing imports them any more."""
