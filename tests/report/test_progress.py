"""Progress on the terminal."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table
from transformers import TrainerControl, TrainerState, TrainingArguments

from lorank.cli.console import ResultsConsole
from lorank.report.progress import ComparisonProgress, TerminalProgress


def test_the_time_left_counts_steps_and_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal runs of 6 steps, 2 s each, after 10 s; a second later it is saved, which needs 5 s. Planning took an hour."""
    now = [0.0]
    monkeypatch.setattr("lorank.report.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = ComparisonProgress(Console(file=io.StringIO()))
    now[0] = 3600.0
    left = []
    for number, name in enumerate("ab", start=1):
        progress.start(name, 6, 6.0, number, 2, 12.0 - 6.0 * (number - 1))
        progress.update({})
        now[0] += 10
        for step in range(1, 7):
            progress.update({"step": step})
            left.append(progress._seconds_left())
            now[0] += 2
        now[0] += 4
        progress.end("done")
    assert left[0] is None, "one step does not show how long they take"
    assert left[1:6] == pytest.approx([4 * 2 + 10 + 12, 3 * 2 + 10 + 12, 2 * 2 + 10 + 12, 2 + 10 + 12, 10 + 12])
    assert left[7:] == pytest.approx([4 * 2, 3 * 2, 2 * 2, 2, 0])


@pytest.mark.parametrize("width", [44, 60])
def test_a_narrow_terminal_keeps_the_time_left(tmp_path: Path, width: int) -> None:
    console = ResultsConsole(file=io.StringIO(), force_terminal=True, width=width)
    progress = TerminalProgress("cola-m+galore 60m", console)
    arguments, state, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    state.max_steps, state.is_world_process_zero = 10_000, True
    progress.on_train_begin(arguments, state, control)
    for step in range(1, 4):
        state.global_step = step
        progress.on_step_end(arguments, state, control)
        progress.on_log(arguments, state, control, logs={"loss": 5.0, "tokens_per_second": 1e4, "eval_perplexity": 9.0})
    assert progress.bar is not None
    progress.bar.refresh()
    progress.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert re.search(r"3/10000  .*left [\d:-]{7}\s", shown) and max(map(len, re.split(r"[\r\n]", shown))) <= width


@pytest.mark.parametrize(("columns", "widest"), [(2, 50), (9, 70)])
def test_only_tables_of_figures_are_wider_than_the_terminal(columns: int, widest: int) -> None:
    console, table = ResultsConsole(file=io.StringIO(), width=50), Table(box=None)
    for _ in range(columns):
        table.add_column("a name of some words")
    table.add_row(*["several words in a cell"] * columns)
    console.print(table)
    assert max(map(len, console.file.getvalue().splitlines())) <= widest and console.width == 50  # type: ignore[attr-defined]


def test_progress_without_a_terminal_is_a_line_now_and_then(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    progress = TerminalProgress("cola tiny", console)
    arguments, state, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    state.max_steps, state.is_world_process_zero = 100, True
    progress.on_train_begin(arguments, state, control)
    progress.on_log(arguments, state, control, logs={"loss": 5.0, "tokens_per_second": 1.0})  # FLOPs are not known
    for step in range(1, 101):
        state.global_step = step
        logs = {"loss": 5.0, "tokens_per_second": 1000.0, "mfu": 0.5}
        progress.on_log(arguments, state, control, logs=logs)
    progress.on_log(arguments, state, control, logs={"eval_perplexity": 150.0})
    progress.close()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert 1 <= len(lines) < 10
    assert "step 100/100" in lines[-1] and "val ppl 150.00" in lines[-1] and "1,000 tok/s" in lines[-1]
