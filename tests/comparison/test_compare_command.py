"""lorank compare as a user meets it."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lorank.comparison.runner import Comparison
from lorank.comparison.settings import ComparisonSettings
from lorank.train.folder import LOCK

pytestmark = pytest.mark.usefixtures("forked_processes")

BAD = {
    "no method": ([], "no method is named"),
    "unknown method": (["--method", "colla"], "did you mean 'cola'"),
    "an unknown one of two": (["--method", "cola,dnse"], "did you mean 'dense'"),
    "unknown setting": (["--method", "cola", "--sweep", "lrr=1,2"], "did you mean 'lr'"),
    "no values": (["--method", "cola", "--sweep", "lr"], "a sweep must be NAME=VALUE,VALUE"),
    "bad value": (["--method", "cola", "--sweep", "lr=1e-3,-1"], "lr must be a positive number, got -1.0"),
    "shared setting": (["--method", "cola", "--sweep", "steps=5,9"], "steps is the same for all"),
    "own of nobody": (["--method", "cola", "--for", "sparse", "lr=1e-3"], "--for sparse: no such row; the rows are cola, dense"),
    "twice": (["--method", "cola", "--method", "cola"], "the name 'cola' is taken"),
    "the control's name": (["--method", "dense-small=dense"], "the name 'dense-small' is taken"),
    "a value twice": (["--method", "cola", "--sweep", "lr=1e-3,0.001"], "lr=0.001 is given twice"),
    "a name out of the folder": (["--method", "..=cola"], "must be up to 64 letters"),
    "a name that is a device": (["--method", "nul.1=cola"], "got 'nul.1'"),
    "one folder for two names": (["--method", "a=cola", "--method", "A=cola"], "the name 'A' is taken"),
    "seeds": (["--method", "cola", "--seeds", "1,x"], "--seeds must be whole numbers"),
    "no digits": (["--method", "cola", "--seeds", "²"], "--seeds must be whole numbers"),
    "a seed too large": (["--method", "cola", "--seeds", "1,5000000000"], "seeds must be from 0 to 2**32 - 1, got 5000000000"),
    "a value in two sweeps": (["--method", "cola", "--sweep", "lr=1e-3", "--sweep", "lr=1e-3"], "is given twice"),
    "two of its own": (["--method", "cola", "--for", "cola", "lr=1e-3", "--for", "cola", "lr=1e-3"], "is given twice"),
    "seed twice": (["--method", "cola", "--seeds", "1,1"], "seeds must be different whole numbers"),
    "impossible match": (["--method", "cola", "--method", "relora", "--match", "params"], "no rank of relora has parameters"),
    "rank swept and matched": (["--method", "cola", "--match", "params", "--sweep", "rank=4,8"], "--match params chooses the rank; leave out rank"),
    "cost swept and matched": (["--method", "cola", "--match", "time", "--sweep", "checkpoint_every=1,2"], "so checkpoint_every cannot be swept"),
    "two structures in one": (["--method", "cola+sltrain"], "cola and sltrain cannot be combined"),
    "field of no method": (["--method", "cola", "--for", "cola", "option.depth=3"], "cola has no setting 'depth'"),
    "option of another type": (
        ["--method", "galore", "--rank", "4", "--for", "galore", "option.stagger=maybe"],
        "stagger must be",
    ),
    "option of no optimizer": (["--method", "fira", "--for", "fira", "option.gap=3"], "fira has no setting 'gap'"),
    "an optimizer of its own": (["--method", "fira", "--for", "fira", "optimizer=muon"], "muon and fira cannot be combined: both decide how the weights move"),
    "few sequences": (["--method", "cola", "--batch-size", "4000"], "give more text or a smaller batch"),
    "harness missing": (["--method", "cola", "--tasks", "arc_easy"], "pip install lm-eval"),
}  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_this_process: Callable[..., tuple[int, str, str]]):
    monkeypatch.chdir(tmp_path)
    return partial(in_this_process, "compare")


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    command, flags: list[str], mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    arguments, said = BAD[mistake]
    code, _, err = command(*flags, *arguments, "--out", "there")
    assert code == 2 and said in " ".join(err.split()) and err.startswith("lorank: ") and err.count("\n") == 1, err
    assert not (tmp_path / "there").exists()


def test_the_command_and_folders_that_hold_something_else(command, flags: list[str], quick, tmp_path: Path) -> None:
    arguments = ["--method", "mine=cola", "--sweep", "lr=1e-2", *flags, "--out", "there"]
    code, out, err = command(*arguments)
    assert code == 0, err
    assert (
        "mine" in out
        and "dense-small" in out
        and "report.html" in out
        and "Learning rate as given, not tuned" in " ".join(out.split())
    )
    code, _, err = command(*arguments, "--seeds", "7")
    assert code == 2 and "holds another comparison (seeds was [42], is [7])" in err
    code, out, _ = command("--resume", "there")
    assert code == 0 and "[1/4]" not in out
    assert command("--resume", "there", "--seeds", "7")[0] == 2
    assert command("--resume", "nowhere")[0] == 2
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    code, _, err = command("--method", "cola", *flags, "--out", "full")
    assert code == 2 and "is not an empty folder" in err and Path("full/thesis.txt").read_text() == "mine"
    with FileLock(tmp_path / "there" / LOCK):
        code, _, err = command("--resume", "there")
    assert code == 2 and "is in use by another process" in err


def test_a_rate_that_nobody_names_is_swept(command, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[ComparisonSettings] = []

    def stop(settings: ComparisonSettings, *rest: Any) -> None:
        found.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr(Comparison, "plan", stop)
    at = flags.index("--lr")
    without = flags[:at] + flags[at + 2 :]
    command("--method", "cola", *without)
    command("--method", "cola", *without, "--lr", "1e-3")
    Path("recipe.yaml").write_text("lr: 2e-3\n")
    command("recipe.yaml", "--method", "cola", "--for", "cola", "option.nonlinearity=low-rank")
    assert [(one.tuned, one.sweep) for one in found] == [("all", {}), ("dense", {}), ("dense", {})]
    assert found[2].own == {"cola": {"option.nonlinearity": ["low-rank"]}} and found[2].base.lr == 2e-3


def test_a_stopped_comparison_says_how_to_go_on(command, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupted)
    code, out, _ = command("--method", "dense", *flags, "--out", "there")
    assert code == 130 and "lorank compare --resume" in out and Path("there/report.html").exists()
