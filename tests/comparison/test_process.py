"""Runs in separate processes: found again, stopped with a checkpoint, and asked why they ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lorank.comparison.process import PretrainProcess, begun, signals_later, stop_on_signal

pytestmark = pytest.mark.usefixtures("forked_processes")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, None])
def test_whatever_ends_the_block_ends_the_run(tmp_path: Path, error: type[BaseException] | None) -> None:
    """A full disk, a closed pipe, a signal, and a signal while the run is being started."""
    found = []

    def start() -> PretrainProcess:
        process = psutil.Popen(
            [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        process.stdout.readline()  # before, it would not react to a signal
        found.append(PretrainProcess(process, tmp_path))
        if error is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return found[0]

    with pytest.raises(error or KeyboardInterrupt), stop_on_signal(), begun(start):
        assert error is not None, "the signal came before"
        raise error
    assert found[0].process.wait(1) == -signal.SIGINT
    found[0].process.stdout.close()


def test_a_signal_waits_for_the_end_of_a_count() -> None:
    """An exception in the middle of torch's C++, where models are counted, may abort the process."""
    after, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_on_signal():
        with signals_later():
            os.kill(os.getpid(), signal.SIGTERM)
            after.append("the rest of the count")
        after.append("what follows")
    assert after == ["the rest of the count"] and signal.getsignal(signal.SIGTERM) == before


def test_why_a_process_ended(tmp_path: Path) -> None:
    def ended(program: str) -> str:
        process = PretrainProcess(psutil.Popen([sys.executable, "-c", program]), tmp_path)
        process.wait(lambda records: None)
        return process.last_words()

    assert "signal 9, perhaps because memory ran out" in ended("import os; os.kill(os.getpid(), 9)")
    assert ended("") == "it exited without any output"
    (tmp_path / "log.txt").write_text("step 3\nlorank: the disk is full\n\n")
    assert ended("raise SystemExit(2)") == "the disk is full"
