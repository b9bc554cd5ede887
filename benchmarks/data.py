"""How fast text becomes rows of tokens, per core, and in how much memory.

    python benchmarks/data.py                  # 0.1, 0.3 and 1 GB of jsonl, made on the spot
    python benchmarks/data.py --megabytes 100  # a quick one

The text is made of the words of Python's standard library, drawn at random as often as they occur there, in documents of some 2 kB.
Seconds are those of all processors together (`os.times`, workers included), so that MB/s are per core, also on a machine that does
other things. Memory is what preparation adds to that of a process that has imported lorank; file pages, which are in it last, are those that
the processes have mapped, and which the system takes back when it needs them.
A vocabulary of 4,096 entries is learnt first, from 50 million characters at most, which does not count as preparation.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from lorank.train.data import load_corpus, load_tokenizer
from lorank.train.data.sources import embedded_files
from lorank.train.watching import watched_by


def write_text(file: Path, megabytes: float) -> None:
    """Rows of random prose."""
    found = Counter(
        word for path in embedded_files() for word in re.findall(r"[A-Za-z]+|[,.:;()]|\d+", path.read_text())
    )
    words = np.array(list(found))
    shares = np.array(list(found.values())) / found.total()
    generator = np.random.default_rng(0)
    with file.open("w") as out:
        while out.tell() < megabytes * 1e6:
            drawn = iter(np.split(generator.choice(words, 400_000, p=shares), 40_000))
            for _ in range(1000):
                lines = [" ".join(next(drawn)) for _ in range(40)]
                out.write(json.dumps({"text": "\n".join(lines)}) + "\n")


class Memory:
    """The most memory that this process and its children had, looked at ten times a second."""

    def __init__(self) -> None:
        self.most = memory()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.over.wait(0.1):
            for name, size in memory().items():
                self.most[name] = max(self.most[name], size)


def memory() -> dict[str, int]:
    """Bytes now."""
    me, found = psutil.Process(), []
    for process in (me, *me.children()):
        with contextlib.suppress(psutil.Error):  # it has ended
            found.append(process.memory_info())
    own = [one.rss - one.shared for one in found]
    names = ("this process", "all processes", "with file pages")
    return dict(zip(names, (own[0], sum(own), sum(one.rss for one in found)), strict=True))


def prepare(text: Path, cache: Path) -> None:
    """Prepare a text and print what it took, as JSON."""
    load = partial(load_corpus, str(text), tokenizer=str(cache / "tokenizer"), sequence_length=256, cache_dir=cache)
    seconds: dict[str, float] = {}
    current, looked, spent = "starting", time.perf_counter(), cpu_seconds()

    def watch(what: str, *rest: object) -> None:
        nonlocal current, looked, spent
        if what == current and time.perf_counter() - looked < 0.2:
            return  # looking takes time too
        now = cpu_seconds()
        seconds[what] = seconds.get(what, 0.0) + now - spent
        current, looked, spent = what, time.perf_counter(), now

    before, most, start = memory(), Memory(), time.perf_counter()
    with watched_by(watch):
        corpus = load()
    wall = time.perf_counter() - start
    watch("the rest")
    most.over.set()
    more = {name: size - before[name] for name, size in most.most.items()}
    tokens = sum(len(rows) for rows in (corpus.train, corpus.validation)) * 256
    print(json.dumps({"seconds": seconds, "wall": wall, "memory": more, "tokens": tokens}))


def cpu_seconds() -> float:
    """Of this process and its children, those that run included."""
    own = os.times()
    running = 0.0
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            running += sum(child.cpu_times()[:2])
    return own.user + own.system + own.children_user + own.children_system + running


def report(megabytes: float, found: dict) -> None:
    total = sum(found["seconds"].values())
    most = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in found["memory"].items())
    print(
        f"{megabytes:,.0f} MB: {megabytes / total:.1f} MB/s per core, {found['tokens'] / 1e6:.1f} M tokens\n    memory: {most}"
    )
    for what, seconds in found["seconds"].items():
        print(f"    {what:<28}{seconds:7.1f} s {megabytes / max(seconds, 1e-3):9.1f} MB/s")
    print(
        f"    {'on the clock':<28}{found['wall']:7.1f} s {megabytes / found['wall']:9.1f} MB/s on {len(os.sched_getaffinity(0))} cores"
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--megabytes", type=float, default=1000)
    options.add_argument("--prepare", nargs=2, type=Path, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.prepare:
        prepare(*asked.prepare)
        sys.exit()
    for megabytes in (0.1 * asked.megabytes, 0.3 * asked.megabytes, asked.megabytes):
        with tempfile.TemporaryDirectory() as folder:
            text, cache = Path(folder, "text.jsonl"), Path(folder, "cache")
            write_text(text, megabytes)
            sample = [json.loads(line)["text"] for _, line in zip(range(5000), text.open(), strict=False)]
            load_tokenizer(None, sample, vocab_size=4096, cache_dir=cache).save_pretrained(cache / "tokenizer")
            command = [sys.executable, __file__, "--prepare", str(text), str(cache)]
            report(megabytes, json.loads(subprocess.check_output(command, text=True)))
