"""Hostile input in the long form: the tests of tests/hostile with thousands of examples each.

    python benchmarks/hostile.py                      # 2,000 for each of six tests, drawn at random
    python benchmarks/hostile.py --guided             # 2,000 more, by which atheris looks for code not yet reached (pip install atheris)
    python benchmarks/hostile.py --examples 200 --out found.json

How many there were and how many failed is kept in benchmarks/results/hostile.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests/hostile/test_hostile_input.py"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "0"]


def at_random(environment: dict[str, str], report: Path) -> dict[str, Any]:
    subprocess.run([*PYTEST, f"--junitxml={report}", str(FILE)], env=environment, cwd=ROOT)
    text = report.read_text()
    report.unlink()
    return {"failed": text.count("<failure") + text.count("<error")}


def guided(environment: dict[str, str], name: str) -> dict[str, Any]:
    """One test in its process, which libFuzzer ends. Places are those of lorank's code that inputs reached, as atheris counts them."""
    paths = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    command = [*PYTEST, "-p", "guided", f"{FILE}::{name}"]
    done = subprocess.run(
        command,
        env={**environment, "PYTHONPATH": paths},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ends = re.search(r"DONE\s+cov: (\d+)", done.stdout)
    if done.returncode or ends is None:
        print(done.stdout[-8000:], file=sys.stderr)
        return {"failed": 1}
    return {"failed": 0, "places": int(ends[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="for each test")
    parser.add_argument("--guided", action="store_true", help="by atheris instead of at random")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/hostile.json")
    options = parser.parse_args()
    names = re.findall(r"@fuzz\n@given.*\ndef (\w+)", FILE.read_text())
    environment, began = {**os.environ, "LORANK_HOSTILE": str(options.examples)}, time.time()
    if options.guided:
        each = {name: guided(environment, name) for name in names}
    else:
        each = {f"all {len(names)} tests": at_random(environment, options.out.with_suffix(".xml"))}
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    found["guided by atheris" if options.guided else "at random"] = {
        "examples": len(names) * options.examples,
        **each,
        "minutes": round((time.time() - began) / 60, 1),
    }
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    raise SystemExit(any(one["failed"] for one in each.values()))


if __name__ == "__main__":
    main()
