"""The peak memory of a run."""

import math
import threading
from typing import Any

import psutil
import torch

from lorank.speed.allocator import give_back


class PeakMemory:
    """Largest growth of memory inside a ``with``: allocated on CUDA, resident (sampled every 5 ms) on CPU."""

    gib: float = math.nan

    def __enter__(self) -> "PeakMemory":
        give_back()
        self._before = self._peak = psutil.Process().memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, process.memory_info().rss)

    def __exit__(self, *exception: Any) -> None:
        self._stop.set()
        self._thread.join()
        grown = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self._peak - self._before
        self.gib = grown / 2**30
