"""Signals that ask a program to stop: Ctrl-C, a closed terminal, and what clusters send before they kill (Slurm's --signal=USR1@60)."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows lacks the last two


@contextlib.contextmanager
def on_stop(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Inside, `handler` gets these signals. Under `nohup`, a closed terminal stays without effect. A thread other than the main one
    gets no signals and changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    wanted = [n for n in numbers if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
