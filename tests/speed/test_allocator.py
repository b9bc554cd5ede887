"""Freed memory that stays, in a process of its own."""

import os
import subprocess
import sys

import pytest

from lorank.speed import allocator

PROGRAM = """
import resource, time, torch
from lorank.speed.allocator import give_back, keep_freed_memory
from lorank.train.memory import PeakMemory

print(keep_freed_memory())
for _ in range(12):  # until the holes left by alignment are filled
    x = torch.ones(2**22)  # 16 MiB
    del x
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
del x
with PeakMemory() as memory:
    x = torch.ones(2**22)
    time.sleep(0.05)
print(memory.gib * 1024)
"""


@pytest.mark.skipif(allocator._glibc() is None, reason="the C library is not glibc")
@pytest.mark.parametrize("decided", [False, True])
def test_memory_of_a_freed_tensor_is_used_again(decided: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"} if decided else {}
    command = [sys.executable, "-c", PROGRAM]
    said = subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout.split()
    done, pages, peak = said[0] == "True", int(said[1]), float(said[2])
    assert done is not decided
    assert (pages > 2000) if decided else (pages < 100)
    assert 15 < peak < 40, "what is measured is not what was free before"
