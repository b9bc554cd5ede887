"""Processes that do numbered pieces of work, as many at a time as there are.

A worker is ``python -m MODULE FOLDER``. It reads numbers from its standard input, one a line, and answers each with lines: how far
it is, as often as it likes, and at last "done" with what it found in JSON. [errno, reason] is an OSError, a string in JSON a
ValueError.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import lorank


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Workers for one folder.

    Args:
        said: called with a number and how far its work is, from several threads.
        often: called in the thread that waits, twice a second.
    """

    def __init__(
        self, module: str, folder: Path, said: Callable[[int, int], object], often: Callable[[], object] = lambda: None
    ):
        self.module, self.folder, self.said, self.often = module, folder, said, often
        self.free: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()

    def do(self, numbers: Sequence[int], count: int) -> dict[int, Any]:
        """What `count` workers found for each number.

        Raises:
            OSError, ValueError: one failed; the others are ended.
        """
        with contextlib.ExitStack() as ending, ThreadPoolExecutor(count) as threads:
            started = [ending.enter_context(self._started()) for _ in range(count)]
            for process in started:
                self.free.put(process)
            work = {number: threads.submit(self.one, number) for number in numbers}
            pending = {*work.values()}
            try:
                while pending:
                    ended, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                    for one in ended:
                        one.result()
                    self.often()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for process in started:
                    process.kill()
                raise
            return {number: one.result() for number, one in work.items()}

    def one(self, number: int) -> Any:
        """Let a worker that has nothing to do work."""
        process = self.free.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{number}\n")
                process.stdin.flush()
            for line in process.stdout:
                if line.startswith("["):
                    code, reason = json.loads(line)
                    raise OSError(code, reason) if code else OSError(reason)
                if line.startswith('"'):
                    raise ValueError(json.loads(line))
                if line.startswith("done"):
                    return json.loads(line.removeprefix("done"))
                self.said(number, int(line))
        finally:
            self.free.put(process)
        raise OSError(
            f"a process that worked in {self.folder} died (exit code {process.wait()}); is there enough memory?"
        )

    @contextlib.contextmanager
    def _started(self) -> Iterator["subprocess.Popen[str]"]:
        """A process that works in one thread."""
        root = str(Path(lorank.__file__).parents[1])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", self.module, str(self.folder)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True) as process:
            try:
                yield process
            finally:
                with contextlib.suppress(BrokenPipeError):
                    assert process.stdin is not None
                    process.stdin.close()  # which ends it


def answer(begin: Callable[[], Callable[[int], Any]]) -> None:
    """Be a worker: do what is asked for on standard input with the function that `begin` returns."""
    try:
        work = begin()
        for line in sys.stdin:
            print(f"done{json.dumps(work(int(line)))}", flush=True)
    except OSError as error:
        reason = error.strerror or str(error)
        print(json.dumps([error.errno, f"{reason}: {error.filename}" if error.filename else reason]), flush=True)
    except ValueError as error:
        print(json.dumps(str(error)), flush=True)
