"""CoLA and its dense twin with AdamW and weights as they are drawn: the same grid of learning rates for both, and each keeps its best.

    python benchmarks/demo_sweep.py [--rates 8e-4 1.3e-3 2e-3 3e-3 5e-3 8e-3] [--out runs/demo-sweep]

Each run has the demo's seed, tokens and order of data. It has a process and a thread for itself, and two run at a time.
Finished runs are kept: started again, the sweep goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def run(out: Path, method: str, rate: str) -> dict:
    folder = out / f"{method}-{rate}"
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "lorank", "pretrain", "--method", method, "--optimizer", "adamw", "--lr", rate]
        command += ["--set", "zero_outputs=false"]
        subprocess.run(
            [*command, "--save-every", "0", "--out", str(folder)],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return json.loads((folder / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["8e-4", "1.3e-3", "2e-3", "3e-3", "5e-3", "8e-3"])
    parser.add_argument("--methods", nargs="+", default=["dense", "cola"])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-sweep"))
    options = parser.parse_args()
    jobs = [(method, rate) for rate in options.rates for method in options.methods]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(jobs, pool.map(lambda job: run(options.out, *job), jobs), strict=True))

    print(f"validation perplexity after {found[jobs[0]]['tokens']:,} tokens, seed 42; * marks each method's best")
    print(f"{'method':10} {'in blocks':>10} " + " ".join(f"lr {rate:>8}" for rate in options.rates))
    best = {}
    for method in options.methods:
        row = [found[method, rate]["validation_perplexity"] for rate in options.rates]
        best[method] = min(row)
        cells = " ".join(f"{value:10.2f}{'*' if value == best[method] else ' '}" for value in row)
        print(f"{method:10} {found[method, options.rates[0]]['block_parameters']:10,} {cells}")
    for method in options.methods[1:]:
        print(f"{method} / {options.methods[0]}, each at its best: {best[method] / best[options.methods[0]]:.3f}")


if __name__ == "__main__":
    main()
