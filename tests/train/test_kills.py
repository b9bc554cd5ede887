"""A run that is killed ten times at random moments ends as if it had not been; `benchmarks/kills.py` kills 200 times."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        ROOT / "benchmarks/kills.py",
        "--kills",
        "10",
        "--recipes",
        "1",
        "--out",
        tmp_path / "found.json",
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 0 and found["kills"] >= 10 and not found["lost"], found
