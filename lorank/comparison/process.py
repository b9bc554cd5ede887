"""A run of `lorank pretrain` in a separate process: started, watched through its files, stopped with a checkpoint.

RUN/asked.yaml     the recipe it was started with
RUN/process.json   which process trains it, so that the run is found again if whoever started it was killed
RUN/log.txt        its output
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import psutil

import lorank
from lorank.train.folder import record_of, write_whole
from lorank.train.recipe import Recipe
from lorank.train.signals import on_stop
from lorank.whole import without_link

POLL_SECONDS = 0.3


class PretrainProcess:
    """A run that was started or continued: its folder, and the process that trains it."""

    def __init__(self, process: psutil.Process, folder: Path):
        self.process, self.folder = process, folder
        self.code: int | None = None
        """How it ended, where that can be known: 0, an error's code, or minus the number of a signal."""

    @classmethod
    def start(cls, recipe: Recipe, folder: Path) -> Self:
        """Train `recipe` in `folder`, or continue the run that is there. The output goes to log.txt."""
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lorank", "pretrain"]
        if (folder / "recipe.yaml").exists():
            command += ["--resume", str(folder)]
        else:
            asked = without_link(folder / "asked.yaml")
            asked.write_text(recipe.to_yaml())
            command += [str(asked), "--out", str(folder)]
        root = str(Path(lorank.__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with without_link(folder / "log.txt").open("ab") as log:
            # in a new session, so that Ctrl-C reaches the process once, from us, and not a second time from the terminal
            process = psutil.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
        write_whole(folder / "process.json", json.dumps({"pid": process.pid, "since": process.create_time()}))
        return cls(process, folder)

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """The process that trains in `folder`, whoever started it; None if there is none."""
        try:
            known = json.loads((folder / "process.json").read_text())
            process = psutil.Process(known["pid"])
            same = abs(process.create_time() - known["since"]) < 1  # the number may be another process's by now
            return cls(process, folder) if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (OSError, ValueError, KeyError, psutil.Error):
            return None

    def wait(self, update: Callable[[Mapping[str, Any]], None]) -> None:
        """Return when it ends; `update` is called with the newest figures of the run now and then."""
        reader = Tail(self.folder / "metrics.jsonl")
        while self._running():
            with contextlib.suppress(psutil.TimeoutExpired, subprocess.TimeoutExpired):
                self.code = self.process.wait(POLL_SECONDS)
            update(reader.latest())

    def _running(self) -> bool:
        if isinstance(self.process, psutil.Popen):
            self.code = self.process.poll()
            return self.code is None
        return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE

    def kill(self) -> None:
        with contextlib.suppress(psutil.Error):
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """Ask it to save a checkpoint and end; a second Ctrl-C kills it."""
        with contextlib.suppress(psutil.Error):
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait()
            except KeyboardInterrupt:
                self.kill()

    def last_words(self) -> str:
        """Why it ended without a result: the signal that ended it, or the last line of its output."""
        if self.code is not None and self.code < 0:
            memory = ", perhaps because memory ran out" if -self.code == signal.SIGKILL else ""
            return f"it was killed by signal {-self.code}{memory}"
        try:
            lines = [line.strip() for line in (self.folder / "log.txt").read_text(errors="replace").splitlines()]
        except OSError:
            lines = []
        said = [line for line in lines if line]
        return said[-1].removeprefix("lorank: ") if said else "it exited without any output"


class Tail:
    """Reads a growing metrics.jsonl, each line once, and keeps the newest value of each figure."""

    def __init__(self, path: Path):
        self.path, self._read, self._found = path, 0, dict[str, Any]()

    def latest(self) -> dict[str, Any]:
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._read:
                self._read = 0  # a resumed run has cut off the steps that it repeats
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
            self._read += len(whole) + len(newline)
            for line in whole.splitlines():
                self._found.update(record_of(line) or {})
        return self._found


@contextlib.contextmanager
def stop_on_signal() -> Iterator[None]:
    """Inside, every signal that asks to stop raises KeyboardInterrupt as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with on_stop(interrupt):
        yield


@contextlib.contextmanager
def begun(begin: Callable[[], PretrainProcess]) -> Iterator[PretrainProcess]:
    """The process that `begin` starts or finds. If anything ends the block early, a signal or a full disk, the process saves
    a checkpoint and ends first."""
    process = None
    try:
        with signals_later():
            process = begin()
        yield process
    except BaseException:
        if process is not None:
            process.stop()
        raise


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
    """Inside, signals that ask to stop wait for the end: an exception in the middle of torch's C++ may abort the process."""
    came: list[int] = []
    try:
        with on_stop(lambda number, frame: came.append(number)):
            yield
    finally:
        for first in came[:1]:
            signal.raise_signal(first)
