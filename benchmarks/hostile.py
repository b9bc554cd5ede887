"""Hostile input in the long form: the tests of tests/hostile with thousands of examples each, and how many there were.

python benchmarks/hostile.py                     # 2,000 for each of five tests: benchmarks/results/hostile.json
python benchmarks/hostile.py --examples 200 --out /tmp/hostile.json
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="for each test")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/hostile.json")
    options = parser.parse_args()
    report, began = options.out.with_suffix(".xml"), time.time()
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--junitxml={report}", str(ROOT / "tests/hostile")]
    done = subprocess.run(command, env={**os.environ, "LORANK_HOSTILE": str(options.examples)}, cwd=ROOT)
    text = report.read_text()
    report.unlink()
    tests = text.count("<testcase ") - text.count("<skipped")
    found = {
        "tests": tests,
        "examples_of_each": options.examples,
        "failed": text.count("<failure"),
        "errors": text.count("<error"),
    }
    options.out.write_text(json.dumps({**found, "minutes": round((time.time() - began) / 60, 1)}, indent=2) + "\n")
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
