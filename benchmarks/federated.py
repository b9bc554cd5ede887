"""Federated rules on text of four kinds, one for each client: at equal rounds, at equal bytes, and under privacy.

    python benchmarks/federated.py [--out runs/federated-benchmark] [--rounds 4] [--seeds 3]

The base is a dense Llama of 0.3 M parameters, trained on Python's standard library (the embedded corpus). Four clients have four kinds of
text from an installation of Python and torch: C++ headers, the language reference, names of Unicode characters, and docstrings without
their code. So what one client has, no other has. All train LoRA of rank 4 on all projections, with AdamW that begins anew each round.

Each row's learning rate is the best by the mean loss of the clients after the last round, with seed 0; all seeds use it. Rates are three
times as large as the last, and are tried until the best one has a worse one on either side. Losses are nats per held-out token, the mean of
the clients', ± the standard deviation over seeds. The clients run one after another in one process; Flower's engine computes the same
numbers.
"""

import argparse
import ast
import dataclasses
import os
import shutil
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from kinds import base_in, three_kinds, written

from lorank.federated.local import Local, clients_of
from lorank.federated.server import Server
from lorank.federated.settings import Settings

MOST = 300_000
"""Characters of each client."""
STEPS = 5
"""Of a client in a round."""
LENGTH = 32
RATE = 3e-2
"""The learning rate with which each search begins."""
RULES = ("average", "flora", "ffa", "fedsvd", "best")
EPSILONS = (1.0, 10.0)


def texts() -> dict[str, list[str]]:
    """Rows of each client."""
    docstrings = []
    for path in sorted((Path(torch.__file__).parent / "nn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            if isinstance(node, kinds) and len(text := ast.get_docstring(node) or "") > 200:
                docstrings.append(text)
    return {**three_kinds(), "docstrings": docstrings}


class Bench:
    """Runs of one base and one set of texts, each done once."""

    def __init__(self, out: Path, rounds: int, seeds: int):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.seeds = out, range(seeds)
        data = ",".join(map(str, written(texts(), out, MOST).values()))
        shared: dict[str, Any] = {"rank": "4", "alpha": 8.0, "steps": STEPS, "batch_size": 8, "sequence_length": LENGTH}
        self.common = Settings(
            model=str(base_in(out, blocks=2)),
            data=data,
            rounds=rounds,
            clients=4,
            eval_tokens=800,
            delta=1e-4,
            **shared,
        )

    def run(self, **changes: Any) -> list[dict[str, Any]]:
        settings = dataclasses.replace(self.common, **changes)
        shutil.rmtree(self.out / "now", ignore_errors=True)
        return Server(settings, self.out / "now").run(Local(clients_of(settings)))

    def best(self, **changes: Any) -> tuple[float, list[list[dict[str, Any]]]]:
        """The best learning rate RATE · 3^k, with a worse one on either side, and the rounds of each seed with it."""
        tried: dict[int, list[dict[str, Any]]] = {}
        best, middle = 0, None
        while best != middle:
            middle = best
            for k in (middle - 1, middle, middle + 1):
                if k not in tried:
                    tried[k] = self.run(lr=RATE * 3.0**k, seed=0, **changes)
            best = min(tried, key=lambda k: tried[k][-1]["loss"])
        lr = RATE * 3.0**best
        return lr, [tried[best], *(self.run(lr=lr, seed=seed, **changes) for seed in self.seeds[1:])]


def sent(rows: list[dict[str, Any]]) -> float:
    """MB of all clients, up and down."""
    return sum(row["down"] + row["up"] for row in rows) / 1e6


def figure(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def at(rows: list[dict[str, Any]], megabytes: float) -> float:
    """The loss after the last round up to which no more was sent."""
    return [row["loss"] for i, row in enumerate(rows) if sent(rows[: i + 1]) <= megabytes][-1]


def show(name: str, *cells: str) -> None:
    print(f"{name:28s}" + "".join(f"{cell:>17s}" for cell in cells), flush=True)


def without_privacy(bench: Bench) -> None:
    rounds = bench.common.rounds
    found = {rule: bench.best(method=rule) for rule in RULES}
    for rule in ("average", "fedsvd"):
        found[f"{rule}, sparse 1/4"] = bench.best(method=rule, down=0.25, up=0.25)
    first = found["average"][1][0][0]["loss"]
    print(f"Without privacy, {STEPS} steps of 8 sequences in a round; the base loses {first:.3f}\n")
    least = min(sent(runs[0]) for _, runs in found.values())
    show("", "lr", "MB", f"round {rounds}", "round 2", f"at {least:.2f} MB")
    for name, (lr, runs) in found.items():
        losses = [figure([rows[i]["loss"] for rows in runs]) for i in (-1, 2)]
        show(name, f"{lr:.2g}", f"{sent(runs[0]):.2f}", *losses, figure([at(rows, least) for rows in runs]))


def under_privacy(bench: Bench) -> None:
    settings: dict[str, Any] = {"clip": 0.5, "batch_size": 32, "steps": 3}
    print(
        "\nUnder privacy: (epsilon, delta = 1e-4) of one sequence, 3 steps of 32 sequences on average, clipped at 0.5; loss after the"
    )
    print(f"last of {bench.common.rounds} rounds\n")
    show("", *(cell for epsilon in EPSILONS for cell in ("lr", f"epsilon {epsilon:g}")))
    for rule in ("average", "ffa", "fedsvd"):
        cells = []
        for epsilon in EPSILONS:
            lr, runs = bench.best(method=rule, epsilon=epsilon, **settings)
            assert all(max(rows[-1]["epsilon"].values()) <= epsilon for rows in runs)
            cells += [f"{lr:.2g}", figure([rows[-1]["loss"] for rows in runs])]
        show(rule, *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/federated-benchmark"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", choices=("all", "rules", "privacy"), default="all")
    asked = parser.parse_args()
    began, cpu = time.perf_counter(), time.process_time()
    bench = Bench(asked.out, asked.rounds, asked.seeds)
    clients = clients_of(bench.common)
    sizes = [len(client._text(bench.common)[0]) for client in clients]
    print(f"clients: {sizes} sequences of {LENGTH} tokens; {asked.rounds} rounds; torch {torch.__version__}\n")

    if asked.part in ("all", "rules"):
        without_privacy(bench)
    if asked.part in ("all", "privacy"):
        under_privacy(bench)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    minutes, busy = (time.perf_counter() - began) / 60, (time.process_time() - cpu) / 60
    print(f"\n{minutes:.0f} minutes, {busy:.0f} of CPU, OMP_NUM_THREADS={threads}")


if __name__ == "__main__":
    main()
