"""What long work shows: a bar on a terminal, a line now and then elsewhere."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from lorank.report.lines import Line, fitted
from lorank.report.work import WorkProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("lorank.report.work.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def work_for(show: WorkProgress, clock: list[float], seconds: int) -> None:
    """A megabyte a second, after 40 MB that were there before."""
    for second in range(seconds + 1):
        show("reading", (40 + second) * 10**6, (40 + seconds) * 10**6, "B")
        clock[0] += 1


def test_without_a_terminal_it_is_a_line_every_half_minute(clock: list[float]) -> None:
    out = io.StringIO()
    show = WorkProgress(Console(file=out, width=100))
    work_for(show, clock, 20)
    assert not out.getvalue(), "short work says nothing"
    work_for(show, clock, 70)
    assert out.getvalue().splitlines() == [
        "reading: 71.0 MB of 110.0 MB, 1.0 MB/s, about 39 s left",
        "reading: 102.0 MB of 110.0 MB, 1.0 MB/s, about 8 s left",
    ]
    show("evaluating", 5, None, "tokens")
    clock[0] += 31
    show("evaluating", 316, None, "tokens")
    for layer in (1, 2, 3):
        show("fitting", layer, 14, "layers")
        clock[0] += 50
    assert out.getvalue().splitlines()[2:] == [
        "evaluating: 316 tokens, 10 tokens/s",
        "fitting: 2 of 14 layers, about 10 min left",
        "fitting: 3 of 14 layers, about 9.2 min left",
    ]


def test_on_a_terminal_it_is_a_bar_that_leaves_no_trace(clock: list[float]) -> None:
    out = io.StringIO()
    show = WorkProgress(Console(file=out, width=100, force_terminal=True))
    work_for(show, clock, 1)
    assert not out.getvalue()
    for second in range(5):
        show("reading", second * 10**6, 10**7, "B")
        clock[0] += 1
    assert show.bar is not None and show.bar.live.transient
    show.close()
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "reading" in said and "4.0 MB of 10.0 MB  1.0 MB/s  about 6 s left" in said
    assert show.bar is None


@pytest.mark.parametrize("width", [24, 44, 60, 80])
def test_a_narrow_terminal_keeps_the_time_left(clock: list[float], width: int) -> None:
    out = io.StringIO()
    show = WorkProgress(Console(file=out, width=width, force_terminal=True))
    for second in range(3):
        show("tokenising", 10**6 * second, 10**7, "B")
        clock[0] += 1
    show.close()
    assert "about 8 s left" in out.getvalue() and "\n\x1b[1A" not in out.getvalue()


def test_what_cannot_say_how_far_it_is_shows_at_once(clock: list[float]) -> None:
    for terminal in (True, False):
        out = io.StringIO()
        show = WorkProgress(Console(file=out, width=44, force_terminal=terminal))
        show("merging", 0, None, "")
        show.close()
        assert "merging" in out.getvalue()


def test_the_last_figures_go_first() -> None:
    line = Line(
        "cola tiny", 0.3, ["120/400", "loss 5.123", "val ppl 200.00", "11,234 tok/s", "0:00:12"], "left 0:01:10"
    )
    assert [fitted(line, width).plain for width in (20, 44, 60, 120)] == [
        "cola …  left 0:01:10",
        "cola tiny  120/400  loss 5.123  left 0:01:10",
        "cola tiny  ━━━━━━━━━━━━━━  120/400  loss 5.123  left 0:01:10",
        f"cola tiny  {'━' * 35}  120/400  loss 5.123  val ppl 200.00  11,234 tok/s  0:00:12  left 0:01:10",
    ]
