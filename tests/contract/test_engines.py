"""The table of engines in docs/distributed.md says what trains."""

import itertools
import os
import subprocess
import sys

import pytest

from tests.contract import engines
from tests.distributed.together import together

pytestmark = pytest.mark.usefixtures("forked_processes")


def test_every_method_and_optimizer_has_a_row() -> None:
    """adamw-8bit needs bitsandbytes, and votes move integers."""
    text = engines.PAGE.read_text(encoding="utf-8").partition(engines.BEGIN)[2].partition(engines.END)[0]
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == [*engines.STRUCTURES, *engines.OPTIMIZERS]


def test_one_reason_stands_for_all_methods_that_have_it() -> None:
    """Whatever their names."""
    refused = "%s changes whole weights between steps"
    found = {name: dict.fromkeys(engines.ENGINES, refused % name) for name in ("relora", "self-guided")}
    assert engines.table(found).endswith("\n\n1. the method changes whole weights between steps\n")


def test_four_processes_train_as_one() -> None:
    """Each kind of structure, and an optimizer for each way to gather; all of them are in the slow test below."""
    names = ("dense", "cola-m", "masa", "relora", "galore", "spectron")
    found = together(lambda: engines.engines(names), 4)[0]
    refused = {(name, engine) for name, its in found.items() for engine, said in its.items() if isinstance(said, str)}
    assert refused == {
        *itertools.product(("dense", "masa", "relora"), ("tensor parallel", "both")),
        ("relora", "fsdp"),
    }
    assert engines.table(found)  # which asserts that differences are small


@pytest.mark.slow
def test_the_table_is_what_four_processes_find() -> None:
    command = [sys.executable, "-W", "ignore", engines.__file__, "check"]
    env = {**os.environ, "PYTHONPATH": str(engines.PAGE.parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_find_the_same() -> None:
    text = engines.PAGE.read_text(encoding="utf-8").partition(engines.BEGIN)[2].partition(engines.END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in text.splitlines() if line.startswith("| ")][1:]
    found = together(engines.engines, 2, 900)[0]
    for name, *cells in rows:
        said = [isinstance(found[name][engine], str) for engine in engines.ENGINES[:3]]
        assert said == [cell.startswith("no") for cell in cells], name
        assert max(value for value in found[name].values() if not isinstance(value, str)) < engines.NEAR, name
