"""What a reader sees of runs: curves, tables, progress."""

import io
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from lorank.report.curves import draw_curves
from lorank.report.progress import TerminalProgress
from lorank.report.tables import evaluation_table, quantity, runs_table
from lorank.train.evaluation import Evaluation


def records(loss: float) -> list[dict]:
    train = [{"step": s, "tokens": 100 * s, "loss_nats_per_token": loss + 3 / s} for s in range(1, 20)]
    return [*train, {"step": 19, "tokens": 1900, "eval_loss_nats_per_token": loss, "eval_perplexity": 2.0}]


def test_curves_are_a_picture_that_shows_each_run(tmp_path: Path) -> None:
    draw_curves({"dense": records(4.0), "cola": records(3.5)}, tmp_path / "loss.png", title="Title")
    both = matplotlib.image.imread(tmp_path / "loss.png")
    assert both.shape[0] > 500 and both.shape[1] > 900 and 0.5 < both[..., :3].mean() < 1
    draw_curves({"dense": records(4.0)}, tmp_path / "one.png", title="Title")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["loss.png", "one.png"], "no temporary file is left"


def test_curves_of_a_run_without_evaluations(tmp_path: Path) -> None:
    draw_curves({"dense": records(4.0)[:-1]}, tmp_path / "loss.png", title="Title")
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize(("value", "text"), [(42_770_944, "42.8 M"), (1e9, "1 G"), (999, "999"), (0.5, "0.5")])
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text


def render(table: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_show_each_figure_under_its_full_name() -> None:
    run = {
        "parameters": 1000,
        "block_parameters": 400,
        "flops_per_token": 6e3,
        "peak_memory_gib": 0.5,
        "tokens_per_second": 1234.5,
        "mfu": 0.5,
        "tokens": 10_000,
        "validation_loss_nats_per_token": 3.0,
        "validation_perplexity": 20.09,
        "validation_bits_per_byte": 1.5,
        "lr": 5e-3,
    }
    text = render(runs_table({"dense": run, "cola": run}))
    for words in ("1,000", "6 k", "512 MiB", "1,234", "50%", "20.09", "0.005", "dense", "cola"):
        assert words in text
    text = render(evaluation_table(Evaluation(30.0, 10, 2, 6.0, 3.0)))
    assert "perplexity (unbiased)" in text and "20.086" in text and "published-compatible perplexity" in text
    assert "7.389" in text  # exp(6 / 3)


def test_progress_without_a_terminal_is_a_line_now_and_then(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    progress = TerminalProgress("cola tiny", console)
    arguments, state, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    state.max_steps, state.is_world_process_zero = 100, True
    progress.on_train_begin(arguments, state, control)
    for step in range(1, 101):
        state.global_step = step
        logs = {"loss": 5.0, "tokens_per_second": 1000.0, "mfu": 0.5}
        progress.on_log(arguments, state, control, logs=logs)
    progress.on_log(arguments, state, control, logs={"eval_perplexity": 150.0})
    progress.close()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert 1 <= len(lines) < 10
    assert "step 100/100" in lines[-1] and "val ppl 150.00" in lines[-1] and "1,000 tok/s" in lines[-1]
