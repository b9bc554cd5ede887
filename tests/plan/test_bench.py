"""lorank bench: methods timed beside dense ones, on blocks and on a whole model."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from lorank.plan import bench


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BLOCKS_SIZE", "tiny")


def test_methods_take_turns_at_two_kinds_of_work(
    in_this_process: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "achievable_flops", lambda: (1.0, "slow product"))
    asked = ["--method", "dense,cola", "--method", "cola-m", "--seconds", 0, "--sequence-length", 32, "--batch-size", 2]
    code, out, _ = in_this_process("bench", *asked, "--json")
    assert code == 0
    found = json.loads(out)
    blocks, whole = found["works"]
    n, d, ff, r = 256, 256, 688, 88
    attention = 2 * 2 * n * n * d  # scores, and values
    dense = 2 * n * (4 * d * d + 3 * d * ff) + attention
    cola = 2 * n * r * (4 * 2 * d + 3 * (d + ff)) + attention
    assert [row["flops"] for row in blocks["rows"][:2]] == [3 * dense, 3 * cola]  # backward is twice forward
    for work in (blocks, whole):
        rows: list[dict[str, Any]] = work["rows"]
        assert [row["name"] for row in rows] == ["dense", "cola", "cola-m"]
        assert all(len(row["seconds"]) == 3 and min(row["seconds"]) > 0 for row in rows)
        assert rows[0]["speed"] == 1
        assert rows[2]["kept_bytes"] < rows[1]["kept_bytes"] / 2
        assert rows[2]["flops"] > rows[1]["flops"]
    assert whole["tokens"] == 2 * 32
    rates = [row["flops"] / sorted(row["seconds"])[1] for work in (blocks, whole) for row in work["rows"]]
    assert found["ceiling"] == pytest.approx(max(rates)) and "exceeds the slow product" in found["source"]


def test_what_changes_no_pass_is_refused(in_this_process: Callable[..., tuple[int, str, str]]) -> None:
    for name in ("galore", "eggroll"):
        code, _, err = in_this_process("bench", "--method", f"dense,{name}", "--seconds", 0)
        assert (code, err) == (
            2,
            f"lorank: method must change forward and backward, which bench times; {name} does not\n",
        )
