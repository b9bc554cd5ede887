"""How long until something happens: what `import lorank` adds to torch and transformers, and `lorank --help`.

    python benchmarks/startup.py

Each is the median of seven fresh processes.
"""

import statistics
import subprocess
import sys
import time

IMPORT = """
import time, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
start = time.perf_counter()
import lorank
{use}
print(time.perf_counter() - start)
"""


def seconds_inside(code: str) -> float:
    runs = [float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(7)]
    return statistics.median(runs)


def seconds_of(command: list[str]) -> float:
    runs = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        runs.append(time.perf_counter() - start)
    return statistics.median(runs)


if __name__ == "__main__":
    print(f"import lorank, beyond torch and transformers        {seconds_inside(IMPORT.format(use='')):.3f} s")
    use = "lorank.convert, lorank.CoLA, lorank.checkpoint"
    print(f"... and its functions used for the first time       {seconds_inside(IMPORT.format(use=use)):.3f} s")
    print(
        f"lorank --help                                       {seconds_of([sys.executable, '-m', 'lorank', '--help']):.3f} s"
    )
