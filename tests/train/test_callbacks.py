"""Callbacks: timing of steps alone, metrics with units, and an end to what is not finite."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from lorank.train import callbacks
from lorank.train.callbacks import MetricsFile, StopOnNonFinite, Throughput
from lorank.train.folder import history, logged_rate


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now.value)
    return now


def test_only_steps_are_timed(clock: Any) -> None:
    watch = Throughput(tokens_per_step=50)
    assert watch.tokens_per_second() is None
    for seconds in (9.0, 2.0, 2.0):  # the first step warms up
        clock.value += seconds
        watch.on_step_end()
    assert watch.tokens_per_second() == 25.0
    assert watch.tokens_per_second() is None, "a window ends when it is read"
    clock.value += 1000.0
    watch.on_evaluate()
    clock.value += 5.0
    watch.on_step_end()
    clock.value += 1000.0
    watch.on_save()
    assert watch.tokens_per_second() == 10.0
    assert watch.seconds == [2.0, 2.0, 5.0]
    assert watch.typical_tokens_per_second() == 25.0


def test_metrics_have_units_and_only_the_main_process_writes(tmp_path: Any) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    state, control = TrainerState(global_step=7), TrainerControl()
    arguments: Any = None
    state.is_world_process_zero = False
    file.on_log(arguments, state, control, {"loss": 1.0})
    assert not file.path.exists()
    state.is_world_process_zero = True
    file.on_log(arguments, state, control, {"loss": 1.5, "grad_norm": 0.5, "learning_rate": 1e-3, "epoch": 0.1})
    file.on_log(arguments, state, control, {"train_runtime": 3.0})
    assert file.path.read_text() == '{"step": 7, "loss_nats_per_token": 1.5, "gradient_norm": 0.5, "lr": 0.001}\n'


def test_half_a_line_is_no_record(tmp_path: Any) -> None:
    """Of a run that was killed after its last checkpoint, which trains no further step that would remove it."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens_per_second": 5.0}\n{"step": 2, "tokens_per')
    assert logged_rate(tmp_path) == 5.0


def test_a_damaged_line_is_no_record_and_is_removed(tmp_path: Any) -> None:
    """One flipped byte, which is no UTF-8 or no record, is no reason to refuse to go on."""
    file, whole = tmp_path / "metrics.jsonl", [b'{"step": %d, "lr": 1.0}\n' % step for step in (1, 2, 3)]
    damaged = [b'{"step": 2, "l\xf2": 1.0}\n', b"5\n", b"[]\n", b'{"step": "2"}\n', b"[" * 100_000 + b"\n"]
    file.write_bytes(b"".join([*damaged, *whole, b'{"step": 2, "lr']))
    assert [record["step"] for record in history(tmp_path)] == [1, 2, 3]
    arguments: Any = None
    MetricsFile(file).on_train_begin(arguments, TrainerState(global_step=2), TrainerControl())
    assert file.read_bytes() == b"".join(whole[:2])


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_the_run(name: str, value: float, tmp_path: Any) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=0.25, use_cpu=True)
    with pytest.raises(FloatingPointError, match=f"{name} became {value} by step 7; lower lr=0.25"):
        StopOnNonFinite().on_log(arguments, TrainerState(global_step=7), TrainerControl(), {name: value})
    StopOnNonFinite().on_log(arguments, TrainerState(global_step=7), TrainerControl(), {name: 1.0})
