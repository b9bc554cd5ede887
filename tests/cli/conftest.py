"""A text, flags for the shortest run on it, and a model trained by them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from lorank.cli import cli

QUICK = [
    "--set",
    "vocab_size=300",
    "--sequence-length",
    "32",
    "--batch-size",
    "4",
    "--steps",
    "4",
    "--warmup-steps",
    "1",
]


@pytest.fixture(scope="session")
def quick() -> list[str]:
    return QUICK


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (f"line {i}: the {'quick' if i % 3 else 'slow'} brown fox counts {i * i} lazy dogs\n" for i in range(600))
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def lorank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_this_process: Callable[..., tuple[int, str, str]]):
    """Run a command in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return in_this_process


@pytest.fixture(scope="session")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fox"
    done = CliRunner().invoke(cli, ["pretrain", "--data", str(text), *QUICK, "--out", str(folder)])
    assert done.exit_code == 0, done.output
    return folder
