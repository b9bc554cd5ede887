"""Fast versions of what a model computes anyway, each tested against the slow one."""
