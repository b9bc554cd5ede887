"""Which of the processes that torchrun has started this one is."""

import os


def processes() -> int:
    """Of this run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that prints and writes, or the only one."""
    return os.environ.get("RANK", "0") == "0"
